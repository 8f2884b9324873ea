"""State checkpoints under kills, damage, full disks and planted files.

Children are forked from this process, which has imported torch already, so that hundreds of trials take seconds. Each
leaves through `os._exit`, or is killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import random
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_core import durable
from llava_core.engine.parts import Facts, local_parts
from llava_core.errors import CheckpointError
from llava_core.train import checkpoint, manifest
from llava_core.train.checkpoint import open_checkpoint, open_newest, save_state
from llava_core.train.stored import Checkpoint

KEEP = 2


def contents(step: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What a checkpoint of this step holds: every value tells the step."""
    tensors = {
        "weight": torch.full((4, 8), step / 7),
        "moment": torch.full((16,), step, dtype=torch.bfloat16),
        "count": torch.tensor(step),
        "rng": torch.full((40,), step % 251, dtype=torch.uint8),
    }
    return tensors, {"step": step, "lr": 1 / (step + 1), "sampler": {"seen": [step] * 150}}


def save(root: Path, step: int) -> Path:
    tensors, state = contents(step)
    return save_state(root, step, local_parts(tensors), state, keep=KEEP, max_file_bytes=130)  # type: ignore[arg-type]


def assert_holds(state: Checkpoint | None, step: int) -> None:
    assert state is not None
    tensors, values = contents(step)
    assert (state.step, state.state, state.tensors.keys()) == (step, values, tensors.keys())
    for name, tensor in tensors.items():
        assert state.tensors[name] == Facts(tensor.dtype, tuple(tensor.shape))
        assert torch.equal(state.read(name), tensor), name


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child that exits with 0, or with 1 after printing what it raised; returns the child's id.

    The child lacks torch's worker threads, which it would wait for; all tests run with one thread, so there are none.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads alive; the child calls nothing that they could have locked.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:  # Nothing may unwind into this copy of the test runner.
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)


