"""The template of documents, which are no conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_core.data.conversation import Conversation, Span, Template, join_spans
from llava_core.data.records import Turn
from llava_core.errors import BadRow

CONTENTS = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"


@dataclass(frozen=True, kw_only=True)
class TextTemplate(Template):
    """A document as it stands, between the tokenizer's BOS (where it adds one) and its EOS; all of it is trained.

    A prompt is what the document starts with.
    """

    name: str = "text"
    stop: tuple[str, ...] = ()
    after_image: str | None = None
    jinja: str | None = CONTENTS

    def render(self, turns: Sequence[Turn]) -> Conversation:
        """The text of the one turn of the assistant.

        Raises:
            BadRow: `role_order` if there are other turns.
        """
        if [turn.role for turn in turns] != ["assistant"]:
            raise BadRow("role_order", f"`text` takes a document, not a conversation of {len(turns)} turns")
        return join_spans(self._spans(turns), self.adds_bos, adds_eos=True)

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        return [Span("".join(turn.text for turn in turns), True)]

    def _prompt_spans(self, turns: Sequence[Turn]) -> list[Span]:
        return self._spans(turns)


def with_marks_as_text(document: Conversation) -> Conversation:
    """A document that brings no images: `<image>` in it is a word as any other."""
    return replace(document, pieces=(Span(document.text, True),))


TEXT = TextTemplate()
