"""The original LLaVA's rules, written anew as a reference that shares nothing with the code under test.

Text is built from message lists and separators, ids come from sentencepiece through the rules of the slow Llama
tokenizer of transformers 4.37 (which the original ran on), and labels from counting the tokens of each round: no spans
and no offsets. Sources: haotian-liu/LLaVA llava/conversation.py, llava/mm_utils.py and llava/train/train.py;
LLaVA-VL/LLaVA-NeXT llava/train/train.py for `llama_3` and for the count of `mpt` rounds; for other systems' templates
xtuner/utils/templates.py and xtuner/dataset/utils.py of InternLM/xtuner, and conversation.py and neva_dataset.py of
nemo/collections/multimodal/data/neva of NVIDIA/NeMo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

Messages = list[tuple[str, str | None]]
"""Pairs of who speaks, "human" or "assistant", and what; None opens an answer."""

IMAGE = -200

SYSTEMS = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    "llama_2": "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does "
    "not make any sense, or is not factually coherent, explain why instead of answering something not correct. If you "
    "don't know the answer to a question, please don't share false information.",
    "mistral": "",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.",
    "chatml": "<|im_start|>system\nAnswer the questions.",
    "llama_3": "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.",
}

# What a user may write that makes the count of rounds go wrong: whatever a round or an answer is found by.
UNCOUNTABLE = {
    "plain": (),
    "v1": ("<s>", "</s>", "<unk>", "ASSISTANT:"),
    "llama_2": ("<s>", "</s>", "<unk>", "[/INST]"),
    "mistral": ("<s>", "</s>", "<unk>", "[/INST]"),
    "chatml": ("<s>", "</s>", "<unk>", "<|"),
    "llama_3": ("<|",),
}


def prepare(messages: Messages) -> Messages:
    """Images to the front of their message; an assistant that speaks first loses its message."""
    if messages[0][0] == "assistant":
        messages = messages[1:]
    result: Messages = []
    for who, said in messages:
        if said and "<image>" in said:
            said = ("<image>\n" + "".join(said.split("<image>")).strip()).strip()
        result.append((who, said))
    return result


def prepare_first_llava(messages: Messages, *, sep_image_conv_front: bool, use_im_start_end: bool) -> Messages:
    """LLaVA's options until July 2023 (train.py of b4be90b), which NeMo's NeVA keeps: the image of the first message in
    a turn of its own, or where it stands; its place between two tokens. `v1`'s separator and role."""
    assert not sep_image_conv_front or "<image>" in (messages[0][1] or "")
    result: Messages = []
    for number, (who, said) in enumerate(messages):
        said = said or ""
        if sep_image_conv_front and number == 0:
            said = "<image>" + " " + "USER" + ": " + said.replace("<image>", "").strip()
        place = "<im_start>" + "<image>" + "<im_end>" if use_im_start_end else "<image>"
        result.append((who, said.replace("<image>", place)))
    return result


def prepare_im_start_end(messages: Messages) -> Messages:
    """LLaVA-1.5 with mm_use_im_start_end."""
    return [(who, said and said.replace("<image>", "<im_start><image><im_end>")) for who, said in prepare(messages)]


def build_text(template: str, messages: Messages) -> str:
    """The conversation as the original writes it; `messages` are prepared, and the last may be an open answer."""
    if template == "plain":
        return "<image>" + (messages[1][1] or "") + "\n"
    if template in XTUNER:
        return xtuner_text(messages, **XTUNER[template])
    if template in NEMO_SYSTEMS:
        return nemo_text(template, messages)
    text = SYSTEMS[template] + " " if template in ("v1", "llava_v1") else ""
    if template == "chatml":
        text = SYSTEMS["chatml"] + "<|im_end|>"
    if template == "llama_3":
        text = "<|begin_of_text|>" + llama_3_message("system", SYSTEMS["llama_3"])
    for number, (who, said) in enumerate(messages):
        text += write_message(template, number, who == "human", said)
    return text