def assert_exits_well(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# ---- kills


def save_until_killed(root: Path, first: int, report: int) -> None:
    os.write(report, b"r")
    for step in range(first, first + 10_000):
        save(root, step)
        os.write(report, b"s")


def killed_run(root: Path, first: int, seconds: float) -> int:
    """Kill a child that saves without pause; returns how many saves had returned to it."""
    receive, report = os.pipe()
    child = fork(lambda: save_until_killed(root, first, report))
    try:
        os.close(report)
        assert os.read(receive, 1) == b"r"
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as reports:
        return reports.read().count(b"s")


def test_kill_at_random_points(tmp_path: Path) -> None:
    """240 kills: nothing complete is ever damaged, nothing saved is lost, the next save sweeps the litter."""
    rng = random.Random(0)
    newest, litter = 4, Counter[str]()
    start = time.perf_counter()
    for step in range(newest + 1):
        save(tmp_path, step)
    save_seconds = (time.perf_counter() - start) / (newest + 1)
    for _ in range(240):
        saves = killed_run(tmp_path, newest + 1, rng.uniform(0, 3 * save_seconds))
        state, skipped = open_newest(tmp_path)
        assert skipped == []
        assert state is not None
        # The kill may fall between the rename and the report.
        assert state.step in (newest + saves, newest + saves + 1)
        newest = state.step
        assert_holds(state, newest)
        complete = checkpoint._complete(tmp_path)
        for path in complete:
            assert_holds(open_checkpoint(path), checkpoint._step(path))
        # Older ones go after the new one is durable, so each kill may leave one too many, and never one too few.
        assert len(complete) >= KEEP
        litter.update(name.partition(".")[2] for name in names(tmp_path) if "." in name)
        if rng.random() < 0.1:
            newest += 1
            save(tmp_path, newest)
            assert names(tmp_path) == [f"step-{step:08d}" for step in range(newest - KEEP + 1, newest + 1)]
    # Else the kills fell between the saves and proved nothing.
    assert litter["partial"] >= 50, litter


def die_at(operation: int) -> None:
    """Make this process vanish just before its n-th change to names or call to fsync."""
    remaining = operation

    def guard(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, guard(getattr(os, name)))


@pytest.mark.parametrize("damage_newest", [False, True], ids=["next step", "over a damaged one"])
def test_kill_before_every_operation(tmp_path: Path, damage_newest: bool) -> None:
    """Every point between two operations of a save that writes, retires and deletes; none is left to chance."""
    template = tmp_path / "template"
    for step in (1, 2, 3):
        save(template, step)
    if damage_newest:
        (template / "step-00000003" / "state.json").write_bytes(b"{}")
    step = 3 if damage_newest else 4
    seen = set()
    for operation in range(100):
        root = tmp_path / "root"
        shutil.copytree(template, root)

        def work(root: Path = root, operation: int = operation) -> None:
            warnings.simplefilter("ignore")
            die_at(operation)
            save(root, step)

        _, status = os.waitpid(fork(work), 0)
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        state, skipped = open_newest(root)
        assert state is not None
        assert state.step in (step - 1, step)
        assert_holds(state, state.step)
        # Only the one that was damaged before may be reported, and only until it is out of the way.
        assert [path.name for path, _ in skipped] in ([[], ["step-00000003"]] if damage_newest else [[]])
        seen.add(state.step)
        save(root, 5)
        assert not [name for name in names(root) if "." in name]
        shutil.rmtree(root)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert operation >= 12
    assert seen == {step - 1, step}


def test_order_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are durable before the new name, that before an old one loses its name, that before it is deleted."""
    for step in (1, 2):
        save(tmp_path, step)
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def record_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("rename", target.name))

    def record_rmtree(path: Path) -> None:
        events.append(("rmtree", path.name))
        rmtree(path)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_rmtree)
    path = save(tmp_path, 3)
    files = sorted(p.name for p in path.iterdir() if p.name != "manifest.json")
    assert sorted(events[: len(files)]) == [("fsync", name) for name in files]
    assert events[len(files) :] == [
        ("fsync", "manifest.json"),
        ("fsync", "step-00000003.partial"),
        ("rename", "step-00000003"),
        ("fsync", tmp_path.name),
        ("rename", "step-00000001.deleting"),
        ("fsync", tmp_path.name),
        ("rmtree", "step-00000001.deleting"),
    ]


def test_new_parents_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_directory", synced.append)
    durable.make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


# ---- damage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2; the newest has two tensor files or more."""
    for step in (1, 2):
        save(tmp_path, step)
    assert len(list((tmp_path / "step-00000002").glob("*.safetensors"))) >= 2
    return tmp_path


def assert_falls_back(root: Path, named: str) -> None:
    """Step 2 is refused in words that name what is wrong, and step 1 serves."""
    newest = root / "step-00000002"
    with pytest.raises(CheckpointError, match="step-00000002") as caught:
        open_checkpoint(newest)
    assert named in str(caught.value)
    state, skipped = open_newest(root)
    assert_holds(state, 1)
    assert skipped == [(newest, str(caught.value))]


def test_every_byte_of_every_file_is_protected(root: Path) -> None:
    rng = random.Random(1)
    for file in (root / "step-00000002").iterdir():
        good = file.read_bytes()
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= rng.randrange(1, 256)
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=file.name):
                open_checkpoint(file.parent)
        # The fall-back at the last position, and every single bit at a few.
        assert_falls_back(root, file.name)
        for position in rng.sample(range(len(good)), 16):
            for bit in range(8):
                bad = bytearray(good)
                bad[position] ^= 1 << bit
                file.write_bytes(bad)
                assert_falls_back(root, file.name)
        file.write_bytes(good)
    assert_holds(open_checkpoint(root / "step-00000002"), 2)


