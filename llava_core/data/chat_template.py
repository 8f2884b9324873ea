"""A tokenizer's own chat template, with the answers found in what it writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_core.data.conversation import Span, Template
from llava_core.data.records import Turn
from llava_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IMAGES_IN_PLACE = "{#- images stay where they are written -#}"
"""A comment in the chat templates of exports, for whoever moved images to the front of their messages before."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTemplate(Template):
    """A tokenizer's own chat template; make one with `tokenizer_template`.

    Attributes:
        tokenizer: its `chat_template` writes the text, BOS included.
        num_trailing: characters of white space that the template writes after an answer's end mark; not trained.
    """

    adds_bos: bool = False
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    num_trailing: int

    def _spans(self, turns: Sequence[Turn]) -> list[Span]:
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", str(self.tokenizer.chat_template))
        text, ranges = self._marked_ranges(turns) if marked else self._prefix_ranges(turns)
        spans, position = [], 0
        for start, end in ranges:
            spans += [Span(text[position:start], False), Span(text[start:end], True)]
            position = end
        return [*spans, Span(text[position:], False)]

    def _prompt_spans(self, turns: Sequence[Turn]) -> list[Span]:
        return [Span(_apply(self.tokenizer, turns, opening=True), False)]

    def _marked_ranges(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character ranges of the answers between the template's generation marks."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        texts, ranges = render(
            conversations=[_messages(turns)],
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        answers = sum(turn.role == "assistant" for turn in turns)
        if len(ranges[0]) != answers:
            raise ConfigError(
                f"the chat template marks {len(ranges[0])} generations in a conversation of {answers} answers; "
                "mark each answer once, or choose a built-in template"
            )
        return texts[0], list(ranges[0])

    def _prefix_ranges(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character ranges of the answers, found by rendering up to before and after each."""
        text, ranges = _apply(self.tokenizer, turns), []
        for index in range(1, len(turns), 2):
            before = _apply(self.tokenizer, turns[:index], opening=True)
            after = _apply(self.tokenizer, turns[: index + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ConfigError(
                    f"cannot find answer {index // 2 + 1} of {len(turns) // 2} in the text of the tokenizer's chat "
                    "template: the text up to it is not a prefix of the whole. Mark the answers with "
                    "{% generation %} … {% endgeneration %} in the chat template, or choose a built-in template"
                )
            ranges.append((len(before), max(len(before), len(after) - self.num_trailing)))
        return text, ranges


def tokenizer_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that uses `tokenizer.chat_template`.

    An answer is trained from where the prompt for it ends through its end mark. It is found by the template's
    `{% generation %}` marks or, without them, by rendering prefixes of the conversation.

    Raises:
        ConfigError: the tokenizer has no single chat template, or that does not write what the answer says. `render`
            raises it when it cannot tell which text is the answer's.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise ConfigError(
            f"expected one chat template in the tokenizer {tokenizer.name_or_path!r}, found "
            f"{type(tokenizer.chat_template).__name__}; give it one, or choose a built-in template"
        )
    probe = "answer-probe"
    _, found, suffix = _apply(tokenizer, [Turn("human", "question"), Turn("assistant", probe)]).rpartition(probe)
    if not found:
        raise ConfigError("the chat template does not write the assistant's text; choose a built-in template")
    end = suffix.rstrip() or suffix
    return TokenizerTemplate(
        name="tokenizer",
        stop=(end,) if end else (),
        after_image=None if IMAGES_IN_PLACE in tokenizer.chat_template else "\n",
        tokenizer=tokenizer,
        num_trailing=len(suffix) - len(end),
    )


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": "user" if turn.role == "human" else "assistant", "content": turn.text} for turn in turns]


def _apply(tokenizer: Any, turns: Sequence[Turn], opening: bool = False) -> str:
    return tokenizer.apply_chat_template(_messages(turns), tokenize=False, add_generation_prompt=opening)
