"""Configs: every mistake is one message that says what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_core.config import build_config, load_config, to_yaml
from llava_core.config.load import IncompleteConfig, known_keys
from llava_core.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "output": "runs/x",
    "model": {"path": "m"},
    "data": {"path": "d.json"},
    "batch": {"global_size": 8, "micro_size": 2},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"trainable": ["projector"], "epochs": 1},
}
MINIMAL_YAML = """
output: runs/x
model: {path: m}
data: {path: d.json}
batch: {global_size: 8, micro_size: 2}
optimizer: {learning_rate: 1.0e-3}
train: {trainable: [projector], epochs: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL_YAML)
    return path


def problem(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(str(file), overrides)
    return str(raised.value)


def test_recompute_takes_a_word(file: Path) -> None:
    assert "train.recompute = True: Input should be 'none', 'selective' or 'full'" in problem(
        file, "train.recompute=true"
    )
    assert load_config(str(file), ["train.recompute=selective"]).train.recompute == "selective"


def test_a_number_of_layers_needs_something_to_recompute(file: Path) -> None:
    assert "set recompute to selective or full, too" in problem(file, "train.recompute_layers=2")
    assert "set every_steps, too, or leave it out" in problem(file, "checkpoint.asynchronous=true")


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate=1", "learning_rate", "optimizer.learning_rate"),
        ("train.epoch=1", "train.epoch", "train.epochs"),
        ("data.learning_rate=1", "data.learning_rate", "optimizer.learning_rate"),
        ("optimizer.part_learning_rates.projektor=1", "projektor", "optimizer.part_learning_rates.projector"),
        ("checkpoint.every_step=1", "checkpoint.every_step", "every_steps"),
        ("data.pth=x", "data.pth", "data.path"),
        ("data.sorces=[{path: a}]", "data.sorces", "data.sources"),
        ("data.sources=[{path: a}, {path: b, wieght: 1}]", "data.sources.1.wieght", "data.sources.1.weight"),
        ("data.sources=[{pth: a}]", "data.sources.0.pth", "data.sources.0.path"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, override: str, key: str, nearest: str) -> None:
    message = problem(file, override)
    assert f"{key}: no such key. Did you mean" in message
    assert f"{nearest}'?" in message


def test_a_key_like_no_other_lists_the_sections(file: Path) -> None:
    assert "no such key. Sections: output, model, data, validation, batch" in problem(file, "zzz=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=two", "train.epochs = 'two'"),
        ("train.epochs=0", "train.epochs = 0"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: not set"),
        ("optimizer.warmup_fraction=1.5", "optimizer.warmup_fraction = 1.5"),
        ("train.precision=fp8", "train.precision = 'fp8'"),
        ("train.trainable=[projector,head]", "train.trainable.1 = 'head'"),
        ("data.order=random", "data.order = 'random'"),
        ("model=clip", "model = 'clip'"),
        ("batch.global_size=2.5", "batch.global_size = 2.5"),
        ("train.epochs=true", "train.epochs = True: expected a number"),
        ("optimizer.weight_decay=false", "optimizer.weight_decay = False: expected a number"),
        ("model.vision_feature_layer=true", "model.vision_feature_layer = True: expected a number"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate = 'inf'"),
        ("optimizer.eps=.nan", "optimizer.eps = nan"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas.1 = 1.0"),
        ("optimizer.betas=[true,0.9]", "optimizer.betas.0 = True: expected a number"),
        (f"train.seed={2**63}", f"train.seed = {2**63}"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(file: Path, override: str, expected: str) -> None:
    assert expected in problem(file, override)


def test_a_choice_lists_what_there_is(file: Path) -> None:
    assert all(name in problem(file, "train.precision=fp8") for name in ("auto", "bf16", "fp16", "fp32"))


@pytest.mark.parametrize("section", ["output", "batch.global_size", "optimizer.learning_rate"])
def test_what_is_missing_is_named(section: str) -> None:
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    parent, _, leaf = section.rpartition(".")
    del (settings[parent] if parent else settings)[leaf]
    with pytest.raises(ConfigError, match=f"{section}: not set, and it has no default"):
        build_config(settings)


def test_all_problems_are_told_at_once(file: Path) -> None:
    message = problem(file, "train.epochs=x", "data.pth=1", "batch.global_size=0")
    assert all(key in message for key in ("train.epochs", "data.pth", "batch.global_size"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.vision=v"], "path names a whole model, so vision cannot be set beside it"),
        (["model.projector_type=linear"], "so projector_type cannot be set beside it"),
        (["model.path=null", "model.vision=v"], "set path (a whole model), or vision and language"),
        (["batch.micro_tokens=4096"], "exactly one of micro_tokens (packed) and micro_size (padded)"),
        (["batch.micro_size=null"], "exactly one of micro_tokens (packed) and micro_size (padded)"),
        (["batch.micro_size=3"], "global_size 8 is not a multiple of micro_size 3"),
        (["optimizer.warmup_steps=3", "optimizer.warmup_fraction=0.1"], "at most one of warmup_fraction"),
        (["train.max_tokens=9"], "the learning rate follows it: set epochs to null"),
        (
            ["train.epochs=null", "train.max_tokens=9", "optimizer.warmup_steps=3"],
            "give warmup_tokens or warmup_fraction",
        ),
        (["optimizer.warmup_tokens=9"], "give warmup_steps or warmup_fraction, or train.max_tokens"),
        (["optimizer.warmup_tokens=9", "optimizer.warmup_fraction=0.1"], "at most one of warmup_fraction"),
        (["optimizer.schedule=constant", "optimizer.final_fraction=0.1"], "final_fraction means nothing"),
        (["train.epochs=null"], "a run needs an end"),
        (["data.mega_batch_mult=2"], "mega_batch_mult means nothing under order shuffled"),
        (["data.order=length_grouped", "data.mega_batch_mult=0"], "data.mega_batch_mult = 0"),
        (["data.path=null"], "set path (one data set), or sources (several)"),
        (["data.sources=[{path: a}]"], "several data sets, so path cannot be set beside it"),
        (["data.path=null", "data.sources=[{path: a}, {path: b, weight: 1}]"], "sources [1] have a weight and others"),
        (["data.path=null", "data.sources=[{path: a, weight: 0}]"], "data.sources.0.weight = 0"),
        (["validation.every_steps=9"], "set path (one data set), sources (several) or fraction (of data)"),
        (["validation.path=v", "validation.fraction=0.1"], "path says what to validate on, so fraction cannot be set"),
        (["validation.fraction=0.1", "validation.split=val"], "fraction says what to validate on, so split cannot"),
        (
            ["validation.sources=[{path: v, weight: 1}]"],
            "every row of every source counts once: leave their weight out",
        ),
        (["validation.fraction=1"], "validation.fraction = 1"),
        (["validation.pth=v"], "Did you mean 'validation.path'?"),
        (["data.overlong=keep"], "data.overlong = 'keep'"),
        (["train.trainable=[]"], "name at least one part"),
        (["train.trainable=[projector,projector]"], "each once"),
        (["batch.micro_size=null", "batch.micro_tokens=1024"], "micro_tokens 1024 is below data.max_length 2048"),
    ],
)
def test_settings_that_clash_are_refused(file: Path, overrides: list[str], expected: str) -> None:
    assert expected in problem(file, *overrides)


@pytest.mark.parametrize("override", ["train.epochs", "--epochs=1", "=1"])
def test_an_override_needs_a_key_and_a_value(file: Path, override: str) -> None:
    assert "expected key=value" in problem(file, override)


def test_overrides_reach_every_kind_of_value(file: Path) -> None:
    config = load_config(
        str(file),
        [
            "optimizer.betas=[0.8,0.95]",
            "train.epochs=null",
            "train.max_steps=3",
            "data.images=a b/c",
            "log.trackers=[]",
        ],
    )
    assert config.optimizer.betas == (0.8, 0.95)
    assert (config.train.epochs, config.train.max_steps) == (None, 3)
    assert config.data.images == Path("a b/c")
    assert config.log.trackers == ()


@pytest.mark.parametrize(
    "text", ["model: {path: m", "a: b: c", "- one\n- two", "just words", "x: ${nowhere}", "42"], ids=repr
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    assert problem(file)


def test_a_syntax_error_names_the_file_and_line(file: Path) -> None:
    file.write_text("output: x\nmodel: {path: m\ndata: 1\n")
    message = problem(file)
    assert str(file) in message
    assert "line 3" in message


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'llava15-7b-pretrain'"):
        load_config("llava15-7b-pretain")
    with pytest.raises(ConfigError, match="llava15-7b-pretrain, llava15-7b-sft, .*; or give a YAML file"):
        load_config("zzz")


def test_a_config_written_as_yaml_reads_back_equal(file: Path, tmp_path: Path) -> None:
    overrides = [
        "optimizer.betas=[0.8,0.95]",
        "optimizer.eps=1e-7",
        "optimizer.part_learning_rates.projector=2e-5",
        "backend.kernels.attention=sdpa",
        "output=runs/ü: #1",
        "checkpoint.keep=null",
    ]
    config = load_config(str(file), overrides)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_a_config_cannot_be_changed(file: Path) -> None:
    config = load_config(str(file))
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 2  # type: ignore[misc]


def test_known_keys_are_whole_paths() -> None:
    keys = set(known_keys())
    assert {"output", "model.path", "optimizer.part_learning_rates.vision", "train.trainable"} <= keys
    assert "model" not in keys


@pytest.mark.parametrize("text", ["/tmp/my runs #2", "/a: b", "2024", "[x]", "{y}", "a=b", "1e3", "x${HOME}"])
def test_a_path_is_taken_as_it_stands(file: Path, tmp_path: Path, text: str) -> None:
    config = load_config(str(file), [f"output={text}", f"data.images={text}"])
    assert (config.output, config.data.images) == (Path(text), Path(text))
    assert load_config(str(file), options={"output": text}).output == Path(text)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_texts_are_taken_as_they_stand(file: Path) -> None:
    config = load_config(str(file), ["data.template=on", "backend.kernels.attention=1", "backend.kernels={loss: a}"])
    assert config.data.template == "on"
    assert config.backend.kernels == {"attention": "1", "loss": "a"}


def test_null_takes_an_optional_path_away(file: Path) -> None:
    overrides = ["data.images=x", "data.images=null", "backend.name=null"]
    config = load_config(str(file), overrides)
    assert (config.data.images, config.backend.name) == (None, None)
    assert "output = None" in problem(file, "output=null")


@pytest.mark.parametrize("override", ["output=", "data.images="])
def test_an_empty_path_is_refused(file: Path, override: str) -> None:
    assert f"override {override!r}" in problem(file, override)


def test_options_come_last_and_others_may_refer_to_them(file: Path) -> None:
    config = load_config(str(file), ["output=x", "log.trackers=['${output}']"], options={"output": "y #1"})
    assert (config.output, config.log.trackers) == (Path("y #1"), ("y #1",))
    with pytest.raises(ConfigError, match="output is given as an empty text"):
        load_config(str(file), options={"output": ""})


def test_home_is_expanded_in_every_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ["model.path=null", "model.vision=~/v", "model.language=~/l", "model.projector=~/p"]
    config = load_config(str(file), [*paths, "output=~/runs", "data.path=~/d.json", "data.images=~"])
    found = [config.output, config.data.path, config.data.images, config.model.vision, config.model.language]
    assert [str(path) for path in found] == [f"/home/someone{end}" for end in ("/runs", "/d.json", "", "/v", "/l")]
    assert config.model.projector == Path("/home/someone/p")


def test_a_home_that_nobody_has_is_named(file: Path) -> None:
    assert "'~nobody-at-all/x' names no user's home folder" in problem(file, "output=~nobody-at-all/x")


@pytest.mark.parametrize("content", [b"\x80\x03\xff\xfe{", b"output: \xff\n"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors cannot be read" in problem(tmp_path / "model.safetensors")


@pytest.mark.parametrize("override", ["train.epochs=[1", "log.trackers={a: b: c}"])
def test_an_override_at_fault_is_named_and_the_file_is_not(file: Path, override: str) -> None:
    message = problem(file, override)
    assert override.partition("=")[0] in message
    assert str(file) not in message
    assert "unicode string" not in message


def test_both_forms_of_the_data_become_one(file: Path) -> None:
    (single,) = load_config(str(file), ["data.images=i", "data.reader=r", "data.split=s"]).data.inputs
    assert (single.path, single.images, single.reader, single.split) == (Path("d.json"), Path("i"), "r", "s")
    shared = ["data.path=null", "data.images=i", "data.sources=[{path: a}, {path: ~/b, images: j, reader: r}]"]
    first, second = load_config(str(file), shared).data.inputs
    assert (first.path, first.images, first.reader) == (Path("a"), Path("i"), None)
    assert (second.path, second.images, second.reader) == (Path.home() / "b", Path("j"), "r")


def test_the_sources_of_the_docs_are_a_config() -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text()
    example = yaml.safe_load("data:\n" + page.partition("```yaml\ndata:\n")[2].partition("```")[0])
    first, second = build_config(MINIMAL | example).data.inputs
    assert (first.template, second.reader, first.weight, second.images) == ("v1", "text_json", 0.7, Path("images"))


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL_YAML.replace("{path: d.json}", "{sources: [{path: a}, {path: b, reader: r}]}"))
    config = load_config(str(path), ["data.sources.1.path=c #1", "data.sources.0={reader: q}"])
    assert [(source.path, source.reader) for source in config.data.sources] == [(Path("a"), "q"), (Path("c #1"), "r")]
    assert load_config(str(path), ["data.sources.1.reader=null"]).data.sources[1].reader is None
    for override in ("data.sources.2.path=c", "data.sources.path=c"):
        assert f"override {override!r} cannot be set" in problem(path, override)


def test_values_still_to_be_given_are_told_from_mistakes(file: Path) -> None:
    for override in ("model.path=null", "train.epochs=null", "batch.micro_size=null"):
        with pytest.raises(IncompleteConfig):
            load_config(str(file), [override])
    with pytest.raises(ConfigError) as raised:
        load_config(str(file), ["model.path=null", "train.seed=-1"])
    assert not isinstance(raised.value, IncompleteConfig)


def test_the_error_of_every_mistake_is_public() -> None:
    import llava_core

    assert "LlavaError" in llava_core.__all__
    assert llava_core.LlavaError is ConfigError.__bases__[0]
