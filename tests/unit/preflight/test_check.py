"""What a check counts is what the loader and other libraries say of the same data; it disturbs no run."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from llava_core.config import RunConfig
from llava_core.config.data import SourceConfig, ValidationConfig
from llava_core.data.batch import Counts
from llava_core.data.loader import StepLoader
from llava_core.data.quarantine import Quarantine
from llava_core.errors import ConfigError, TrainingError
from llava_core.plugins import Registry
from llava_core.preflight.check import Checked, check_data
from llava_core.preflight.folder import PARTIAL
from llava_core.preflight.measure import RowFacts, SampleFacts
from llava_core.preflight.report import print_checked
from llava_core.preflight.subject import Subject
from llava_core.preflight.summary import distribution, rows_of_repeated
from llava_core.preflight.tally import Tally
from llava_core.testing.datasets import TinyParts
from llava_core.train.interrupt import Interrupted
from tests.unit.preflight.conftest import BAD, settings


def checked(config: RunConfig, folder: Path, num_workers: int = 0) -> Checked:
    return check_data(Subject.of(config, Registry.discover(), 1), folder, num_workers, lambda: None)


@pytest.fixture(scope="module")
def found(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    folder = tmp_path_factory.mktemp("found")
    return checked(settings(parts, folder / "run"), folder / "check")


def test_the_counts_and_the_bad_rows_are_the_loaders(parts: TinyParts, found: Checked, tmp_path: Path) -> None:
    loader = Subject.of(settings(parts, tmp_path / "run"), Registry.discover(), 1).loader
    loader = StepLoader(
        loader.builder, loader.order, loader.num_rows, loader.batching, Quarantine(tmp_path / "run.jsonl", 1.0), 0
    )
    steps = list(islice(loader, loader.steps_per_epoch))
    counts = sum((step.counts for step in steps), Counts())
    tokens, samples = found.report["tokens"], found.report["samples"]
    assert (tokens["text"], tokens["image"], tokens["label"]) == (
        counts.text_tokens,
        counts.image_tokens,
        counts.label_tokens,
    )
    assert (samples["total"], samples["images"]) == (counts.samples, counts.images)
    assert found.report["overlong"]["sequences"] == sum(step.num_overlong for step in steps) == 1
    listed = (found.folder / "quarantine.jsonl").read_text().splitlines()
    assert sorted(listed) == sorted((tmp_path / "run.jsonl").read_text().splitlines())
    assert {json.loads(line)["index"]: json.loads(line)["reason"] for line in listed} == BAD
    assert [json.loads(line)["index"] for line in listed] == sorted(BAD)


def test_every_image_is_looked_at_once(parts: TinyParts, found: Checked) -> None:
    """Also those of rows that cannot be used; the row that cannot be read names none."""
    rows = json.loads(parts.data.read_text())
    names = [
        name
        for number, row in enumerate(rows)
        if number != 10
        for name in ([row["image"]] if isinstance(row.get("image"), str) else row.get("image", []))
    ]
    images = found.report["images"]
    usable = [name for name in names if name not in ("3.png", "5.png", "gone.png")]
    opened = [Image.open(parts.images / name) for name in usable]
    assert images["reasons"] == {"missing_image": 2, "broken_image": 1}
    assert (images["usable"], images["bad"]) == (len(usable), 3)
    assert images["modes"] == dict(Counter(image.mode for image in opened))
    assert images["formats"] == dict(Counter(image.format for image in opened))
    assert images["width"]["max"] == max(image.width for image in opened)
    assert images["height"]["mean"] == pytest.approx(np.mean([image.height for image in opened]))


def test_files_are_the_same_for_any_number_of_workers(parts: TinyParts, found: Checked, tmp_path: Path) -> None:
    for num_workers in (1, 2):
        again = checked(settings(parts, tmp_path / "run"), tmp_path / str(num_workers), num_workers)
        for name in ("check.json", "quarantine.jsonl", "lengths.png"):
            assert (again.folder / name).read_bytes() == (found.folder / name).read_bytes(), name


def test_a_second_check_replaces_the_first(parts: TinyParts, tmp_path: Path) -> None:
    config = settings(parts, tmp_path / "run")
    first = (checked(config, tmp_path / "check").folder / "quarantine.jsonl").read_bytes()
    assert (checked(config, tmp_path / "check").folder / "quarantine.jsonl").read_bytes() == first


def test_ids_of_several_rows_are_named(found: Checked) -> None:
    assert found.report["rows"]["repeated_ids"] == 1
    assert found.report["rows"]["rows_with_repeated_ids"] == 2
    assert found.report["repeated_ids"] == [
        {"id": "row2", "rows": [{"source": 0, "index": 2}, {"source": 0, "index": 16}]}
    ]


def test_few_bad_rows_are_no_problem_and_more_are(parts: TinyParts, tmp_path: Path) -> None:
    """As of a run, which goes on while they are fewer than ten."""
    assert checked(settings(parts, tmp_path / "run"), tmp_path / "few").problems == ()
    rows = json.loads(parts.data.read_text())
    for row in rows[20:32]:
        row["conversations"] = []
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = settings(parts, tmp_path / "run", data={"path": str(tmp_path / "data.json"), "order": "sequential"})
    (problem,) = checked(config, tmp_path / "many").problems
    assert "17 of 40 rows cannot be used (13 malformed_row, 1 broken_image" in problem
    assert "in step 4, in epoch 1." in problem  # rows 24 to 31: the tenth bad one is row 24


def test_data_without_a_sample_is_a_problem(parts: TinyParts, tmp_path: Path) -> None:
    rows = json.loads(parts.data.read_text())[11:13]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = {"path": str(tmp_path / "data.json"), "overlong": "drop", "max_bad_fraction": 1.0}
    found = checked(settings(parts, tmp_path / "run", data=data), tmp_path / "check")
    assert found.problems == ("no row becomes a sample: 2 dropped for their length.",)
    assert found.examples == (None,)
    assert found.report["epoch"]["real_share"] is None
    assert found.report["lengths"]["min"] > 256


def test_sources_have_their_own_numbers(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a blue line\n" * 7 + "blue " * 400)
    sources = [{"path": str(parts.data)}, {"path": str(tmp_path / "lines.txt")}]
    data: dict[str, Any] = {"path": None, "sources": sources}
    report = checked(settings(parts, tmp_path / "run", data=data), tmp_path / "check").report
    first, second = report["sources"]
    assert (first["template"], second["template"]) == ("v1", "text")
    assert (first["overlong"]["become"], second["overlong"]["become"]) == (["truncate"], ["split"])
    assert report["overlong"]["become"] == ["split", "truncate"]
    assert (second["rows"]["total"], second["rows"]["bad"]) == (8, 0)
    assert second["samples"]["total"] > 8
    assert second["images"]["usable"] == 0
    for section, key in (("rows", "total"), ("rows", "bad"), ("samples", "total"), ("tokens", "label")):
        assert report[section][key] == first[section][key] + second[section][key]


def test_what_is_validated_on_is_checked_as_its_loader_reads_it(parts: TinyParts, tmp_path: Path) -> None:
    """Some rows held out, and of those every second one or so."""
    config = with_validation(settings(parts, tmp_path / "run"), fraction=0.5, max_samples=12)
    subject = Subject.of(config, Registry.discover(), 1)
    found = check_data(subject, tmp_path / "check", 0, lambda: None)
    assert subject.validation is not None
    assert found.report["rows"]["total"] == 20
    report, steps = found.report["validation"], list(subject.validation.from_start())
    counts = sum((step.counts for step in steps), Counts())
    assert report["rows"]["total"] == 12
    assert (report["samples"]["total"], report["tokens"]["total"]) == (counts.samples, counts.tokens)
    listed = {}
    for name in ("quarantine.jsonl", "validation-quarantine.jsonl"):
        lines = (tmp_path / "check" / name).read_text().splitlines()
        listed[name] = {json.loads(line)["index"]: json.loads(line)["reason"] for line in lines}
    assert len(listed["validation-quarantine.jsonl"]) == subject.validation.quarantine.num_bad == report["rows"]["bad"]
    assert report["rows"]["bad"] > 0
    assert listed["quarantine.jsonl"].items() | listed["validation-quarantine.jsonl"].items() <= BAD.items()
    assert found.num_bad == sum(map(len, listed.values()))


def test_validation_data_that_would_stop_a_run_is_a_problem(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "void.jsonl").write_text('{"id": "a"}\n' * 11)
    config = with_validation(settings(parts, tmp_path / "run"), path=tmp_path / "void.jsonl")
    found = checked(config, tmp_path / "check")
    stops, empty = found.problems
    assert stops.startswith("validation: 11 of 11 rows cannot be used (11 malformed_row)")
    assert "in step 2 of the validation" in stops
    assert empty == "validation: no row becomes a sample: 11 malformed_row."


def test_a_validation_source_of_which_no_row_is_taken_has_no_share_of_bad_ones(
    parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a blue line\n" * 3)
    sources = tuple(SourceConfig(path=path) for path in (parts.data, tmp_path / "a.txt"))
    config = with_validation(settings(parts, tmp_path / "run"), sources=sources, max_samples=1)
    found = checked(config, tmp_path / "check")
    first, second = found.report["validation"]["sources"]
    assert (first["rows"]["bad_fraction"], second["rows"]["bad_fraction"]) == (0, None)
    assert second["rows"]["total"] == 0
    print_checked(found, Subject.of(config, Registry.discover(), 1), Console(width=200))
    assert "a.txt" in capsys.readouterr().out


def test_what_is_said_of_validation_rows_says_so(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "void.jsonl").write_text('{"id": "a"}\n' * 11)
    config = with_validation(settings(parts, tmp_path / "run"), path=tmp_path / "void.jsonl")
    validation = Subject.of(config, Registry.discover(), 1).validation
    assert validation is not None
    with pytest.raises(TrainingError, match="11 of 11 rows of the validation data "):
        list(validation.from_start())


def with_validation(config: RunConfig, **given: Any) -> RunConfig:
    return config.model_copy(update={"validation": ValidationConfig(**given)})


def test_a_runs_own_folder_is_refused_and_left(parts: TinyParts, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "quarantine.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="is a run's own folder"):
        checked(settings(parts, tmp_path / "run"), tmp_path)
    assert (tmp_path / "quarantine.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("content", ['{"checks": []}', "[", '["problems", "settings", "sources", "repeated_ids"]'])
def test_files_that_no_check_wrote_are_refused_and_left(parts: TinyParts, tmp_path: Path, content: str) -> None:
    (tmp_path / "check.json").write_text(content)
    (tmp_path / "lengths.png").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"holds lengths\.png, check\.json, which a check would replace"):
        checked(settings(parts, tmp_path / "run"), tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert ((tmp_path / "check.json").read_text(), (tmp_path / "lengths.png").read_text()) == (content, "mine")


def test_what_a_check_that_was_cut_off_wrote_vanishes_and_an_older_one_stays(parts: TinyParts, tmp_path: Path) -> None:
    folder, rows = tmp_path / "check", 0

    def fail_late() -> None:
        nonlocal rows
        rows += 1
        if rows == 30:
            raise Interrupted(15)

    config = settings(parts, tmp_path / "run")
    with pytest.raises(Interrupted):
        check_data(Subject.of(config, Registry.discover(), 1), folder, 0, fail_late)
    assert list(folder.iterdir()) == []
    checked(config, folder)
    before, rows = {path.name: path.read_bytes() for path in folder.iterdir()}, 0
    with pytest.raises(Interrupted):
        check_data(Subject.of(config, Registry.discover(), 1), folder, 0, fail_late)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / PARTIAL).mkdir()  # one that was killed
    assert checked(config, folder).problems == ()
    assert {path.name for path in folder.iterdir()} == before.keys()


def test_percentiles_are_values_that_occur() -> None:
    """Of 1 to 200 the p-th percentile is 2 p: the smallest value that so many in a hundred do not exceed."""
    found = distribution(np.random.default_rng(0).permutation(np.arange(1, 201)))
    assert found is not None
    assert [found[f"p{p}"] for p in (1, 5, 25, 50, 75, 95, 99)] == [2, 10, 50, 100, 150, 190, 198]
    assert (found["count"], found["min"], found["max"], found["mean"]) == (200, 1, 200, 100.5)
    assert distribution(np.zeros(0, dtype=np.int64)) is None


def test_rows_without_an_id_share_none() -> None:
    keys = np.array([0, 9, 0, 4, 9, 2**64 - 1, 4, 4, 0], dtype=np.uint64)
    assert [group.tolist() for group in rows_of_repeated(keys)] == [[1, 4], [3, 6, 7]]
    assert rows_of_repeated(np.zeros(3, dtype=np.uint64)) == []


def test_a_joined_tally_is_that_of_all_rows() -> None:
    rows = [RowFacts(0, key, None, (key,), (SampleFacts(key, 0, 1, 0),) * (key % 3)) for key in range(1, 9)]
    whole, parts = Tally(), (Tally(), Tally())
    for number, row in enumerate(rows):
        whole.add(row)
        parts[number >= 5].add(row)
    joined = Tally.joined(parts)
    assert joined.num_dropped == whole.num_dropped == 2
    for name in ("num_samples_of_rows", "keys", "lengths", "samples", "image_sizes"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
