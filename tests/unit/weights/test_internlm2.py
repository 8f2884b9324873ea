"""InternLM2 folders beside the Llama that they are: transformers' own, spelt by rules that the tests write anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava_core.backend import OpSet
from llava_core.data.records import Turn
from llava_core.data.templates import V1
from llava_core.errors import WeightsError
from llava_core.inference.assistant import Assistant
from llava_core.model.llava import Llava
from llava_core.model.spec import RopeSpec
from llava_core.testing.models import random_example, save_folder, tiny_llava_config, tiny_model, tiny_vision_config
from llava_core.weights.convert import convert
from llava_core.weights.export import export_model
from llava_core.weights.load import load_model
from llava_core.weights.rows import Rows
from llava_core.weights.source import ModelSource, compose, from_folder
from llava_core.weights.tokenizer import load_tokenizer
from tests.parity.support import build_examples_batch, run_hf
from tests.unit.inference.support import picture, processor
from tests.unit.weights.internlm2_folder import (
    CODE,
    internlm2_config,
    internlm2_tensors,
    llama,
    save_internlm2,
    save_tokenizer,
)

HOST = torch.device("cpu")

# fp32, logits of unit scale; sums of at most 80 terms in another order.
TOLERANCE = 2e-5


def load(source: ModelSource, **options: Any) -> Llava:
    return load_model(source, OpSet.of({}), compute_dtype=torch.float32, device=HOST, **options)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_internlm2(llama(), tmp_path / "internlm2")


# ---- loading


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_the_llama_that_it_was_written_from(kv_heads: int, tmp_path: Path) -> None:
    """Up to its last position, beyond which transformers' dynamic rope begins to scale."""
    reference = llama(kv_heads, max_position_embeddings=17)
    model = load(from_folder(save_internlm2(reference, tmp_path)))
    assert model.spec.text.rope == RopeSpec(1e6, "dynamic", factor=2.0)
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(f"language_model.{name}"), parameter), name
    examples = [random_example(model.spec, lengths, seed=i) for i, lengths in enumerate(((17,), (5,)))]
    expected, *_ = run_hf(reference, examples)
    with torch.no_grad():
        for example, logits in zip(examples, expected, strict=True):
            ours = model.logits(
                model.hidden_states(build_examples_batch(model.spec, [example]).to(torch.device("cpu")))
            )
            torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=0)


