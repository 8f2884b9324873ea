"""Conversation templates as the Jinja chat templates of an export.

They write the text that `Template.render` and `Template.prompt` write, from messages whose content is a string with an
`<image>` mark or a list of parts. BOS is written only where the template itself writes it: transformers' processors
add the tokenizer's BOS to a text that does not start with it.
"""

from __future__ import annotations

import json

from llava_core.data.chat_template import TokenizerTemplate
from llava_core.data.conversation import Template
from llava_core.data.templates import (
    CHATML_SYSTEM,
    V1_SYSTEM,
    VISION_SYSTEM,
    ChatmlTemplate,
    InstTemplate,
    Llama3Template,
    PlainTemplate,
    V1Template,
)
from llava_core.errors import ConfigError

# A message's parts joined to one string, its image moved to the front, as `Template` does before it writes a turn.
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
  {%- if ns.text.split('<image>') | length > 2 -%}
    {{- raise_exception('this model was trained with at most one image in a message') -}}
  {%- elif '<image>' in ns.text -%}
    {%- set ns.text = ('<image>\\n' + ns.text.replace('<image>', '').strip()).strip() -%}
  {%- endif -%}
  {%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""

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

V1 = """\
{{- SYSTEM + ' ' -}}
{%- for message in messages -%}
  {%- set text = message['content'] -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + text + ' ' if text else 'USER:' -}}
  {%- else -%}
    {{- 'ASSISTANT:' + (' ' + text + '</s>' if text else '') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

INST = """\
{%- if not messages[0]['content'] -%}
  {{- raise_exception('the first question needs words or an image') -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set text = message['content'] -%}
  {%- if text and message['role'] == 'user' -%}
    {{- ('' if loop.first else ROUND_START) + '[INST] ' + (HEADER if loop.first else '') + text + ' [/INST]' -}}
  {%- elif text -%}
    {{- ' ' + text + ' </s>' -}}
  {%- endif -%}
{%- endfor -%}
"""

CHATML = """\
{{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>' -}}
{%- for message in messages -%}
  {%- set text = message['content'] -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + (text + '<|im_end|>' if text else '') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA_3 = """\
{%- macro header(role) -%}{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}{%- endmacro -%}
{{- '<|begin_of_text|>' + header('system') + SYSTEM + '<|eot_id|>' -}}
{%- for message in messages -%}
  {{- header(message['role']) + message['content'].strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}
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
        return FLATTEN + own if multimodal else own
    start = f"{{{{- {json.dumps(bos)} -}}}}\n" if template.adds_bos and not multimodal else ""
    return FLATTEN + CHECK_ROLES + start + _body(template)


def _body(template: Template) -> str:
    match template:
        case PlainTemplate():
            return PLAIN
        case V1Template():
            return _constant("SYSTEM", V1_SYSTEM) + V1
        case InstTemplate(system=system, round_start=round_start):
            header = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
            return _constant("HEADER", header) + _constant("ROUND_START", round_start) + INST
        case ChatmlTemplate():
            return _constant("SYSTEM", CHATML_SYSTEM) + CHATML
        case Llama3Template():
            return _constant("SYSTEM", VISION_SYSTEM) + LLAMA_3
    if template.jinja is not None:
        return template.jinja
    raise ConfigError(
        f"the template {template.name!r} cannot be exported: it is not one of llava-core's own, whose Jinja form is "
        "known. Give it a `jinja` that writes the same text."
    )


def _constant(name: str, value: str) -> str:
    return f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