def write_message(template: str, number: int, is_human: bool, said: str | None) -> str:
    if template in ("v1", "llava_v1"):
        name, end = ("USER:", " ") if is_human else ("ASSISTANT:", "</s>")
        return name + (" " + said + end if said else "")
    if template == "chatml":
        head = "<|im_start|>" + ("user\n" if is_human else "assistant\n")
        return head + (said + "<|im_end|>" if said else "")
    if template == "llama_3":
        if said is None:
            return "<|start_header_id|>assistant<|end_header_id|>\n\n"
        return llama_3_message("user" if is_human else "assistant", said)
    if not said:
        return ""
    if not is_human:
        return " " + said + " </s>"
    if number == 0 and SYSTEMS[template]:
        said = "<<SYS>>\n" + SYSTEMS[template] + "\n<</SYS>>\n\n" + said
    return ("<s>" if number and template == "llama_2" else "") + "[INST] " + said + " [/INST]"


XTUNER = {
    "internlm2": {
        "instruction": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "suffix": "<|im_end|>",
        "sep": "\n",
    },
    "xtuner_vicuna": {"instruction": "USER: {input} ASSISTANT:", "suffix": "", "sep": "\n"},
}
"""PROMPT_TEMPLATE's internlm2_chat and vicuna; the system text is the data's, and LLaVA's data has none."""

NEMO_SYSTEMS = {"nvgpt": SYSTEMS["v1"] + "\n\n", "nv_dpo": "\n"}
NEMO_LABEL = (
    "<extra_id_2>quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,"
    "verbosity:4\n"
)


def xtuner_text(messages: Messages, instruction: str, suffix: str, sep: str) -> str:
    """Rounds; without a suffix of its own an answer ends with EOS, and the next round has a BOS."""
    text = ""
    for number in range(0, len(messages), 2):
        said, answer = messages[number][1] or "", messages[number + 1][1]
        text += ("<s>" if number and not suffix else "") + instruction.format(input=said)
        if answer is None:
            return text
        # Without a suffix the answer's own word mark stands between it and "ASSISTANT:".
        text += (answer + suffix if suffix else (" " + answer if answer else "") + "</s>") + sep
    return text


def nemo_text(template: str, messages: Messages) -> str:
    text = "<extra_id_0>System\n" + NEMO_SYSTEMS[template] + "<extra_id_1>"
    for who, said in messages:
        role, label = ("User\n", "") if who == "human" else ("Assistant\n", NEMO_LABEL if template == "nvgpt" else "")
        if said is None:
            return text + role + label
        text += role + (label + said + "\n<extra_id_1>" if label + said else "")
    return text


def llama_3_message(role: str, said: str) -> str:
    return "<|start_header_id|>" + role + "<|end_header_id|>\n\n" + said.strip() + "<|eot_id|>"


