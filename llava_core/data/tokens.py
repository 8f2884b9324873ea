"""Conversations to token ids, with the supervised tokens marked.

The rules are the original LLaVA's (llava/mm_utils.py, tokenizer_image_token; llava/train/train.py):

- The text between two images is one chunk and is tokenised on its own, so that `▁` starts each chunk; BOS stands at the
  very start alone.
- A chunk is tokenised whole and its tokens are mapped to spans by character offsets: a token is supervised if it starts
  in a trainable span. The original counts the tokens of each round instead; both give the same labels wherever that
  count is right.
- The tokenizer's special tokens are recognised wherever their text stands, also in what a user wrote: `</s>` in a
  question is the token `</s>`, as in the original. Such text never changes what is trainable here.
- A sample that is longer than `max_length` with its images expanded is cut there. (The original cuts the text first,
  each image counting as one token; the second cut is never the longer one.) An image that the cut goes through is left
  out whole, and so is all that follows: its kept part could only precede targets that are gone, so the loss is the
  original's. `Encoded.image_starts` then has fewer entries than the row has images, and only that many are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.text import Text
from torch import Tensor

from llava_core.data.conversation import Conversation, Span
from llava_core.data.overlong import Encoded, truncated
from llava_core.errors import BadRow, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_START = "▁"


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    visual_tokens: Sequence[int],
    pad_id: int,
    max_length: int,
) -> Encoded:
    """Tokenises a conversation for training, or a prompt for generation, into at most `max_length` tokens.

    Args:
        visual_tokens: how many positions each image takes.
        pad_id: the id that stands in them.

    Raises:
        BadRow: `no_supervised_token` if no token with a predecessor is left to train; `prompt_too_long` if a prompt,
            which is never cut, does not fit.
        ConfigError: as `encode_whole`.
    """
    whole = encode_whole(conversation, tokenizer, visual_tokens=visual_tokens, pad_id=pad_id)
    if not conversation.is_prompt:
        return truncated(whole, max_length)
    if whole.length > max_length:
        raise BadRow("prompt_too_long", f"a prompt of {whole.length} tokens; at most {max_length} fit: shorten it")
    return whole


def encode_whole(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, visual_tokens: Sequence[int], pad_id: int
) -> Encoded:
    """Tokenises a conversation of any length.

    Raises:
        ConfigError: a tokenizer that has no character offsets, adds more than a BOS, or lacks the EOS that is asked.
    """
    if conversation.num_images != len(visual_tokens) or any(length < 1 for length in visual_tokens):
        raise ValueError(
            f"a conversation with {conversation.num_images} images needs visual_tokens of at least 1 for each, not "
            f"{list(visual_tokens)}"
        )
    ids = _bos(tokenizer) if conversation.adds_bos else []
    supervised = [np.zeros(len(ids), dtype=np.bool_)]
    image_starts: list[int] = []
    for index, spans in enumerate(_chunks(conversation)):
        if index:
            image_starts.append(len(ids))
            ids += [pad_id] * visual_tokens[index - 1]
            supervised.append(np.zeros(visual_tokens[index - 1], dtype=np.bool_))
        chunk_ids, chunk_supervised = _encode_chunk(spans, tokenizer)
        ids += chunk_ids
        supervised.append(chunk_supervised)
    if conversation.adds_eos:
        ids.append(_eos(tokenizer))
        supervised.append(np.ones(1, dtype=np.bool_))
    return Encoded(
        tokens=torch.from_numpy(np.array(ids, dtype=np.int64)),
        supervised=torch.from_numpy(np.concatenate(supervised)),
        image_starts=tuple(image_starts),
        visual_tokens=tuple(visual_tokens),
    )


def _bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: its BOS or nothing."""
    added = tokenizer("")["input_ids"]
    if added not in ([], [tokenizer.bos_token_id]):
        raise ConfigError(
            f"the tokenizer adds the ids {added} to a text; expected its BOS or nothing: templates write their own end "
            "marks, so set add_eos_token to false in tokenizer_config.json"
        )
    return list(added)


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS to end a document with: set eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def _chunks(conversation: Conversation) -> Iterator[list[Span]]:
    """The spans before, between and after the image slots: always one list more than there are slots."""
    spans: list[Span] = []
    for piece in conversation.pieces:
        if isinstance(piece, Span):
            spans.append(piece)
        else:
            yield spans
            spans = []
    yield spans


