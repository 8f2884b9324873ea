"""The tokenizer and the vocabulary of an export: `<image>`, end marks, and rows for new tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_core.data.records import IMAGE_MARK
from llava_core.data.tokens import WORD_START
from llava_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROW_MULTIPLE = 64
"""Grown vocabularies are a multiple of this: matrix units and tensor parallelism like round sizes."""


def frozen_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, *, multimodal: bool, adds_bos: bool
) -> PreTrainedTokenizerFast:
    """A copy that gives the ids of training wherever it is loaded.

    transformers builds a LlamaTokenizer anew from its vocabulary and a few flags, of which it saves only some; the copy
    is a plain `tokenizers` one, whose file says everything. It pads on the left, as generation needs, with unk or eos
    where there is no pad token.

    Args:
        multimodal: see to it that `<image>` is one token, after which text is tokenised as in training.
        adds_bos: False takes away a BOS that the tokenizer adds: the template's text is complete without.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} cannot be exported; use a tokenizer of `tokenizers`.")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if multimodal:
        backend = _with_image_token(backend)
    special: dict[str, Any] = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if token}
    special.setdefault("pad_token", tokenizer.unk_token or tokenizer.eos_token)
    if not adds_bos and tokenizer("")["input_ids"]:
        special |= {"add_bos_token": False, "add_eos_token": False}  # given, they rewrite the post-processor
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **special,
    )


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop: Iterable[str]) -> tuple[int, ...]:
    """Ids that end an answer: eos, and each end mark that is a single token after text."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    for mark in map(bare_mark, stop):
        after = tokenizer("a" + mark, add_special_tokens=False)["input_ids"]
        if after[:-1] == before and after[-1] not in ids:
            ids.append(after[-1])
    return tuple(ids)


def written_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to write before a text to get the ids that the tokenizer itself gives with its BOS; empty if it adds none.

    After a written BOS, some tokenizers leave out the `▁` that starts a text; a space stands in for it.

    Raises:
        ConfigError: neither way gives the ids.
    """
    wanted = tokenizer("a")["input_ids"]
    starts = [""] if tokenizer.bos_token is None else ["", f"{tokenizer.bos_token}", f"{tokenizer.bos_token} "]
    for start in starts:
        if tokenizer(start + "a", add_special_tokens=False)["input_ids"] == wanted:
            return start
    raise ConfigError(f"the ids {wanted} that this tokenizer gives to 'a' cannot be had by writing its BOS before it.")


WORD_START_BEFORE = (r"[\s\S]", rf"[ {WORD_START}]")
"""What may follow an image where a tokenizer writes no `▁` of its own behind a special token: anything, or a space."""


def bare_mark(mark: str) -> str:
    """An end mark without the space that a template may write before it; a line break stays one."""
    return mark.strip() or mark


def grown_size(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that the embedding needs for every id of the tokenizer; those it has, if they suffice."""
    needed = max(tokenizer.get_vocab().values()) + 1
    return vocab_size if needed <= vocab_size else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE


def grown(weight: Tensor, num_rows: int) -> Tensor:
    """An embedding or output matrix [V, D] with rows added, [num_rows, D]; each is the mean of the existing ones.

    The logit of such a row is the mean of the others', which is never the largest: greedy decoding is as before. A zero
    row has the logit 0, which wins where all others are negative, and a random row could win anywhere.
    """
    if num_rows == len(weight):
        return weight
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat((weight, mean.expand(num_rows - len(weight), -1)))


def _with_image_token(backend: Any) -> Any:
    """`<image>` as one special token; text that follows it gets the `▁` that it gets in training.

    In training, the text after an image is tokenised on its own and so starts with `▁`, where the tokenizer has that. A
    special token in its place keeps the `▁` of a `legacy=True` tokenizer, except before a space, and loses that of a
    `legacy=False` one; there a normaliser writes it, for which the token has to be matched in normalised text.

    Raises:
        ConfigError: even so the ids would not be those of training.
    """
    from tokenizers import AddedToken, Tokenizer

    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if IMAGE_MARK in known and _continues_as_trained(backend):
        return backend
    backend.add_special_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)])
    for before in (None, *WORD_START_BEFORE):
        edited = Tokenizer.from_str(_edited(backend, before))
        if _continues_as_trained(edited):
            return edited
    raise ConfigError(
        f"this tokenizer tokenises text after {IMAGE_MARK} neither as a text of its own nor as one that lacks its "
        f"{WORD_START}; an export of it would not answer as the model was trained."
    )


def _edited(backend: Any, before: str | None) -> str:
    """With `<image>` as a special token, and a `▁` behind it where what follows is `before`, unless that is None."""
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["content"] == IMAGE_MARK:
            token.update(special=True, normalized=before is not None, lstrip=False, rstrip=False, single_word=False)
    if before is not None:
        # The last of a row of image tokens, unless the text ends there.
        pattern = {"Regex": rf"{IMAGE_MARK}(?!{IMAGE_MARK})(?={before})"}
        rule = {"type": "Replace", "pattern": pattern, "content": IMAGE_MARK + WORD_START}
        existing = [content["normalizer"]] if content["normalizer"] else []
        content["normalizer"] = {"type": "Sequence", "normalizers": [rule, *existing]}
    return json.dumps(content, ensure_ascii=False)


def _continues_as_trained(backend: Any) -> bool:
    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    def trained(text: str) -> list[int]:
        """As `data.tokens` tokenises a text of its own: with the space that some tokenizers take for their `▁`."""
        return ids(f" {text}" if text.startswith(" ") and ids(" a") == ids("a") else text)

    image = backend.token_to_id(IMAGE_MARK)
    texts = ("\na", "a", " a", "")
    return all(ids(f"a{IMAGE_MARK * 2}{text}") == [*ids("a"), image, image, *trained(text)] for text in texts)
