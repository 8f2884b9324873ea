"""The cache against the whole packed forward, fed the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_core.data.packing import build_batch
from llava_core.inference.cache import Cache
from llava_core.testing.models import random_example
from tests.hardware import hardware
from tests.unit.inference.support import parts

NEW = 6


@pytest.mark.device
@pytest.mark.parametrize("lengths", [(9, 4, 14), (7, 7), (3,)])
@pytest.mark.parametrize("case", ["text_llama", "text_mistral"])
def test_decoding_gives_the_hidden_states_of_the_whole(case: str, lengths: tuple[int, ...]) -> None:
    model = parts(case).model  # the Mistral's window is 5: shorter than most prompts
    whole = [random_example(model.spec, (length + NEW,), seed=length) for length in lengths]
    prompts = [
        replace(e, tokens=e.tokens[:n], supervised=e.supervised[:n]) for e, n in zip(whole, lengths, strict=True)
    ]
    device = hardware().device
    cache = Cache(model.spec.text, lengths, NEW, torch.float32, device)
    with torch.no_grad():
        packed = build_batch(whole, pad_id=0, image_size=1).to(device)
        expected = model.hidden_states(packed).split([n + NEW for n in lengths])
        batch = build_batch(prompts, pad_id=0, image_size=1).to(device)
        hidden = model.hidden_states(batch, batch.cu_seqlens[1:].long() - 1, cache)
        cache.advance()
        rows = list(range(len(lengths)))
        for step in range(NEW):
            for index, row in enumerate(rows):
                # fp32, sums of at most 80 terms in another order
                torch.testing.assert_close(hidden[index], expected[row][lengths[row] + step - 1], atol=2e-5, rtol=0)
            if step == 2 and len(rows) > 2:
                rows = [0, 2]
                cache.keep(torch.tensor(rows, device=device))
            tokens = torch.tensor([[whole[row].tokens[lengths[row] + step]] for row in rows], device=device)
            positions = torch.tensor([[lengths[row] + step] for row in rows], device=device)
            hidden = model.language_model.model(model.embed(tokens), positions, cache.mask, cache)[:, 0]
            cache.advance()


@pytest.mark.device
def test_every_query_sees_itself() -> None:
    spec = parts("text_mistral").spec.text
    cache = Cache(spec, (2, 12), 3, torch.float32, hardware().device)
    k = torch.zeros(1, 14, spec.num_kv_heads, spec.head_dim, device=hardware().device)
    for layer in range(spec.num_layers):
        cache.append(layer, k, k)
    for _ in range(3):
        cache.advance()
        valid = cache.mask.key_valid
        assert valid is not None
        assert valid[:, -1].all()
        assert valid.sum(1).tolist() == [valid.shape[1] - 10, valid.shape[1]]


def test_rows_of_one_length_need_no_padding_mask() -> None:
    spec = parts("text_llama").spec.text
    assert Cache(spec, (4, 4), 3, torch.float32, hardware().device).mask.key_valid is None
