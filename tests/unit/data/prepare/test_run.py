"""Preparing: the same bytes by any number of processes and after any interruption; complete or not there."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_core.data.image_store import ImageStore
from llava_core.data.overlong import Overlong
from llava_core.data.prepare import workers
from llava_core.data.prepare.run import Preparation
from llava_core.data.prepare.webdataset import WebdatasetTarget
from llava_core.data.prepare.workers import started
from llava_core.data.readers import Content
from llava_core.data.readers.llava import LlavaJsonlReader
from llava_core.data.readers.saved_datasets import SavedDatasetReader
from llava_core.data.records import Record, Turn
from llava_core.errors import ConfigError, DataError, TrainingError
from llava_core.testing.datasets import TinyParts
from tests.unit.data.prepare.support import BAD_LINES, Data, Quiet, contents, listed, preparation, write_lines


@pytest.fixture
def data(parts: TinyParts, tmp_path: Path) -> Data:
    return write_lines(parts, tmp_path / "data.jsonl", bad=True)


@pytest.fixture(params=["tokens", "webdataset"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_any_number_of_processes_writes_the_same_bytes(data: Data, kind: str, tmp_path: Path) -> None:
    for name, num_workers in (("one", 1), ("three", 3)):
        prepared = getattr(data, kind)(tmp_path / name, num_workers=num_workers).run(Quiet())
        assert prepared.num_rows == 36
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_interrupted_run_goes_on(data: Data, kind: str, tmp_path: Path, num_workers: int) -> None:
    prepare = getattr(data, kind)
    prepare(tmp_path / "whole", part_size=2).run(Quiet())
    interrupted = prepare(tmp_path / "out", part_size=2, num_workers=num_workers)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(Quiet(stop_after=6))
        assert not (tmp_path / "out").exists()
        assert multiprocessing.active_children() == []
    finished = list((tmp_path / "out.partial/.work").glob("part-*.json"))
    assert finished
    before = {file: file.stat().st_ino for file in finished}
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(Quiet(stop_after=1))
    assert {file: file.stat().st_ino for file in finished} == before, "what was finished was made again"
    watch = Quiet()
    interrupted.run(watch)
    assert watch.started_with >= 2 * len(finished)
    assert watch.started_with + watch.seen == 36
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_part_whose_file_is_gone_is_made_again(data: Data, kind: str, tmp_path: Path) -> None:
    prepare = getattr(data, kind)
    prepare(tmp_path / "whole").run(Quiet())
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out").run(Quiet(stop_after=20))
    first = min(file for file in (tmp_path / "out.partial").iterdir() if file.suffix in (".tar", ".safetensors"))
    first.write_bytes(first.read_bytes()[:100])
    prepare(tmp_path / "out").run(Quiet())
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_what_is_there_is_not_made_again(data: Data, tmp_path: Path) -> None:
    first = data.tokens(tmp_path / "out").run(Quiet())
    watch = Quiet()
    assert data.tokens(tmp_path / "out", num_workers=3, max_bad_fraction=0.5).run(watch) == first
    assert watch.started_with == -1


@pytest.mark.parametrize("complete", [True, False], ids=["output", "partial"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda data: data.path.write_text(data.path.read_text() + "\n" + BAD_LINES[25]),
            "source.num_rows: was 36, is 37(.|\\n)*source.data.num_bytes: was",
        ),
        (lambda data: os.utime(data.path, ns=(1, 1)), "source.files: was"),
    ],
)
def test_a_source_that_changed_is_refused(
    data: Data, tmp_path: Path, change: Callable[[Data], Any], named: str, complete: bool
) -> None:
    if complete:
        data.tokens(tmp_path / "out").run(Quiet())
    else:
        with pytest.raises(KeyboardInterrupt):
            data.tokens(tmp_path / "out").run(Quiet(stop_after=12))
    before = contents(tmp_path)
    change(data)
    with pytest.raises(
        ConfigError, match=rf"out{'' if complete else '.partial'} was made from other data(.|\n)*{named}"
    ):
        data.tokens(tmp_path / "out").run(Quiet())
    after = contents(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} <= {"data.jsonl"}


def test_a_source_that_changes_meanwhile_is_refused(data: Data, tmp_path: Path) -> None:
    class Meddler(Quiet):
        def advance(self, count: int) -> None:
            os.utime(data.path, ns=(1, 1))

    with pytest.raises(DataError, match="data.jsonl changed while it was prepared: remove .*out.partial"):
        data.tokens(tmp_path / "out").run(Meddler())
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused(data: Data, tmp_path: Path) -> None:
    data.tokens(tmp_path / "out").run(Quiet())
    with pytest.raises(ConfigError, match=r"settings.template: was 'v1', is 'llama_2'(.|\n)*part_size: was 5, is 6"):
        data.tokens(tmp_path / "out", "llama_2", part_size=6).run(Quiet())
    with pytest.raises(ConfigError, match="to: was 'tokens', is 'webdataset'"):
        data.webdataset(tmp_path / "out").run(Quiet())


def test_another_split_of_one_folder_is_other_data(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = Path(__file__).parents[3] / "golden/datasets/5.2.0"

    def prepared(split: str) -> Preparation:
        reader = SavedDatasetReader(source, split=split)
        target = WebdatasetTarget("rows", ImageStore(None, 10**6))
        return preparation("webdataset", source, reader, target, tmp_path / "out")

    prepared("train").run(Quiet())
    with pytest.raises(ConfigError, match="source.data.split: was 'train', is 'test'"):
        prepared("test").run(Quiet())


class Table:
    """A plugin's reader, of rows that are in no file; its fingerprint says what its author thought of."""

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, version: int) -> None:
        self.fingerprint = {"table": "talks", "version": version}

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> Record:
        return Record(f"row{index}", index, (Turn("human", "Who?"), Turn("assistant", "I.")))


