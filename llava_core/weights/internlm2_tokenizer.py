"""The tokenizer of an InternLM2 folder, whose class is code in the folder and is not run.

What that code does is little: sentencepiece's BPE, some of whose pieces `tokenizer_config.json` gives other names
(`[UNUSED_TOKEN_145]` is `<|im_start|>`), and a BOS. Source: tokenization_internlm2_fast.py of
InternLM/internlm2-chat-20b; of sentencepiece, src/sentencepiece_model.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.errors import WeightsError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
"""What `tokenizer_class` says in such folders."""

DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
BPE_MODEL, CONTROL, USER_DEFINED = 2, 3, 4
"""Numbers of sentencepiece's: a model's type, and types of pieces."""


def load_internlm2_tokenizer(folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of `folder`, whose `tokenizer_config.json` is `config`; of `tokenizer.json` where there is one.

    Raises:
        WeightsError: neither file is there, or they do not fit the config.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    added = _added_tokens(config)
    if whole.is_file():
        backend = Tokenizer.from_file(str(whole))
    elif pieces.is_file():
        backend = _from_sentencepiece(pieces, added)
    else:
        raise WeightsError(f"{folder} has neither tokenizer.json nor tokenizer.model. Is the download complete?")
    wrong = {token.content: index for index, token in added.items() if backend.token_to_id(token.content) != index}
    if wrong:
        raise WeightsError(f"{folder}: tokenizer_config.json adds tokens that its tokenizer has elsewhere: {wrong}.")
    marks = {name: str(_content(config.get(name) or default)) for name, default in DEFAULTS.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=config.get("add_bos_token", True),
        add_eos_token=config.get("add_eos_token", False),
        model_max_length=config.get("model_max_length"),
        chat_template=config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **marks,
    )


def _added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    from tokenizers import AddedToken

    found = config.get("added_tokens_decoder") or {}
    return {int(index): AddedToken(**token) for index, token in sorted(found.items(), key=lambda item: int(item[0]))}


def _content(token: Any) -> Any:
    """A special token as text; some configs write an object."""
    return token["content"] if isinstance(token, Mapping) else token


def _from_sentencepiece(file: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = _read(file)
    names = [added[index].content if index in added else piece.piece for index, piece in enumerate(proto.pieces)]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = _merges(vocabulary, [piece.score for piece in proto.pieces])
    unk = names[proto.trainer_spec.unk_id]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(text)
    for index, piece in enumerate(proto.pieces):
        if index not in added and piece.type in (CONTROL, USER_DEFINED):
            token = AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            tokenizer.add_tokens([token])
    for token in added.values():
        tokenizer.add_tokens([token])
    return tokenizer


def _read(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made at run time
    try:
        proto = messages.ModelProto.FromString(file.read_bytes())
    except DecodeError as error:
        raise WeightsError(f"{file} is no sentencepiece model: {error}. Is the download complete?") from error
    if proto.trainer_spec.model_type != BPE_MODEL:
        raise WeightsError(f"{file} is no BPE model but type {proto.trainer_spec.model_type} of sentencepiece's.")
    if proto.normalizer_spec.precompiled_charsmap:
        raise WeightsError(f"{file} rewrites characters ({proto.normalizer_spec.name}), which is not implemented.")
    return proto


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best first; a piece's own pairs by where they were learnt."""
    found = []
    for piece, index in vocabulary.items():
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        found += [(-scores[index], index, vocabulary[left], vocabulary[right], (left, right)) for left, right in pairs]
    return [pair for *_, pair in sorted(found)]