def test_every_truncation_and_any_growth_is_named(root: Path) -> None:
    for file in (root / "step-00000002").iterdir():
        good = file.read_bytes()
        for size in range(len(good)):
            file.write_bytes(good[:size])
            with pytest.raises(CheckpointError, match=file.name):
                open_checkpoint(file.parent)
        assert_falls_back(root, file.name)
        for more in (b"\0", b"\n", b" ", b"}"):
            file.write_bytes(good + more)
            assert_falls_back(root, file.name)
        file.write_bytes(good)


def test_every_missing_file_is_named(root: Path) -> None:
    for file in list((root / "step-00000002").iterdir()):
        good = file.read_bytes()
        file.unlink()
        assert_falls_back(root, file.name)
        file.write_bytes(good)


@pytest.mark.parametrize("name", ["tensors-00000-00009.safetensors", ".metadata", "state.json.bak"])
def test_extra_file_is_named(root: Path, name: str) -> None:
    shutil.copy(root / "step-00000001" / "state.json", root / "step-00000002" / name)
    assert_falls_back(root, name)


def test_file_of_another_checkpoint_is_named(root: Path) -> None:
    for file in list((root / "step-00000002").iterdir()):
        good = file.read_bytes()
        shutil.copy(root / "step-00000001" / file.name, file)
        assert_falls_back(root, file.name)
        file.write_bytes(good)


def test_unreadable_entry_is_named(root: Path) -> None:
    file = root / "step-00000002" / "state.json"
    file.unlink()
    file.mkdir()
    assert_falls_back(root, "state.json")


def test_all_damaged_is_told_apart_from_a_fresh_start(root: Path) -> None:
    for path in root.iterdir():
        (path / "manifest.json").unlink()
    state, skipped = open_newest(root)
    assert state is None
    assert [path.name for path, _ in skipped] == ["step-00000002", "step-00000001"]


# ---- planted files


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.mark), os.O_CREAT)


def reseal(path: Path) -> None:
    """Give a checkpoint a valid manifest for whatever it holds now."""
    files = {p.name: durable.file_digest(p) for p in path.iterdir() if p.name != "manifest.json"}
    (path / "manifest.json").write_bytes(replace(manifest.read_manifest(path), files=files).encode())


@pytest.mark.parametrize("sealed", [False, True], ids=["manifest unchanged", "manifest resealed"])
@pytest.mark.parametrize("name", ["evil.pkl", ".metadata", "state.json", "tensors-00000-00001.safetensors"])
def test_planted_pickle_is_refused_and_not_run(root: Path, name: str, sealed: bool) -> None:
    mark = root / "executed"
    (root / "step-00000002" / name).write_bytes(pickle.dumps(Evil(mark)))
    if sealed:
        reseal(root / "step-00000002")
    assert_falls_back_or_names(root, name)
    assert not mark.exists()


