"""The assistant on exported and other folders, against transformers' processor and generate."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_core.backend import OpSet
from llava_core.data.chat_template import tokenizer_template
from llava_core.data.examples import Rejected
from llava_core.data.image_store import ImageStore
from llava_core.data.records import Turn
from llava_core.data.templates import BUILTIN_TEMPLATES, CHATML, PLAIN, V1, Template
from llava_core.errors import BadRow, ConfigError
from llava_core.inference.assistant import Assistant, build_stop
from llava_core.inference.prompts import Answer, PromptRow
from llava_core.inference.sampling import GenerationSettings
from llava_core.weights.export import export_model
from tests.hardware import hardware
from tests.unit.inference.support import parts, picture, processor, tokenizer

SETTINGS = GenerationSettings(max_new_tokens=12)

# The form of LLaVA's chat templates on the hub: messages are lists of parts.
PARTS_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def export(folder: Path, case: str = "clip", template: Template = V1, kind: Any = "plain") -> Path:
    image_processor = processor("pad") if parts(case).spec.vision else None
    return export_model(parts(case).model, tokenizer(kind), image_processor, template, folder, dtype=torch.float32)


def load(folder: Path, **options: Any) -> Assistant:
    return Assistant.load(
        folder, lambda _: OpSet.of({}), device=hardware().device, compute_dtype=torch.float32, **options
    )


def transformers_answer(folder: Path, question: str, image: Any) -> str:
    """By the book: chat template, processor, generate, decode."""
    loaded, model = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image"})
    text = loaded.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = loaded(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=SETTINGS.max_new_tokens, do_sample=False)
    return loaded.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.device
@pytest.mark.parametrize("kind", ["legacy", "plain"])
@pytest.mark.parametrize("name", ["v1", "llama_2", "plain", "chatml"])
def test_an_export_answers_as_transformers_does(name: str, kind: str, tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", template=BUILTIN_TEMPLATES[name], kind=kind)
    assistant = load(folder)
    answer = assistant.ask("What is this?", picture(), SETTINGS)
    assert answer
    assert answer == transformers_answer(folder, "What is this?", picture())
    if name != "plain":
        assert assistant.ask("Why?", settings=SETTINGS) == transformers_answer(folder, "Why?", None)


def test_an_export_is_asked_as_the_model_was_trained(tmp_path: Path) -> None:
    """The reloaded folder and the model in memory with its training template read the same tokens."""
    for name, kind in (("v1", "plain"), ("llama_3", "llama_3"), ("mistral", "legacy")):
        template = BUILTIN_TEMPLATES[name]
        loaded = load(export(tmp_path / name, template=template, kind=kind))
        trained = Assistant(parts("clip").model, tokenizer(kind), processor("pad"), template)
        turns = (Turn("human", "<image>\nWhat?"), Turn("assistant", "A cat"), Turn("human", "Sure?"))
        a, b = (assistant.build_example("a", turns, [picture()]) for assistant in (loaded, trained))
        slots = a.tokens == loaded.model.spec.image_token_id
        assert torch.equal(a.tokens[~slots], b.tokens[~slots])
        assert a.image_starts == b.image_starts
        assert torch.equal(a.pixels, b.pixels)
        assert loaded.stop.ids == trained.stop.ids


@pytest.mark.parametrize("case", ["clip", "text_llama"])
def test_a_chat_template_without_bos_is_asked_as_it_was_trained(case: str, tmp_path: Path) -> None:
    tok = copy.deepcopy(tokenizer("llama_3"))
    tok.chat_template = tok.chat_template.removeprefix("{{ bos_token }}")
    template, image_processor = tokenizer_template(tok), processor() if case == "clip" else None
    trained = Assistant(parts(case).model, tok, image_processor, template)
    folder = export_model(parts(case).model, tok, image_processor, template, tmp_path / "hf", dtype=torch.float32)
    turns = (Turn("human", "What?"),)
    expected = trained.build_example("a", turns, []).tokens
    assert tok.bos_token_id not in expected
    assert torch.equal(load(folder).build_example("a", turns, []).tokens, expected)
    if case == "clip":
        messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
        loaded = AutoProcessor.from_pretrained(folder)
        ids = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert ids["input_ids"] == [expected.tolist()]


def test_images_come_as_paths_too(tmp_path: Path) -> None:
    assistant = load(export(tmp_path / "hf"))
    picture().save(tmp_path / "a.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b.png").symlink_to(tmp_path / "a.png")
    answer = assistant.ask("What?", picture(), SETTINGS)
    assert assistant.ask("What?", tmp_path / "a.png", SETTINGS) == answer
    assert assistant.ask("What?", str(tmp_path / "linked" / "b.png"), SETTINGS) == answer
    assert assistant.ask("<image> What?", [picture()], SETTINGS) == answer
    with pytest.raises(BadRow, match="nowhere.png"):
        assistant.ask("What?", tmp_path / "nowhere.png")
    with pytest.raises(BadRow, match="image_count"):
        assistant.ask("What?", [picture(), picture()])
    with pytest.raises(BadRow, match="image_count"):
        assistant.ask("<image> What?")


@pytest.mark.device
def test_a_language_model_answers(tmp_path: Path) -> None:
    assistant = load(export(tmp_path / "hf", "text_llama"))
    trained = Assistant(parts("text_llama").model, tokenizer(), None, V1)
    assert assistant.ask("What?", settings=SETTINGS) == trained.ask("What?", settings=SETTINGS)
    with pytest.raises(BadRow, match="no vision tower"):
        assistant.ask("What?", picture())


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja"])
def test_a_folder_whose_template_reads_parts(file: str, tmp_path: Path) -> None:
    folder = export(tmp_path / "hf")
    (folder / "chat_template.jinja").unlink()
    content = json.dumps({"chat_template": PARTS_TEMPLATE}) if file.endswith("json") else PARTS_TEMPLATE
    (folder / file).write_text(content)
    assert load(folder).ask("What?", picture(), SETTINGS) == transformers_answer(folder, "What?", picture())


def test_a_folder_without_a_template_needs_one(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf")
    expected = load(folder).ask("What?", picture(), SETTINGS)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        load(folder)
    assert load(folder, template=V1).ask("What?", picture(), SETTINGS) == expected


@pytest.mark.device
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_rows_are_answered_in_order_and_errors_stay_in_place(batch_size: int, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")
    two = (Turn("human", "<image>\nA?"), Turn("assistant", "Yes"), Turn("human", "<image>\nAnd this?"))
    rows = [
        PromptRow("0", 0, (Turn("human", "<image>\nWhat?"),), ("a.png",), "reference"),
        Rejected("1", 1, "malformed_row", "no question"),
        PromptRow("2", 2, two, ("a.png", "b.png")),
        PromptRow("3", 3, (Turn("human", "<image>\nWhat?"),), ("nowhere.png",)),
        PromptRow("4", 4, (Turn("human", "Why?"),)),
        PromptRow("5", 5, (Turn("assistant", "Hi"),)),
        PromptRow("6", 6, (Turn("human", "word " * 3000),)),
    ]
    assistant = load(export(tmp_path / "hf"))
    results = list(assistant.generate(rows, SETTINGS, batch_size=batch_size, images=ImageStore(tmp_path, 10**6)))
    assert [result.id for result in results] == list("0123456")
    assert {r.id: r.reason for r in results if isinstance(r, Rejected)} == {
        "1": "malformed_row", "3": "missing_image", "5": "role_order", "6": "prompt_too_long",
    }  # fmt: skip
    answers = {r.id: r for r in results if isinstance(r, Answer)}
    assert answers["0"].answer == assistant.ask("What?", picture(1), SETTINGS)
    assert (answers["0"].question, answers["0"].reference) == ("<image>\nWhat?", "reference")
    assert answers["4"].answer == assistant.ask("Why?", settings=SETTINGS)
    assert all((a.finish == "length") == (a.tokens == 12) for a in answers.values())
    without = assistant.generate(rows[:1], SETTINGS, batch_size=1)
    assert [r.reason for r in without if isinstance(r, Rejected)] == ["unexpected_image"]


def test_the_end_of_an_answer_is_not_part_of_it() -> None:
    tok = tokenizer()
    for template, text in ((V1, "A cat.</s>"), (PLAIN, "A cat.\n"), (CHATML, "A cat.<|im_end|>")):
        assistant = Assistant(parts("clip").model, tok, processor(), template)
        ids = tok(text, add_special_tokens=False)["input_ids"]
        assert assistant.stop.reached(ids), template.name
        assert assistant.decode(ids) == "A cat."
        assert assistant.decode(ids[:-1]).startswith("A cat.")


def test_end_tokens_of_the_folder_count(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf")
    for found in (9, [9, 10]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
        assert load(folder).stop.ids == {2, 9, *([found] if isinstance(found, int) else found)}
    (folder / "generation_config.json").unlink()
    assert load(folder).stop.ids == build_stop(tokenizer(), V1).ids == {2}


def test_a_batch_holds_at_least_one_row() -> None:
    assistant = Assistant(parts("clip").model, tokenizer(), processor(), V1)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        list(assistant.generate([], SETTINGS, batch_size=0))
