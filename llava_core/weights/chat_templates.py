"""Conversation templates as the Jinja chat templates of an export.

They write the text that `Template.render` and `Template.prompt` write, from messages whose content is a string with an
`<image>` mark or a list of parts. BOS is written only where the template itself writes it: transformers' processors
add the tokenizer's BOS to a text that does not start with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llava_core.data.chat_template import IMAGES_IN_PLACE, TokenizerTemplate
from llava_core.data.conversation import Span, Template
from llava_core.data.piece_template import MESSAGE, PieceTemplate
from llava_core.data.templates import PlainTemplate
from llava_core.errors import ConfigError

# A message's parts joined to one string, with its image as `Template` has it before it writes a turn.
FLATTEN = """\
{%- set ns = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set ns.text = message['content'] -%}
  {%- else -%}
    {%- set ns.text = '' -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {%- set ns.text = ns.text + part['text'] -%}
      {%- elif part['type'] == 'image' -%}
        {%- set ns.text = ns.text + '<image>' -%}
      {%- else -%}
        {{- raise_exception('a message may hold text and an image, not ' + part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
@IMAGE@
  {%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""

IMAGE_FIRST = """\
  {%- if ns.text.split('<image>') | length > 2 -%}
    {{- raise_exception('this model was trained with at most one image in a message') -}}
  {%- elif '<image>' in ns.text -%}
    {%- set ns.text = (@FRONT@ + ns.text.replace('<image>', '').strip()).strip() -%}
  {%- endif -%}"""

# The roles that the built-in templates were trained with; a leading assistant turn is dropped, once.
CHECK_ROLES = """\
{%- if messages and messages[0]['role'] == 'assistant' -%}{%- set messages = messages[1:] -%}{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('messages must alternate from user to assistant; the system text is the template\\'s own') -}}
  {%- endif -%}
{%- endfor -%}
"""

PLAIN = """\
{{- '<image>' -}}
{%- if messages | length > 1 -%}{{- messages[1]['content'] + '\\n' -}}{%- endif -%}
"""

NEEDS_QUESTION = """\
{%- if not messages[0]['content'] -%}
  {{- raise_exception('the first question needs words or an image') -}}
{%- endif -%}
"""


def chat_template(template: Template, *, multimodal: bool, bos: str) -> str:
    """The Jinja chat template that writes `template`'s text.

    Args:
        multimodal: whether messages may hold images. Without them a tokenizer's own template stays as it is, and a
            built-in one writes the tokenizer's BOS: `tokenizer.apply_chat_template` adds none.
        bos: how it is written; see `vocabulary.written_bos`.

    Raises:
        ConfigError: a template of a plugin, whose Jinja form is not known.
    """
    if isinstance(template, TokenizerTemplate):
        own = template.tokenizer.chat_template
        assert isinstance(own, str)  # `tokenizer_template` saw to it
        return _flatten(template) + own if multimodal else own
    start = f"{{{{- {json.dumps(bos)} -}}}}\n" if template.adds_bos and not multimodal else ""
    return _flatten(template) + CHECK_ROLES + start + _body(template)


def _flatten(template: Template) -> str:
    if template.after_image is None:
        image = f"  {IMAGES_IN_PLACE}{{%- set ns.text = ns.text.replace('<image>', {_literal(template.image)}) -%}}"
    else:
        image = IMAGE_FIRST.replace("@FRONT@", _literal(template.image + template.after_image))
    return FLATTEN.replace("@IMAGE@", image)


def _body(template: Template) -> str:
    if isinstance(template, PlainTemplate):
        return PLAIN
    if isinstance(template, PieceTemplate):
        return _of_pieces(template)
    if template.jinja is not None:
        return template.jinja
    raise ConfigError(
        f"the template {template.name!r} cannot be exported: it is not one of llava-core's own, whose Jinja form is "
        "known. Give it a `jinja` that writes the same text."
    )


def _of_pieces(template: PieceTemplate) -> str:
    human = _message(template.human)
    if template.first_human != template.human:
        human = f"{{%- if loop.first -%}}\n{_message(template.first_human)}{{%- else -%}}\n{human}{{%- endif -%}}\n"
    return "".join(
        (
            NEEDS_QUESTION if template.needs_question else "",
            _message(template.start),
            "{%- for message in messages -%}\n",
            f"{{%- set text = message['content']{'.strip()' if template.strip else ''} -%}}\n",
            f"{{%- if message['role'] == 'user' -%}}\n{human}",
            f"{{%- else -%}}\n{_message(template.assistant)}{{%- endif -%}}\n",
            "{%- endfor -%}\n",
            f"{{%- if add_generation_prompt -%}}\n{_message(template.opening)}{{%- endif -%}}\n",
        )
    )


def _message(pieces: Sequence[Span]) -> str:
    """What writes pieces; `text` is the message."""
    written = []
    for piece in pieces:
        before, found, after = piece.text.partition(MESSAGE)
        if found:
            written.append(
                f"{{%- if text -%}}{{{{- {_literal(before)} + text + {_literal(after)} -}}}}{{%- endif -%}}\n"
            )
        else:
            written.append(f"{{{{- {_literal(before)} -}}}}\n")
    return "".join(written)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