def assert_falls_back_or_names(root: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(root / "step-00000002")
    assert name in str(caught.value)
    state, skipped = open_newest(root)
    assert_holds(state, 1)
    assert len(skipped) == 1


def test_planted_manifest_is_refused_and_not_run(root: Path) -> None:
    mark = root / "executed"
    (root / "step-00000002" / "manifest.json").write_bytes(pickle.dumps(Evil(mark)))
    assert_falls_back(root, "manifest.json")
    assert not mark.exists()


def test_the_planted_pickle_would_have_run(tmp_path: Path) -> None:
    os.close(pickle.loads(pickle.dumps(Evil(tmp_path / "executed"))))
    assert (tmp_path / "executed").exists()


# ---- strays of other steps


def test_strays_of_other_steps_are_never_read_and_are_swept(root: Path) -> None:
    # Whole and sound under its litter name: still not a checkpoint.
    for step, suffix in ((7, "partial"), (8, "deleting")):
        stray = root / f"step-{step:08d}"
        shutil.copytree(save(root / "elsewhere", step), stray)
        stray.rename(stray.with_name(f"{stray.name}.{suffix}"))
    shutil.rmtree(root / "elsewhere")
    (root / "step-00000003.partial").mkdir()
    state, skipped = open_newest(root)
    assert_holds(state, 2)
    assert skipped == []
    save(root, 3)
    assert names(root) == ["step-00000002", "step-00000003"]


def test_partial_that_vanishes_while_it_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer by mistake sweeps the first one's work: the first is told, and nothing complete suffers."""
    write_file = checkpoint.write_file

    def swept_first(path: Path, chunks: Iterator[bytes]) -> durable.FileDigest:
        if path.name == "state.json":
            shutil.rmtree(path.parent)
        return write_file(path, chunks)

    monkeypatch.setattr(checkpoint, "write_file", swept_first)
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved.*No such file.*state\.json"):
        save(root, 3)
    assert_holds(open_newest(root)[0], 2)
    assert names(root) == ["step-00000001", "step-00000002"]


# ---- full disks and failing ones


def test_file_size_limit_at_every_size(root: Path) -> None:
    """The limit cuts the save off in each of its files in turn."""
    largest = max(p.stat().st_size for p in (root / "step-00000002").iterdir())

    def work() -> None:
        reached = set()
        for limit in range(0, largest, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError, match=r"step 3 could not be saved.*File too large") as caught:
                save(root, 3)
            reached.add(Path(str(caught.value).rstrip("'")).stem)
            assert names(root) == ["step-00000001", "step-00000002"]
        assert reached >= {"tensors-00000-00001", "state", "manifest"}

    assert_exits_well(fork(work))
    assert_holds(open_newest(root)[0], 2)
    save(root, 3)
    assert_holds(open_newest(root)[0], 3)


def mount_small_disk(path: Path, pages: int) -> bool:
    """Mount a tmpfs that only this process sees; False where that is not permitted."""
    libc = ctypes.CDLL(None)
    new_user, new_mounts, private = 0x10000000, 0x00020000, 0x44000
    if libc.unshare(new_mounts | (new_user if os.geteuid() else 0)):
        return False
    libc.mount(b"none", b"/", None, private, None)
    options = f"size={pages * resource.getpagesize()}".encode()
    return libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, options) == 0


@pytest.mark.parametrize("room", range(5))
def test_full_disk(tmp_path: Path, room: int) -> None:
    """A real ENOSPC with room for 0 to 4 of the five files: an error, the old one intact, the space free again."""
    skip = 77

    def work() -> None:
        num_files = len(list(save(tmp_path / "measure", 1).iterdir()))
        if not mount_small_disk(tmp_path, num_files + room):
            os._exit(skip)
        save(tmp_path, 1)
        for _ in range(3):
            with pytest.raises(CheckpointError, match="step 2 could not be saved.*No space left on device"):
                save(tmp_path, 2)
            assert names(tmp_path) == ["step-00000001"]
        assert_holds(open_newest(tmp_path)[0], 1)

    _, status = os.waitpid(fork(work), 0)
    if os.waitstatus_to_exitcode(status) == skip:
        pytest.skip("mounting a tmpfs is not permitted here")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir", "unlink"])
def test_every_operation_may_fail(root: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """An I/O error in each call in turn: always named, the newest always sound, and the next save recovers."""
    real = getattr(os, function)
    newest, failures = 2, 0
    for failing in range(20):
        remaining = failing

        def fail(*args: object, **kwargs: object) -> object:
            nonlocal remaining
            remaining -= 1
            if remaining == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            try:
                save(root, newest + 1)
                message = ""
            except CheckpointError as error:
                message = str(error)
        failures += bool(message)
        assert not message or "Input/output error" in message
        saved = not message or "is saved in" in message
        state, skipped = open_newest(root)
        assert skipped == []
        assert state is not None
        # An error after the rename leaves the new one in place, sound but perhaps not durable.
        assert state.step == newest + 1 if saved else state.step in (newest, newest + 1)
        newest = state.step + 1
        save(root, newest)
        assert_holds(open_newest(root)[0], newest)
        assert names(root) == [f"step-{newest - 1:08d}", f"step-{newest:08d}"]
        if remaining >= 0:
            break
    assert failures >= 1
    assert remaining >= 0
