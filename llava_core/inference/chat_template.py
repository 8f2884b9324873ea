"""The conversation template of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from llava_core.data.chat_template import tokenizer_template
from llava_core.data.conversation import Conversation, Template
from llava_core.data.records import Turn
from llava_core.errors import BadRow, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_TEMPLATE = "tokenizer"
"""The template's name that stands for the folder's own."""

PROBE = "probe"

# Many templates of LLaVA folders read a message as a list of parts; ours are strings with an `<image>` mark.
TO_PARTS = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set text = [{'type': 'text', 'text': message['content'].replace('<image>', '').strip()}] -%}
  {%- set parts = [{'type': 'image'}] + text if '<image>' in message['content'] else text -%}
  {%- set ns.messages = ns.messages + [dict(message, content=parts)] -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""


def folder_template(folder: Path, tokenizer: PreTrainedTokenizerBase, *, multimodal: bool) -> Template:
    """The chat template that the folder's tokenizer or processor has.

    For a language model its text is complete. That of a LLaVA goes through transformers' processor, which adds the
    tokenizer's BOS where the text does not start with it, and so it is done here.

    May give `tokenizer` a chat template.

    Raises:
        ConfigError: none, or one that does not write what it is given.
    """
    older_file = folder / "chat_template.json"  # where processors kept theirs before transformers 4.50
    if tokenizer.chat_template is None and older_file.is_file():
        tokenizer.chat_template = json.loads(older_file.read_text(encoding="utf-8"))["chat_template"]
    if isinstance(tokenizer.chat_template, str) and not _writes_strings(tokenizer):
        tokenizer.chat_template = TO_PARTS + tokenizer.chat_template
    try:
        template = tokenizer_template(tokenizer)
        text = template.prompt([Turn("human", PROBE)]).text
    except TemplateError as error:
        raise ConfigError(
            f"the chat template of {folder} cannot be used: {error}; name a built-in template."
        ) from error
    bos = tokenizer.bos_token
    return replace(template, adds_bos=multimodal and not (bos is not None and text.startswith(str(bos))))


def build_prompt(template: Template, turns: Sequence[Turn]) -> Conversation:
    """The text to be continued.

    Raises:
        BadRow: the turns do not fit the template.
    """
    try:
        return template.prompt(turns)
    except TemplateError as error:
        raise BadRow("chat_template", f"the chat template refuses the turns: {error}") from error


def _writes_strings(tokenizer: Any) -> bool:
    messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError):
        return False
    return PROBE in text
