"""Opens the tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_core.errors import WeightsError
from llava_core.weights.internlm2_tokenizer import CLASSES, load_internlm2_tokenizer

PLAIN_CLASS = "TokenizersBackend"
"""What `tokenizer_class` says of a tokenizer that is all in its tokenizer.json, as an export's; AutoTokenizer would ask
config.json too, and warn of models that transformers does not know."""


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, without asking any hub and without running code from the folder.

    Raises:
        WeightsError: the folder has none that can be read.
    """
    try:
        _check_kind(folder / "tokenizer.json")
        config = _tokenizer_config(folder)
        if config.get("tokenizer_class") in CLASSES:
            return load_internlm2_tokenizer(folder, config)
        if config.get("tokenizer_class") == PLAIN_CLASS:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} has no tokenizer that can be read: {error}") from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _check_kind(file: Path) -> None:
    """Whether a `tokenizer.json`, if there is one, is what its name says."""
    if not file.is_file():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    has = found if isinstance(found, dict) else {}
    if not isinstance(has.get("model"), dict) or not isinstance(has.get("added_tokens"), list):
        keys = sorted(has) if has else type(found).__name__
        raise WeightsError(
            f"{file} is no tokenizer of the tokenizers library: expected an object with `model` and `added_tokens`, "
            f"found {keys}. Download it again, or remove it if the folder has a tokenizer.model."
        )


def pad_token_id(tokenizer: Any, vocab_size: int) -> int:
    """The id that fills image slots and padding: pad, else unk (the original LLaVA's choice), else eos.

    What stands there is never read, but its embedding is looked up, so that it must have one.
    """
    for name in ("pad_token_id", "unk_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name)
        if token_id is not None and token_id < vocab_size:
            return int(token_id)
    raise WeightsError(
        f"the tokenizer has no pad, unk or eos token below {vocab_size}, so nothing can fill image slots."
    )
