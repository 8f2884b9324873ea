"""Turns to text: a record's turns through a template to a conversation of spans.

The texts are those of the original LLaVA (llava/conversation.py and the preprocess_* functions of llava/train/train.py)
and, for `llama_3`, of LLaVA-NeXT (preprocess_llama3). What is trained is written down as spans; `tokens.py` maps them
to tokens.

Where the original's own bookkeeping fails, the text is still the original's and the spans decide:

- an empty message is written as the original writes it (its role alone); an empty answer trains nothing;
- several `<image>` marks in one turn become one, as in the original; `check_image_count` finds the row that meant more;
- an image inside an answer is a slot like any other and is never a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_core.data.chat_template import tokenizer_template
from llava_core.data.conversation import Conversation, ImageSlot, Span, Template, check_image_count
from llava_core.data.records import IMAGE_MARK, Turn
from llava_core.errors import BadRow

__all__ = [
    "BUILTIN_TEMPLATES",
    "CHATML",
    "LLAMA_2",
    "LLAMA_3",
    "MISTRAL",
    "PLAIN",
    "V1",
    "Conversation",
    "ImageSlot",
    "Span",
    "Template",
    "check_image_count",
    "tokenizer_template",
]

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
CHATML_SYSTEM = "Answer the questions."


@dataclass(frozen=True, kw_only=True)
class PlainTemplate(Template):
    """An image and its caption; the question's words are discarded and no EOS is written."""

    name: str = "plain"
    stop: tuple[str, ...] = ("\n",)

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        if len(turns) != 2:
            raise BadRow("role_order", f"`plain` takes one question and one caption, not {len(turns)} turns")
        return [*self._prompt_spans(turns[:1]), Span(turns[1].text + "\n", True)]

    def _prompt_spans(self, turns: Sequence[Turn]) -> list[Span]:
        """The image alone: the caption follows it directly in training, where get_prompt would put a line break."""
        if len(turns) != 1 or IMAGE_MARK not in turns[0].text:
            raise BadRow("image_count", f"`plain` captions an image: its one question must hold {IMAGE_MARK}")
        return [Span(IMAGE_MARK, False)]


@dataclass(frozen=True, kw_only=True)
class V1Template(Template):
    """Vicuna v1, as LLaVA-1.5 was trained. An answer is trained from the space before it through `</s>`."""

    name: str = "v1"
    stop: tuple[str, ...] = ("</s>",)

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        spans = [Span(f"{V1_SYSTEM} ", False)]
        for turn in turns:
            if turn.role == "human":
                spans.append(Span(f"USER: {turn.text} " if turn.text else "USER:", False))
            else:
                spans.append(Span("ASSISTANT:", False))
                spans.append(Span(f" {turn.text}</s>" if turn.text else "", True))
        return spans


@dataclass(frozen=True, kw_only=True)
class InstTemplate(Template):
    """`[INST] … [/INST]` rounds: Llama 2 and, without system text and inner BOS, Mistral.

    Attributes:
        system: written into the first question, unless empty.
        round_start: what each round but the first starts with; the first has the tokenizer's BOS.
    """

    stop: tuple[str, ...] = ("</s>",)
    system: str
    round_start: str

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        if not turns[0].text:
            raise BadRow("empty_turn", f"`{self.name}` needs words or an image in the first question")
        header = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        spans: list[Span] = []
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                spans.append(Span(f" {turn.text} </s>" if turn.text else "", True))
            elif turn.text:
                start = self.round_start if index else ""
                spans.append(Span(f"{start}[INST] {header}{turn.text} [/INST]", False))
                header = ""
        return spans


@dataclass(frozen=True, kw_only=True)
class ChatmlTemplate(Template):
    """The `chatml_direct` conversation of LLaVA-1.6: no line break after `<|im_end|>`."""

    name: str = "chatml"
    stop: tuple[str, ...] = ("<|im_end|>",)

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        spans = [Span(f"<|im_start|>system\n{CHATML_SYSTEM}<|im_end|>", False)]
        for turn in turns:
            body = f"{turn.text}<|im_end|>" if turn.text else ""
            if turn.role == "human":
                spans.append(Span(f"<|im_start|>user\n{body}", False))
            else:
                spans.append(Span("<|im_start|>assistant\n", False))
                spans.append(Span(body, True))
        return spans


@dataclass(frozen=True, kw_only=True)
class Llama3Template(Template):
    """Llama 3 as LLaVA-NeXT trains it: an answer with its header, and the control tokens of every message, are targets.

    Messages are stripped, as by the tokenizer's own chat template.
    """

    name: str = "llama_3"
    stop: tuple[str, ...] = ("<|eot_id|>",)
    adds_bos: bool = False

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        spans = [Span("<|begin_of_text|>", True), *_llama_3_message("system", VISION_SYSTEM)]
        for turn in turns:
            spans += _llama_3_message("user" if turn.role == "human" else "assistant", turn.text)
        return spans

    def _prompt_spans(self, turns: Sequence[Turn]) -> list[Span]:
        return [*self._spans(turns), Span(_llama_3_header("assistant"), False)]


def _llama_3_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _llama_3_message(role: str, text: str) -> list[Span]:
    if role == "assistant":
        return [Span(f"{_llama_3_header(role)}{text.strip()}<|eot_id|>", True)]
    return [
        Span("<|start_header_id|>", True),
        Span(role, False),
        Span("<|end_header_id|>", True),
        Span(f"\n\n{text.strip()}", False),
        Span("<|eot_id|>", True),
    ]


PLAIN = PlainTemplate()
V1 = V1Template()
LLAMA_2 = InstTemplate(name="llama_2", system=LLAMA_2_SYSTEM, round_start="<s>")
LLAMA_3 = Llama3Template()
MISTRAL = InstTemplate(name="mistral", system="", round_start="")
CHATML = ChatmlTemplate()

BUILTIN_TEMPLATES: Mapping[str, Template] = {
    template.name: template for template in (PLAIN, V1, LLAMA_2, LLAMA_3, MISTRAL, CHATML)
}
