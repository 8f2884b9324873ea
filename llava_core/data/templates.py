"""Turns to text: the conversation templates that come with llava-core, and those of a user's own.

All but `plain` are files in `template_files`. The texts are those of the original LLaVA (llava/conversation.py and the
preprocess_* functions of llava/train/train.py), of LLaVA-NeXT (`llama_3`), XTuner and NeMo; each file names its source.
What is trained is written down as spans; `tokens.py` maps them to tokens.

Where the original's own bookkeeping fails, the text is still the original's and the spans decide:

- an empty message is written as the original writes it (its role alone); an empty answer trains nothing;
- several `<image>` marks in one turn become one, as in the original; `check_image_count` finds the row that meant more;
- an image inside an answer is a slot like any other and is never a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from llava_core.data.chat_template import tokenizer_template
from llava_core.data.conversation import Conversation, ImageSlot, Span, Template, check_image_count
from llava_core.data.piece_template import PieceTemplate, parse_template, read_template, template_file
from llava_core.data.records import IMAGE_MARK, Turn
from llava_core.errors import BadRow
from llava_core.plugins import Registry

__all__ = [
    "BUILTIN_TEMPLATES",
    "CHATML",
    "INTERNLM2",
    "LLAMA_2",
    "LLAMA_3",
    "LLAVA_V1",
    "MISTRAL",
    "NVGPT",
    "NV_DPO",
    "PLAIN",
    "V1",
    "XTUNER_VICUNA",
    "Conversation",
    "ImageSlot",
    "Span",
    "Template",
    "check_image_count",
    "open_template",
    "tokenizer_template",
]

FILES = "llava_core.data.template_files"


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


def open_template(name: str, registry: Registry) -> Template:
    """The registered template of that name, or that of a YAML file (`piece_template` says what is in one).

    Raises:
        ConfigError: a file that cannot be used.
        PluginError: no such name.
    """
    file = template_file(name)
    if file is not None:
        return read_template(file)
    template: Template = registry.load("template", name)
    return template


def _read(name: str) -> PieceTemplate:
    text = (resources.files(FILES) / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_template(text, name, f"{name}.yaml of {FILES}")


PLAIN = PlainTemplate()
V1 = _read("v1")
LLAVA_V1 = _read("llava_v1")
LLAMA_2 = _read("llama_2")
LLAMA_3 = _read("llama_3")
MISTRAL = _read("mistral")
CHATML = _read("chatml")
INTERNLM2 = _read("internlm2")
XTUNER_VICUNA = _read("xtuner_vicuna")
NVGPT = _read("nvgpt")
NV_DPO = _read("nv_dpo")

BUILTIN_TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (PLAIN, V1, LLAVA_V1, LLAMA_2, LLAMA_3, MISTRAL, CHATML, INTERNLM2, XTUNER_VICUNA, NVGPT, NV_DPO)
}