class SlowLlama:
    """The slow Llama tokenizer: special tokens are cut out, and sentencepiece sees each stretch between them.

    With `legacy`, sentencepiece puts `▁` before every stretch. Without, only the text gets one, in front.
    """

    bos_id = 1

    def __init__(self, model_file: Path, legacy: bool, special_tokens: dict[str, int]) -> None:
        self.legacy = legacy
        self.special_tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, **special_tokens}
        messages: Any = sentencepiece_model_pb2  # its classes are made at run time
        proto = messages.ModelProto.FromString(model_file.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def __call__(self, text: str) -> list[int]:
        if text and not self.legacy:
            text = "▁" + text.replace("▁", " ")
        ids: list[int] = []
        for stretch in re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", text):
            special = self.special_tokens.get(stretch)
            ids += self._pieces(stretch) if special is None else [special]
        lone = self.model.piece_to_id("▁")
        if not self.legacy and len(ids) > 1 and ids[0] == lone and ids[1] in self.special_tokens.values():
            ids = ids[1:]
        return [self.bos_id, *ids]

    def _pieces(self, stretch: str) -> list[int]:
        if self.legacy or not stretch.startswith(("▁", " ")):
            return self.model.encode(stretch)
        # Without a dummy prefix sentencepiece drops no leading space only behind other text.
        return self.model.encode("<unk>" + stretch)[len(self.model.encode("<unk>")) :]


class ByteLevel:
    """A byte-level tokenizer that adds a BOS; it knows no `legacy`."""

    legacy = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_token_id

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids


Tokenize = SlowLlama | ByteLevel


def ids_with_images(text: str, tokenize: Tokenize) -> list[int]:
    """The ids of the chunks around `<image>`, each tokenised by itself; BOS leads the first alone."""
    result = [tokenize.bos_id]
    for number, chunk in enumerate(text.split("<image>")):
        result += ([IMAGE] if number else []) + tokenize(chunk)[1:]
    return result


def train_on(template: str, messages: Messages, tokenize: Tokenize) -> tuple[list[int], list[bool]]:
    """The original's ids, with -200 for an image, and where its labels are not -100."""
    if template == "llama_3":
        return llama_3_messages(messages, tokenize)
    text = build_text(template, messages)
    ids = ids_with_images(text, tokenize)
    if template == "plain":
        return ids, [number >= 2 for number in range(len(ids))]
    return ids, count_rounds(template, text, len(ids), tokenize)


def count_rounds(template: str, text: str, total: int, tokenize: Tokenize) -> list[bool]:
    """Label arithmetic: tokens of each round, less those of its question; all or nothing if the sum is not `total`."""
    late_surplus = 0
    if template == "chatml":
        parts = text.split("<|im_end|>")
        rounds = ["<|im_end|>".join(parts[:3]), *("<|im_end|>".join(parts[n : n + 2]) for n in range(3, len(parts), 2))]
        answer_mark, overlap = "<|im_end|><|im_start|>assistant\n", 1
        late_surplus = -1 if tokenize.legacy else 0
    else:
        rounds = text.split("</s>")
        answer_mark, overlap = (" ASSISTANT: " if template == "v1" else "[/INST] "), 2
        if template == "v1" and not tokenize.legacy:
            late_surplus = 1
    trained = [False] + [True] * (total - 1)
    position = 1
    for number, spoken in enumerate(rounds):
        question, mark, answer = spoken.partition(answer_mark)
        if not mark or answer_mark in answer:
            break
        surplus = late_surplus if number else 0
        asked = len(ids_with_images(question + mark, tokenize)) - overlap - surplus
        trained[position : position + asked] = [False] * asked
        position += len(ids_with_images(spoken, tokenize)) - surplus
    trained[position:] = [False] * (total - position)
    return trained if position == total else [False] * total


def llama_3_messages(messages: Messages, tokenize: Tokenize) -> tuple[list[int], list[bool]]:
    """LLaVA-NeXT: each message by itself; answers with their header and every control token are trained."""
    control = [tokenize(token)[1] for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")]
    ids, trained = [tokenize.bos_id], [True]
    for who, said in [("system", SYSTEMS["llama_3"]), *messages]:
        role = {"human": "user"}.get(who, who)
        message = ids_with_images(llama_3_message(role, said or ""), tokenize)[1:]
        ids += message
        trained += [role == "assistant" or token in control for token in message]
    return ids, trained


def expand(
    ids: Sequence[int], trained: Sequence[bool], visual_tokens: int, pad_id: int
) -> tuple[list[int], list[bool]]:
    """Each -200 becomes an image's positions, none of them trained."""
    long_ids: list[int] = []
    long_trained: list[bool] = []
    for token, flag in zip(ids, trained, strict=True):
        is_image = token == IMAGE
        long_ids += [pad_id] * visual_tokens if is_image else [token]
        long_trained += [False] * visual_tokens if is_image else [flag]
    return long_ids, long_trained
