"""Opens the tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llava_core.errors import WeightsError


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, without asking any hub and without running code from the folder.

    Raises:
        WeightsError: the folder has none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder} has no tokenizer that can be read: {error}") from error


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills image slots and padding: pad, else unk (the original LLaVA's choice), else eos."""
    for name in ("pad_token_id", "unk_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name)
        if token_id is not None:
            return int(token_id)
    raise WeightsError("the tokenizer has no pad, unk or eos token, so nothing can fill image slots.")