def _encode_chunk(spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], NDArray[np.bool_]]:
    """Ids of the spans' joined text, and which of them start in a trainable span."""
    text = "".join(span.text for span in spans)
    if not text:
        return [], np.zeros(0, dtype=np.bool_)
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} gives no character offsets; use a tokenizer of `tokenizers`")
    shift = int(_loses_first_space(text, tokenizer))
    encoding = tokenizer(" " * shift + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    # A token starts where the last one ended, also where trim_offsets hides its leading space; the bytes of one
    # character share its offsets, so the start may lie before that.
    begins = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
    span_ends = np.cumsum([len(span.text) for span in spans])
    found = np.searchsorted(span_ends, np.clip(begins - shift, 0, len(text) - 1), side="right")
    return list(encoding["input_ids"]), np.array([span.trainable for span in spans])[found]


def _loses_first_space(text: str, tokenizer: Any) -> bool:
    """True if the tokenizer takes the text's own first space for the `▁` that starts a text.

    The original's sentencepiece tokenizer puts `▁` before a space, too; the Metaspace that transformers 5 builds for
    Llama does not. It matters where a caption starts with a space and where a question is an image alone, so that the
    next chunk is " ASSISTANT:". One more space gives sentencepiece's ids. Remove when Metaspace prepends always.
    """
    if not text.startswith((" ", WORD_START)):
        return False
    with_space, without = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" a", "a"))
    return with_space == without


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """One line on what decides the ids: the class, where `▁` is put (measured, not read off a flag), bos, eos, pad."""
    parts = [f"{type(tokenizer).__name__}: {len(tokenizer)} tokens", _word_starts(tokenizer)]
    added = _bos(tokenizer)
    for name in ("bos", "eos", "pad"):
        token, index = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        parts.append(f"{name} {token} = {index}" if token is not None else f"no {name}")
    parts[2] += " (added to a text)" if added else " (not added to a text)"
    return ", ".join(parts)


def _word_starts(tokenizer: Any) -> str:
    if not tokenizer.tokenize("a")[0].startswith(WORD_START):
        return f"no {WORD_START} before a text"
    special = next(iter(tokenizer.all_special_tokens), None)
    if special is not None and tokenizer.tokenize(f"{special}a")[1].startswith(WORD_START):
        return f"legacy=True ({WORD_START} after every special token)"
    return f"legacy=False ({WORD_START} only where a text starts)"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a complete tokenizer folder that tokenises alike when it is loaded again.

    transformers 5.23 writes neither `legacy` nor `add_bos_token`, so that a Llama tokenizer with `legacy=True` comes
    back as another one. Remove when save_pretrained writes both.
    """
    tokenizer.save_pretrained(folder)
    if not hasattr(tokenizer, "legacy"):
        return
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"legacy": tokenizer.legacy, "add_bos_token": bool(_bos(tokenizer))}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def render_supervised(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    supervised: Tensor,
    image_starts: Sequence[int],
    visual_tokens: Sequence[int],
) -> Text:
    """The decoded sample for a person to read: targets in ⟦brackets⟧ and green, images as `[image ×576]`.

    Args:
        tokens: [T] int64.
        supervised: [T] bool.
    """
    result = Text()
    position = 0
    for start, length in [*zip(image_starts, visual_tokens, strict=True), (tokens.numel(), 0)]:
        _append_runs(result, tokenizer, tokens[position:start].tolist(), supervised[position:start].tolist())
        if length:
            result.append(f"[image ×{length}]", style="cyan")
        position = start + length
    return result


def _append_runs(result: Text, tokenizer: Any, ids: list[int], supervised: list[bool]) -> None:
    """Appends the text of `ids`, each supervised run marked.

    Decoded from the first id on each time, because a decoder drops the space at the start of what it is given.
    """
    shown, start = "", 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and supervised[end] == supervised[start]:
            continue
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece, shown = text[len(shown) :], text
        if supervised[start]:
            result.append(f"⟦{piece}⟧", style="bold green")
        else:
            result.append(piece, style="dim")
        start = end