def test_a_plugins_reader_of_no_files(tmp_path: Path) -> None:
    def prepared(version: int) -> Preparation:
        target = WebdatasetTarget("rows", ImageStore(None, 10**6))
        return preparation("webdataset", Path("database:talks"), Table(version), target, tmp_path / "out")

    assert prepared(1).run(Quiet()).num_rows == 3
    with pytest.raises(ConfigError, match="source.data.version: was 1, is 2"):
        prepared(2).run(Quiet())


@pytest.mark.parametrize("name", ["", "out"])
def test_an_output_in_the_source_is_refused(data: Data, tmp_path: Path, name: str) -> None:
    source = data.path.parent
    before = contents(source)
    with pytest.raises(ConfigError, match="lies in .*, and would change it: name another"):
        data.tokens(source / name, source=source).run(Quiet())
    assert contents(source) == before


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_others_wrote_is_left_alone(data: Data, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=f"{name} exists and was not"):
        data.tokens(tmp_path / "out").run(Quiet())
    assert contents(tmp_path / name) == {"mine.txt": b"kept"}


def test_an_empty_folder_is_taken(data: Data, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    data.tokens(tmp_path / "out").run(Quiet())
    assert (tmp_path / "out/prepared.json").is_file()


def test_two_at_once_are_refused(data: Data, tmp_path: Path) -> None:
    class Second(Quiet):
        def start(self, total: int, done: int) -> None:
            with (
                pytest.raises(ConfigError, match="another process is preparing .*out"),
                started(again, [0, 0], 2, self.advance) as run,
            ):
                list(run)

    def again(number: int, advance: Callable[[int], None]) -> int:
        data.tokens(tmp_path / "out").run(Quiet())
        return number

    data.tokens(tmp_path / "out").run(Second())


def test_too_many_bad_rows_stop_it_and_it_goes_on_with_a_higher_limit(data: Data, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"raise --max-bad-fraction and go on") as stopped:
        data.webdataset(tmp_path / "out", max_bad_fraction=0.0).run(Quiet())
    assert "out.partial/quarantine.jsonl" in str(stopped.value)
    assert listed(tmp_path / "out.partial") == [(3, "missing_image")]
    data.webdataset(tmp_path / "out").run(Quiet())
    data.webdataset(tmp_path / "whole").run(Quiet())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bad_rows_are_judged_by_all_that_there_are(parts: TinyParts, tmp_path: Path) -> None:
    data = write_lines(parts, tmp_path / "data.jsonl", bad=False)
    lines = [BAD_LINES[25]] * 10 + data.path.read_text().splitlines()
    data.path.write_text("\n".join(lines))
    assert data.tokens(tmp_path / "out", max_bad_fraction=0.25).run(Quiet()).num_bad == 10
    with pytest.raises(TrainingError, match=r"10 of 46 rows \(21.7%\) cannot be used, the limit is 20.0%"):
        data.tokens(tmp_path / "other", max_bad_fraction=0.2).run(Quiet())


def test_what_another_process_begins_is_not_taken_over(data: Data, tmp_path: Path) -> None:
    inner = tmp_path / "out.partial/.work"
    inner.mkdir(parents=True)

    def second(number: int, advance: Callable[[int], None]) -> int:
        with pytest.raises(ConfigError, match="another process is preparing .*out"):
            data.tokens(tmp_path / "out").run(Quiet())
        return number

    with (inner / "lock").open("wb") as locked:
        fcntl.lockf(locked, fcntl.LOCK_EX)
        with started(second, [0, 0], 2, print) as results:
            list(results)
    assert [file.name for file in inner.iterdir()] == ["lock"]
    data.tokens(tmp_path / "out").run(Quiet())


def test_an_output_that_is_a_link_is_written_where_it_leads(data: Data, tmp_path: Path) -> None:
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    data.tokens(tmp_path / "link").run(Quiet())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/out/prepared.json").is_file()


def test_a_worker_that_is_killed_is_told_of() -> None:
    with (
        pytest.raises(DataError, match="a process that prepared rows ended with -9.*fewer --workers"),
        started(_die, [0, 1, 2], 2, print) as results,
    ):
        list(results)
    assert multiprocessing.active_children() == []


def test_rows_are_counted_while_a_part_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TOLD_SECONDS", -1.0)
    seen: list[int] = []

    def rows(number: int, advance: Callable[[int], None]) -> int:
        for count in range(3):
            assert sum(seen) == count
            advance(1)
        return number

    with started(rows, [7], 1, seen.append) as results:
        assert list(results) == [7]
    assert seen == [1, 1, 1]


def test_a_workers_error_is_raised_here(data: Data, tmp_path: Path) -> None:
    reader = LlavaJsonlReader(data.path)
    reader.num_bytes += 1
    with pytest.raises(DataError, match="data.jsonl changed while in use: it had"):
        replace(data.tokens(tmp_path / "out", num_workers=2), reader=reader).run(Quiet())


def test_sizes_that_mean_nothing_are_refused(data: Data, tmp_path: Path) -> None:
    for setting in ("part_size", "num_workers"):
        with pytest.raises(ConfigError, match=f"{setting} = 0: expected at least 1"):
            data.tokens(tmp_path / "out", **{setting: 0}).run(Quiet())


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.data.prepare.support import Data, Quiet
from llava_core.testing.datasets import TinyParts

class Killed(Quiet):
    def advance(self, count):
        self.seen += count
        if self.seen >= 12:
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
parts = TinyParts(*(folder / name for name in ("clip", "llama", "data.json", "images")))
Data(parts, Path(sys.argv[2])).webdataset(Path(sys.argv[3]), num_workers=2).run(Killed())
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(data: Data, tmp_path: Path) -> None:
    root = Path(__file__).parents[4]
    arguments = [str(path) for path in (data.parts.data.parent, data.path, tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False, timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    watch = Quiet()
    data.webdataset(tmp_path / "out").run(watch)
    assert watch.started_with > 0
    data.webdataset(tmp_path / "whole").run(Quiet())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_manifest_says_what_the_files_hold(data: Data, tmp_path: Path) -> None:
    import hashlib

    data.webdataset(tmp_path / "out").run(Quiet())
    manifest = json.loads((tmp_path / "out/prepared.json").read_text())
    assert (manifest["num_rows"], manifest["num_bad"]) == (36, len(listed(tmp_path / "out")))
    files = contents(tmp_path / "out")
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
        if name.endswith(".tar")
    }


def _die(number: int, advance: Callable[[int], None]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number
