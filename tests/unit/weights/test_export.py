"""Exports against transformers, which loads them and must answer alike, and against this library's own reader."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from llava_core.backend import OpSet
from llava_core.data.chat_template import tokenizer_template
from llava_core.data.conversation import Span, join_spans
from llava_core.data.packing import build_batch
from llava_core.data.piece_template import parse_template
from llava_core.data.records import Turn
from llava_core.data.templates import BUILTIN_TEMPLATES, V1, Template
from llava_core.data.tiles import DynamicTiles
from llava_core.data.tokens import encode_whole
from llava_core.errors import ConfigError, WeightsError
from llava_core.inference.assistant import Assistant
from llava_core.inference.chat_template import folder_template
from llava_core.model.llava import Llava
from llava_core.weights import export
from llava_core.weights.chat_templates import chat_template
from llava_core.weights.export import export_model
from llava_core.weights.load import load_model
from llava_core.weights.processor import load_processor
from llava_core.weights.shards import TensorToWrite, write_weights
from llava_core.weights.source import from_folder
from llava_core.weights.vocabulary import grown, stop_ids
from tests.hardware import hardware
from tests.parity.support import ours_name
from tests.unit.inference.support import CONFIGS, VOCAB_SIZE, Parts, parts, picture, processor, tokenizer

LLAVAS = [case for case in CONFIGS if not case.startswith("text")]
TEXTS = [case for case in CONFIGS if case.startswith("text")]
IMAGE_TURN = (Turn("human", "<image>\nWhat is this?"),)
TURNS = (
    Turn("human", "<image>\nWhat is this?"),
    Turn("assistant", "A cat."),
    Turn("human", " Is it\nblack? "),
    Turn("assistant", "No"),
)
TALK = r"""
start: ["'{}' \"\\ {{ messages }} {% raw %}\n"]
first_human: ["Q1:", "{text}|é▁"]
human: ["Q:", "{text}|"]
assistant: ["A:", {train: "{text}"}, {train: "#"}, "\n"]
strip: true
needs_question: true
"""
# fp32, unit-scale logits, sums of at most 200 terms in another order.
LOGIT_TOLERANCE = 2e-5


def run_export(folder: Path, case: str = "clip", template: Template = V1, **options: Any) -> Path:
    source = parts(case, options.get("projector", "mlp2x_gelu"))
    image_processor = processor(options.get("aspect", "square")) if source.spec.vision else None
    tok = options.get("tokenizer", tokenizer(options.get("kind", "plain")))
    return export_model(source.model, tok, image_processor, template, folder, dtype=options.get("dtype", torch.float32))


def read_back(folder: Path, dtype: torch.dtype = torch.float32) -> Llava:
    return load_model(from_folder(folder), OpSet.of({}), compute_dtype=dtype, device=hardware().device)


def our_logits(model: Llava, example: Any) -> torch.Tensor:
    """On the host."""
    size = model.spec.vision.image_size if model.spec.vision else 1
    batch = build_batch([example], pad_id=0, image_size=size).to(hardware().device)
    with torch.no_grad():
        return model.logits(model.hidden_states(batch)).cpu()


def our_prompt(source: Parts, tok: Any, template: Template, turns: tuple[Turn, ...], images: list[Any], **options: Any):
    image_processor = processor(options.get("aspect", "square")) if source.spec.vision else None
    assistant = Assistant(source.model, tok, image_processor, template)
    return assistant.build_example("prompt", turns, images)


@pytest.mark.device
@pytest.mark.parametrize("case", LLAVAS)
def test_transformers_loads_an_export_and_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    source = parts(case)
    folder = run_export(tmp_path / "hf", case)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages(IMAGE_TURN, picture()),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = loaded(**inputs).logits[0]
        text_only = loaded(input_ids=inputs["input_ids"][:, :20]).logits[0]
    example = our_prompt(source, tokenizer(), V1, IMAGE_TURN, [picture()])
    ours = our_logits(source.model, example)
    assert expected.std() > 0.5  # else the tolerance would mean little
    torch.testing.assert_close(ours, expected[:, :VOCAB_SIZE], atol=LOGIT_TOLERANCE, rtol=0)
    text = our_prompt(source, tokenizer(), V1, (Turn("human", "What?"),), [])
    assert torch.equal(text.tokens[:20], inputs["input_ids"][0, :20])
    torch.testing.assert_close(
        our_logits(source.model, text)[:20], text_only[:, :VOCAB_SIZE], atol=LOGIT_TOLERANCE, rtol=0
    )


@pytest.mark.device
@pytest.mark.parametrize("case", TEXTS)
def test_a_language_model_is_exported_as_one(case: str, tmp_path: Path) -> None:
    source = parts(case)
    folder = run_export(tmp_path / "hf", case)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    turns = (Turn("human", "What is this?"),)
    tok = AutoTokenizer.from_pretrained(folder)
    ids = tok.apply_chat_template(messages(turns), add_generation_prompt=True, return_tensors="pt")["input_ids"]
    example = our_prompt(source, tokenizer(), V1, turns, [])
    assert torch.equal(ids[0], example.tokens)  # BOS included
    with torch.no_grad():
        expected = loaded(ids).logits[0]
    torch.testing.assert_close(our_logits(source.model, example), expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.device
@pytest.mark.parametrize("case", list(CONFIGS))
def test_our_reader_reads_the_same_weights(case: str, tmp_path: Path) -> None:
    source = parts(case)
    back = read_back(run_export(tmp_path / "hf", case))
    assert back.spec.text.rope == source.spec.text.rope
    assert back.spec.vision == source.spec.vision
    reread, original = dict(back.named_parameters()), dict(source.model.named_parameters())
    assert list(reread) == list(original)
    for name, parameter in original.items():
        assert torch.equal(reread[name][: len(parameter)], parameter), name


@pytest.mark.parametrize(("case", "projector"), [("clip", "linear"), ("clip", "mlp3x_gelu"), ("wide", "identity")])
def test_a_projector_of_our_own_is_read_back_and_refused_by_transformers(
    case: str, projector: str, tmp_path: Path
) -> None:
    folder = run_export(tmp_path / "hf", case, projector=projector)
    back = read_back(folder)
    assert back.spec.projector == projector
    for name, parameter in parts(case, projector).model.multi_modal_projector.named_parameters():
        assert torch.equal(back.multi_modal_projector.get_parameter(name), parameter)
    with pytest.raises(KeyError, match=projector):
        LlavaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("kind", ["legacy", "plain", "llama_3"])
@pytest.mark.parametrize("name", list(BUILTIN_TEMPLATES))
def test_the_processor_gives_our_ids_and_pixels(name: str, kind: str, aspect: str, tmp_path: Path) -> None:
    template, turns = BUILTIN_TEMPLATES[name], IMAGE_TURN
    folder = run_export(tmp_path / "hf", template=template, kind=kind, aspect=aspect)
    loaded = AutoProcessor.from_pretrained(folder)
    example = our_prompt(parts("clip"), tokenizer(kind), template, turns, [picture()], aspect=aspect)
    text = loaded.apply_chat_template(messages(turns), add_generation_prompt=True)
    two_steps = loaded(images=picture(), text=text, return_tensors="pt")
    one_step = loaded.apply_chat_template(
        messages(turns, picture()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for inputs in (two_steps, one_step):
        assert torch.equal(without_images(inputs["input_ids"][0], loaded.image_token_id), without_slots(example))
        assert (inputs["input_ids"][0] == loaded.image_token_id).nonzero()[0] == example.image_starts[0]
        assert (inputs["input_ids"] == loaded.image_token_id).sum() == sum(example.visual_tokens)
        assert torch.equal(inputs["pixel_values"], example.pixels)


@pytest.mark.parametrize("kind", ["legacy", "plain", "llama_3"])
@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_the_processor_of_tiles_gives_our_ids_pixels_and_logits(case: str, kind: str, tmp_path: Path) -> None:
    source = parts(case)
    tiled = replace(processor("square"), resize=(24, 24), crop=None, tiling=DynamicTiles(1, 6))
    folder = export_model(source.model, tokenizer(kind), tiled, V1, tmp_path / "hf", dtype=torch.float32)
    assert load_processor(folder, source.spec) == tiled
    example = Assistant(source.model, tokenizer(kind), tiled, V1).build_example("prompt", IMAGE_TURN, [picture()])
    assert example.pixels is not None
    assert example.visual_tokens == (len(example.pixels) * 9,) != (9,)
    loaded = AutoProcessor.from_pretrained(folder)
    inputs = loaded.apply_chat_template(
        messages(IMAGE_TURN, picture()),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(without_images(inputs["input_ids"][0], loaded.image_token_id), without_slots(example))
    assert (inputs["input_ids"] == loaded.image_token_id).sum() == sum(example.visual_tokens)
    assert torch.equal(inputs["pixel_values"], example.pixels)
    with torch.no_grad():
        logits = LlavaForConditionalGeneration.from_pretrained(folder)(**inputs).logits[0, :, :VOCAB_SIZE]
    if kind == "plain":  # the vocabulary of the model's own size
        torch.testing.assert_close(our_logits(source.model, example), logits, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["legacy", "plain"])
def test_text_after_an_image_starts_with_a_word_mark_wherever_it_comes_from(kind: str, tmp_path: Path) -> None:
    """One more where a space follows, as sentencepiece has it and so the training."""
    folder = run_export(tmp_path / "hf", kind=kind)
    loaded, trained = AutoTokenizer.from_pretrained(folder), tokenizer(kind)
    image = loaded.convert_tokens_to_ids("<image>")
    for text in ("<image>\nWhat</s>USER: a", "a<image> b", "<image>", "a <image>b\n<image>\nc", "<image>  b"):
        conversation = join_spans([Span(text, False)], adds_bos=False)
        visual_tokens = [1] * conversation.num_images
        expected = encode_whole(conversation, trained, visual_tokens=visual_tokens, pad_id=image)
        assert loaded(text, add_special_tokens=False)["input_ids"] == expected.tokens.tolist()


@pytest.mark.parametrize("name", list(BUILTIN_TEMPLATES))
def test_the_chat_template_writes_the_training_text(name: str, tmp_path: Path) -> None:
    template = BUILTIN_TEMPLATES[name]
    turns = TURNS[:2] if name == "plain" else TURNS
    loaded = AutoProcessor.from_pretrained(run_export(tmp_path / "hf", template=template))
    assert loaded.apply_chat_template(messages(turns)) == template.render(turns).text
    strings = [{"role": m["role"], "content": t.text} for m, t in zip(messages(turns), turns, strict=True)]
    assert loaded.tokenizer.apply_chat_template(strings, tokenize=False) == template.render(turns).text
    for end in (1,) if name == "plain" else (1, 3):
        prompt = loaded.apply_chat_template(messages(turns[:end]), add_generation_prompt=True)
        assert prompt == template.prompt(turns[:end]).text
    leading = (Turn("assistant", "Hello"), *turns)
    assert loaded.apply_chat_template(messages(leading)) == template.render(leading).text


def test_empty_messages_are_written_as_in_training(tmp_path: Path) -> None:
    turns = (Turn("human", "a"), Turn("assistant", ""), Turn("human", ""), Turn("assistant", "b"))
    for name in ("v1", "llama_2", "chatml", "llama_3", "mistral"):
        source = chat_template(BUILTIN_TEMPLATES[name], multimodal=True, bos="")
        tok = AutoTokenizer.from_pretrained(run_export(tmp_path / name, template=BUILTIN_TEMPLATES[name]))
        strings = [{"role": m["role"], "content": t.text} for m, t in zip(messages(turns), turns, strict=True)]
        assert tok.chat_template == source
        assert tok.apply_chat_template(strings, tokenize=False) == BUILTIN_TEMPLATES[name].render(turns).text


def test_a_template_files_chat_template_writes_its_text(tmp_path: Path) -> None:
    template = parse_template(TALK, "talk", "talk.yaml")
    tok = AutoTokenizer.from_pretrained(run_export(tmp_path / "hf", template=template))
    for said in (("a", " b "), ("a", "b", "", "", "c", "{text}")):
        turns = tuple(Turn(("human", "assistant")[i % 2], text) for i, text in enumerate(said))
        strings = [{"role": m["role"], "content": t.text} for m, t in zip(messages(turns), turns, strict=True)]
        assert tok.apply_chat_template(strings, tokenize=False) == template.render(turns).text
        prompt = tok.apply_chat_template(strings[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt == template.prompt(turns[:-1]).text
    with pytest.raises(TemplateError, match="needs words or an image"):
        tok.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)


@pytest.mark.parametrize("kind", ["legacy", "plain"])
@pytest.mark.parametrize(
    "changes",
    [
        {"image": "<im_start><image><im_end>"},
        {"after_image": " USER: "},
        {"after_image": None},
        {"image": "[<image>'\"]", "after_image": None},
    ],
)
def test_images_are_asked_as_they_were_trained(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """By transformers' processor, and by the folder's own chat template, of which an export is made in turn."""
    template = replace(V1, **changes)
    folder = run_export(tmp_path / "hf", template=template, kind=kind)
    loaded = AutoProcessor.from_pretrained(folder)
    own = folder_template(folder, AutoTokenizer.from_pretrained(folder), multimodal=True)
    again = chat_template(own, multimodal=True, bos="")
    for question in ("<image>\nWhat is this?", "What is\n<image>", "What is <image>, that?", " Why? "):
        turns = (Turn("human", question), Turn("assistant", "A cat."), Turn("human", "And?"))
        strings = [{"role": m["role"], "content": t.text} for m, t in zip(messages(turns), turns, strict=True)]
        text = loaded.tokenizer.apply_chat_template(strings, tokenize=False, add_generation_prompt=True)
        assert text == template.prompt(turns).text == own.prompt(turns).text
        assert text == loaded.tokenizer.apply_chat_template(
            strings, chat_template=again, tokenize=False, add_generation_prompt=True
        )
        images = [picture()] * ("<image>" in question)
        example = our_prompt(parts("clip"), tokenizer(kind), template, turns, images)
        inputs = loaded(images=picture() if images else None, text=text, return_tensors="pt")
        assert torch.equal(without_images(inputs["input_ids"][0], loaded.image_token_id), without_slots(example))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], "alternate"),
        ([{"role": "user", "content": "<image> or <image>?"}], "at most one image"),
        ([{"role": "user", "content": [{"type": "video"}]}], "video"),
    ],
)
def test_the_chat_template_refuses_what_training_never_had(content: Any, message: str, tmp_path: Path) -> None:
    tok = AutoTokenizer.from_pretrained(run_export(tmp_path / "hf"))
    with pytest.raises(TemplateError, match=message):
        tok.apply_chat_template(content, tokenize=False)


def test_a_tokenizers_own_chat_template_is_kept_and_learns_to_take_images(tmp_path: Path) -> None:
    tok = tokenizer("llama_3")
    template = tokenizer_template(tok)
    loaded = AutoProcessor.from_pretrained(run_export(tmp_path / "hf", template=template, kind="llama_3"))
    assert loaded.chat_template.endswith(tok.chat_template)
    assert loaded.apply_chat_template(messages(TURNS)) == template.render(TURNS).text
    inputs = loaded.apply_chat_template(
        messages(IMAGE_TURN, picture()),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    example = our_prompt(parts("clip"), tok, template, IMAGE_TURN, [picture()])
    assert torch.equal(without_images(inputs["input_ids"][0], loaded.image_token_id), without_slots(example))
    text_only = run_export(tmp_path / "text", "text_llama", template=template, kind="llama_3")
    assert AutoTokenizer.from_pretrained(text_only).chat_template == tok.chat_template


def test_a_plugins_template_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Custom(Template):
        def _spans(self, turns: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="custom"):
        run_export(tmp_path / "hf", template=Custom(name="custom", stop=()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.device
def test_the_vocabulary_grows_for_the_image_token(tmp_path: Path) -> None:
    tok = tokenizer()
    assert len(tok) == VOCAB_SIZE
    assert "<image>" not in tok.get_vocab()
    folder = run_export(tmp_path / "hf")
    assert "<image>" not in tok.get_vocab()  # the caller's tokenizer is left alone
    config = json.loads((folder / "config.json").read_text())
    assert config["image_token_index"] == VOCAB_SIZE
    assert config["text_config"]["vocab_size"] == VOCAB_SIZE + 64
    weights = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        added = weights[name][VOCAB_SIZE:]
        assert len(added) == 64
        torch.testing.assert_close(added, weights[name][:VOCAB_SIZE].mean(0).expand_as(added))


def test_added_rows_never_win(seed: int) -> None:
    head = torch.randn(50, 16)
    hidden = torch.cat((torch.randn(200, 16), -head))  # among them states that dislike many tokens
    logits = hidden @ grown(head, 64).T
    assert (logits.argmax(-1) < 50).all()


def test_a_tokenizer_with_an_image_token_keeps_it(tmp_path: Path) -> None:
    first = run_export(tmp_path / "first")
    tok = AutoTokenizer.from_pretrained(first)
    back = read_back(first)
    second = export_model(back, tok, processor(), V1, tmp_path / "second", dtype=torch.float32)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_end_marks_become_end_tokens(tmp_path: Path) -> None:
    def ends(template: str, kind: str) -> object:
        folder = run_export(tmp_path / template, template=BUILTIN_TEMPLATES[template], kind=kind)
        ids = json.loads((folder / "generation_config.json").read_text())
        assert (ids["bos_token_id"], ids["pad_token_id"]) == (
            tokenizer(kind).bos_token_id,
            tokenizer(kind).pad_token_id,
        )
        text_config = json.loads((folder / "config.json").read_text())["text_config"]
        assert {key: text_config[key] for key in ids if key.endswith("_id")} == {
            key: value for key, value in ids.items() if key.endswith("_id")
        }
        return ids["eos_token_id"]

    assert ends("v1", "plain") == 2
    assert ends("plain", "plain") == [2, tokenizer().encode("a\n")[-1]]
    assert ends("llama_3", "llama_3") == tokenizer("llama_3").eos_token_id
    assert stop_ids(tokenizer(), ("<|im_end|>",)) == (2,)  # several tokens: no id says it


@pytest.mark.device
def test_weights_of_another_dtype(tmp_path: Path) -> None:
    folder = run_export(tmp_path / "hf", dtype=torch.bfloat16)
    assert LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    for name, tensor in load_file(folder / "model.safetensors").items():
        original = parts("clip").model.get_parameter(name)
        assert torch.equal(tensor[: len(original)], original.cpu().bfloat16()), name
    with pytest.raises(WeightsError, match="float64"):
        run_export(tmp_path / "wide", dtype=torch.float64)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.device
def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 120_000)
    folder = run_export(tmp_path / "hf")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 120_000 for shard in shards)
    _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert [name for name, _ in read_back(folder).named_parameters()]


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def read() -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1  # the one before this may still be on its way out
        tensor = torch.ones(10)
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path, {f"t{i}": TensorToWrite((10,), read) for i in range(9)}, torch.float16, max_file_bytes=1000)
    assert len(alive) == 9
    assert all(torch.equal(t, torch.ones(10).half()) for t in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_no_half_folder(existing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    if existing:
        run_export(folder)
    before = snapshot(folder)
    run_export(tmp_path / "warm")  # what the child needs is cached before it is forked
    child = multiprocessing.get_context("fork").Process(target=_export_and_die, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "hf.partial").exists()
    assert snapshot(folder) == before
    run_export(folder, dtype=torch.bfloat16)  # the next export sweeps up and succeeds
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "warm"]
    assert snapshot(folder) != before


def _export_and_die(folder: Path) -> None:
    """Killed when all weights are written but one."""
    model = parts("clip").model

    def weights() -> Iterator[torch.Tensor]:
        yield from [parameter.detach() for parameter in model.parameters()][:-1]
        os.kill(os.getpid(), signal.SIGKILL)

    export_model(model, tokenizer(), processor("square"), V1, folder, dtype=torch.bfloat16, weights=weights())


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_export(tmp_path / "hf")
    before = snapshot(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_weights", full)
    with pytest.raises(OSError, match="No space"):
        run_export(folder, dtype=torch.float16)
    assert snapshot(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", ['{"model_type": "llava"}', "not json", "[]"])
def test_another_folder_is_never_replaced(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsError, match="no export of llava-core"):
        run_export(folder)
    assert snapshot(folder) == {"config.json": content.encode()}
    (folder / "config.json").unlink()
    run_export(folder)  # empty: nothing to lose
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="no export of llava-core"):
        run_export(tmp_path / "file")


def test_an_image_processor_belongs_to_a_vision_tower(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="image processor"):
        export_model(parts("clip").model, tokenizer(), None, V1, tmp_path / "hf", dtype=torch.float32)
    with pytest.raises(WeightsError, match="image processor"):
        export_model(parts("text_llama").model, tokenizer(), processor(), V1, tmp_path / "hf", dtype=torch.float32)


def test_names_are_the_classic_ones(tmp_path: Path) -> None:
    source = parts("clip")
    names = set(load_file(run_export(tmp_path / "hf") / "model.safetensors"))
    assert names == {ours_name(source.reference, name) for name, _ in source.reference.named_parameters()}
    text = set(load_file(run_export(tmp_path / "text", "text_llama") / "model.safetensors"))
    assert text == {name for name, _ in parts("text_llama").reference.named_parameters()}


def messages(turns: tuple[Turn, ...], image: Any = None) -> list[dict[str, Any]]:
    """Turns as transformers takes them, image parts last: the template moves them to the front."""
    result = []
    for turn in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.text.replace("<image>\n", "")}]
        if "<image>" in turn.text:
            content.append({"type": "image"} if image is None else {"type": "image", "image": image})
        result.append({"role": "user" if turn.role == "human" else "assistant", "content": content})
    return result


def without_images(ids: torch.Tensor, image_id: int) -> torch.Tensor:
    return ids[ids != image_id]


def without_slots(example: Any) -> torch.Tensor:
    kept = torch.ones(example.length, dtype=torch.bool)
    for start, length in zip(example.image_starts, example.visual_tokens, strict=True):
        kept[start : start + length] = False
    return example.tokens[kept]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
