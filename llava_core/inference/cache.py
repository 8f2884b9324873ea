"""The key-value cache of generation.

Shapes: B rows, T packed prompt tokens, L decoder layers, C capacity, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_core.backend import MaskSpec
from llava_core.model.spec import TextSpec


class Cache:
    """Keys and values of a batch of rows whose prompts end in the same column.

    The prompts come as one packed batch, the form of training, and attend to each other's nothing there; their keys and
    values are stored aligned at their ends. Each later call brings one token a row and attends to the row's columns,
    so that distance in columns is distance in tokens. A row's columns before its prompt are never attended to, and no
    query is without a key: it sees at least itself.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: how many tokens may follow the longest prompt.
    """

    def __init__(
        self, spec: TextSpec, lengths: Sequence[int], max_new_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        longest = max(lengths)
        shape = (len(lengths), longest + max_new_tokens, spec.num_kv_heads, spec.head_dim)
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self._window = spec.sliding_window
        columns = torch.arange(shape[1])
        starts = longest - torch.tensor(lengths)
        valid = columns >= starts[:, None]
        self._valid = None if min(lengths) == longest else valid.to(device)
        # Where each packed token goes in the buffer seen as [B·C]: row by row, the prompt's columns.
        self._slots = (valid & (columns < longest)).flatten().nonzero()[:, 0].to(device)
        self._prompt_columns = longest
        self._columns = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's k and v: [1, T, G, H] of the packed prompts first, then [B, 1, G, H] of each new token."""
        keys, values = self._keys[layer], self._values[layer]
        if self._columns == 0:
            keys.flatten(0, 1).index_copy_(0, self._slots, k[0])
            values.flatten(0, 1).index_copy_(0, self._slots, v[0])
            return k, v
        end = self._columns + 1
        keys[:, self._columns], values[:, self._columns] = k[:, 0], v[:, 0]
        return keys[:, :end], values[:, :end]

    def advance(self) -> None:
        """Say that every layer has stored the prompts, or the new token of each row."""
        self._columns = self._columns + 1 if self._columns else self._prompt_columns

    @property
    def mask(self) -> MaskSpec:
        """What the next token's query of each row attends to: [B, columns so far + itself]."""
        valid = None if self._valid is None else self._valid[:, : self._columns + 1]
        return MaskSpec.dense(causal=True, window=self._window, key_valid=valid)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` [K] int64."""
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer.index_select(0, rows)
        if self._valid is not None:
            self._valid = self._valid.index_select(0, rows)
