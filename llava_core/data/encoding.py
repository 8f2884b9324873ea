"""Records to token ids: what a template makes of one, and token ids that were kept before images had a size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llava_core.data.conversation import Conversation, Template, check_image_count
from llava_core.data.documents import with_marks_as_text
from llava_core.data.overlong import Encoded
from llava_core.data.readers import Content
from llava_core.data.records import Record, TokenSequence
from llava_core.data.tokens import encode_whole
from llava_core.errors import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_CHARACTERS = 1 << 24
"""A row of a longer text is set aside: a tokenizer takes about 250 bytes for each character."""


def conversation_of(record: Record, template: Template, content: Content) -> Conversation:
    """What is learnt of a record.

    Args:
        content: of the record's data set.

    Raises:
        BadRow: `row_too_large`; what the template refuses; `image_count`.
    """
    num_characters = sum(len(turn.text) for turn in record.turns)
    if num_characters > MAX_CHARACTERS:
        raise BadRow(
            "row_too_large",
            f"the row's text has {num_characters} characters, the limit is {MAX_CHARACTERS}: split the row",
        )
    conversation = template.render(record.turns)
    if content == "texts" and not record.images:
        conversation = with_marks_as_text(conversation)
    check_image_count(conversation, len(record.images))
    return conversation


def compact(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenSequence, tuple[int, ...]]:
    """A conversation's tokens with one in the place of each image, and where these stand: `expanded` goes on from it.

    Raises:
        ConfigError: as `encode_whole`.
    """
    whole = encode_whole(conversation, tokenizer, visual_tokens=[1] * conversation.num_images, pad_id=0)
    return TokenSequence(whole.tokens.numpy(), whole.supervised.numpy()), whole.image_starts


def expanded(
    sequence: TokenSequence, image_starts: Sequence[int], *, visual_tokens: Sequence[int], pad_id: int
) -> Encoded:
    """What `encode_whole` gives of the conversation that `compact` was given."""
    starts, lengths = np.array(image_starts, dtype=np.int64), np.array(visual_tokens, dtype=np.int64)
    repeats = np.ones(sequence.tokens.size, dtype=np.int64)
    repeats[starts] = lengths
    tokens = sequence.tokens.astype(np.int64)  # a copy, in which the pad id is written
    tokens[starts] = pad_id
    return Encoded(
        tokens=torch.from_numpy(tokens.repeat(repeats)),
        supervised=torch.from_numpy(sequence.supervised.repeat(repeats)),
        image_starts=tuple((starts + np.cumsum(lengths - 1) - (lengths - 1)).tolist()),
        visual_tokens=tuple(visual_tokens),
    )