def test_training_never_writes_to_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load(from_folder(folder), trainable=frozenset({"language"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


class Recorded:
    """A matrix that notes which of its rows are asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.asked: list[int] = []

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        self.asked += range(len(self.matrix))[index[0]]
        return self.matrix[index]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    gap=st.integers(0, 3),
    cut=st.tuples(*[st.integers(0, 24)] * 2, *[st.integers(0, 3)] * 2),
)
@settings(max_examples=200)
def test_a_slice_of_rows_reads_these_rows_alone(lengths: list[int], gap: int, cut: tuple[int, int, int, int]) -> None:
    starts = [sum(lengths[:i]) + i * gap for i in range(len(lengths))]
    runs = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    whole = torch.arange(3.0 * 40).reshape(40, 3)
    chosen = [row for run in runs for row in run]
    recorded = Recorded(whole)
    rows = Rows(recorded, runs)
    index = slice(*sorted(cut[:2])), slice(*sorted(cut[2:]))
    assert rows.shape == (len(chosen), 3)
    assert torch.equal(rows[index], whole[chosen][index])
    assert recorded.asked == chosen[index[0]]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": True}, "bias = True: attention biases are not implemented"),
        ({"bias": None}, "does not say bias: the defaults are in code, which is not run"),
        ({"rms_norm_eps": None, "rope_theta": None}, "does not say rms_norm_eps, rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not implemented"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    ],
)
def test_a_config_is_refused_by_key(changes: dict[str, Any], said: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(WeightsError) as raised:
        from_folder(folder)
    assert said in str(raised.value)
    assert str(folder) in str(raised.value)


def test_a_fused_matrix_of_another_height_is_refused(folder: Path) -> None:
    edit(folder, num_key_value_heads=4)
    with pytest.raises(WeightsError, match=r"0\.attention\.wqkv\.weight has the shape \(128, 64\); expected 192 rows"):
        load(from_folder(folder))


def test_names_that_are_missing_or_too_many_are_listed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.attention.wqkv.bias"] = torch.zeros(128)
    del tensors["output.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as raised:
        load(from_folder(folder))
    assert str(raised.value).splitlines()[1:] == [
        "  missing (1): language_model.lm_head.weight",
        "  unexpected (1): language_model.model.layers.1.attention.wqkv.bias",
    ]


# ---- exports


def test_an_export_is_the_folder_again(folder: Path, tmp_path: Path) -> None:
    """Its names, its bits, its config's keys, its code; never run. 400 rows hold every token."""
    source = from_folder(folder)
    tokenizer = load_tokenizer(folder)
    out = tmp_path / "out"
    export_model(load(source), tokenizer, None, V1, out, dtype=torch.float32, remote=source.remote)
    written, expected = load_file(out / "model.safetensors"), internlm2_tensors(llama())
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    config, found = json.loads((out / "config.json").read_text()), internlm2_config(llama())
    assert {key: config[key] for key in found} == found | {"transformers_version": config["transformers_version"]}
    assert config.keys() - found.keys() == {"exported_by"}
    for module in ("configuration_internlm2.py", "modeling_internlm2.py"):
        assert (out / module).read_text() == CODE
    again = from_folder(out)
    assert again.spec == source.spec
    assert load_tokenizer(out)("<|im_start|>a cat")["input_ids"] == tokenizer("<|im_start|>a cat")["input_ids"]


def test_as_a_llama_transformers_loads_it_and_it_comes_back(folder: Path, tmp_path: Path) -> None:
    reference = llama()
    as_llama = convert(folder, tmp_path / "llama", "llama")
    loaded, info = AutoModelForCausalLM.from_pretrained(as_llama, output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in reference.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert loaded.config.rope_parameters["rope_type"] == "dynamic"
    ids = AutoTokenizer.from_pretrained(as_llama)("<|im_start|>user\na cat<|im_end|>")["input_ids"]
    assert ids == load_tokenizer(folder)("<|im_start|>user\na cat<|im_end|>")["input_ids"]
    back = load_file(convert(as_llama, tmp_path / "back", "internlm2") / "model.safetensors")
    expected = internlm2_tensors(reference)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_bf16_stays_bf16(folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in internlm2_tensors(llama()).items()}
    save_file(tensors, folder / "model.safetensors")
    written = load_file(convert(folder, tmp_path / "llama", "llama") / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.0.feed_forward.w3.weight"])


def test_what_internlm2_cannot_spell_is_refused(tmp_path: Path) -> None:
    wide = save_folder(llama(head_dim=24), tmp_path / "wide")
    save_tokenizer(wide)
    with pytest.raises(WeightsError, match="4 heads of 24 are not hidden_size 64"):
        convert(wide, tmp_path / "out", "internlm2")
    whole = save_folder(tiny_model(tiny_llava_config()), tmp_path / "llava")
    with pytest.raises(WeightsError, match="is a LLaVA"):
        convert(whole, tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


# ---- a composed LLaVA


def parts(folder: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    vision = save_folder(tiny_model(tiny_vision_config(), seed=2), tmp_path / "clip")
    options = {"projector_type": "mlp2x_gelu", "feature_layer": -2, "feature_select": "default"}
    return {"vision": vision, "language": folder, "projector": None, **options, **changes}


def xtuner_projector(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """As `ProjectorModel.save_pretrained` writes it: linear layers 0 and 2 of a Sequential called `model`."""
    folder.mkdir()
    shapes = {"model.0.weight": (64, 32), "model.0.bias": (64,), "model.2.weight": (64, 64), "model.2.bias": (64,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "projector", "depth": 2, "hidden_act": "gelu", "bias": True}
    sizes = {"visual_hidden_size": 32, "llm_hidden_size": 64, "architectures": ["ProjectorModel"]}
    (folder / "config.json").write_text(json.dumps(config | sizes | changes))
    return tensors


def test_xtuners_projector_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = xtuner_projector(tmp_path / "projector")
    model = load(compose(**parts(folder, tmp_path, projector=tmp_path / "projector")))
    for ours, theirs in (("linear_1", "model.0"), ("linear_2", "model.2")):
        for kind in ("weight", "bias"):
            found = model.multi_modal_projector.get_parameter(f"{ours}.{kind}")
            assert torch.equal(found, tensors[f"{theirs}.{kind}"])


@pytest.mark.parametrize(("key", "value"), [("depth", 3), ("hidden_act", "silu"), ("bias", False)])
def test_a_projector_that_computes_something_else_is_refused(
    key: str, value: object, folder: Path, tmp_path: Path
) -> None:
    xtuner_projector(tmp_path / "projector", **{key: value})
    with pytest.raises(WeightsError, match=f"{key} = {value!r} is not implemented"):
        compose(**parts(folder, tmp_path, projector=tmp_path / "projector"))


def test_a_llava_with_it_is_exported_as_one_that_transformers_loads(folder: Path, tmp_path: Path) -> None:
    model = load(compose(**parts(folder, tmp_path)))
    tokenizer = load_tokenizer(folder)
    out = export_model(model, tokenizer, processor(), V1, tmp_path / "out", dtype=torch.float32)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.text_config.model_type == "llama"
    turns = (Turn("human", "<image>\nWhat is this?"),)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What is this?"}]}
    ]
    inputs = AutoProcessor.from_pretrained(out).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    example = Assistant(model, tokenizer, processor(), V1).build_example("prompt", turns, [picture()])
    with torch.no_grad():
        expected = loaded(**inputs).logits[0]
        ours = model.logits(model.hidden_states(build_examples_batch(model.spec, [example]).to(HOST)))
    torch.testing.assert_close(ours, expected[:, : ours.shape[1]], atol=TOLERANCE, rtol=0)


# ---- the tokenizer

TEXTS = ["What is this?", " leading", "  two  spaces ", "a\nb\n\n", "日本語 ünïcode 🙂", "12 345", "x" * 9, " ", ""]


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_it_tokenises_as_sentencepiece_does(dummy_prefix: bool, tmp_path: Path) -> None:
    expected = save_tokenizer(tmp_path, dummy_prefix=dummy_prefix)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = expected.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer(text)["input_ids"] == [1, *ids]
        assert tokenizer.decode(ids) == expected.decode(ids)


def test_pieces_have_the_names_that_the_config_gives_them(tmp_path: Path) -> None:
    pieces = save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert [pieces.id_to_piece(i) for i in (3, 4)] == ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
    said = [{"role": "user", "content": "a cat"}]
    expected = [1, 4, *pieces.encode("user\na cat"), 3, *pieces.encode("\n"), 4, *pieces.encode("assistant\n")]
    assert tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"] == expected
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 2, 0)


def test_a_tokenizer_json_is_taken_before_the_pieces(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    first = load_tokenizer(tmp_path)
    first.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").unlink()
    assert load_tokenizer(tmp_path)("<|im_start|> a cat")["input_ids"] == first("<|im_start|> a cat")["input_ids"]


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["99999"] = config["added_tokens_decoder"]["3"] | {"content": "<|far|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"adds tokens that its tokenizer has elsewhere: \{'<\|far\|>': 99999\}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(WeightsError, match=r"tokenizer\.model is no sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(WeightsError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
