"""Tensors in parts: however they are cut when saved, any box of them reads back with its bits."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_core.durable import file_digest
from llava_core.engine.parts import Part, Region, tiles
from llava_core.engine.processes import Processes
from llava_core.errors import CheckpointError
from llava_core.train.agreement import agree
from llava_core.train.checkpoint import open_checkpoint, open_newest, save_state

T = TypeVar("T")


@dataclass
class Meeting:
    """Where threads that stand for processes exchange values."""

    barrier: threading.Barrier
    values: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Thread(Processes):
    """A process that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(threading.Barrier(1)))

    def gather(self, value: T) -> list[T]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait(30)
        found = [self.meeting.values[rank] for rank in range(self.size)]
        self.meeting.barrier.wait(30)
        return found


def together(size: int, work: Callable[[Processes], T]) -> list[T | Exception]:
    """What `work` returns or raises in each of so many threads."""
    meeting = Meeting(threading.Barrier(size))

    def run(rank: int) -> T | Exception:
        try:
            return work(Thread(rank, size, rank, size, meeting=meeting))
        except (CheckpointError, ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def part(tensor: Tensor, region: Region) -> Part:
    return Part(tensor[region.within(Region.whole(tensor.shape))], region.offset, tuple(tensor.shape))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...], most: int = 5) -> list[Region]:
    """Boxes that make up a tensor, cut again and again across any dim; some are empty."""
    boxes = [Region.whole(shape)]
    for _ in range(draw(st.integers(0, most - 1)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.shape[dim]))
        for start, size in ((0, cut), (cut, box.shape[dim] - cut)):
            offset, extent = list(box.offset), list(box.shape)
            offset[dim], extent[dim] = offset[dim] + start, size
            boxes.append(Region(tuple(offset), tuple(extent)))
    return boxes


SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.uint16]))
def test_any_partition_reads_back_in_any_other(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    high = 2 if dtype is torch.bool else 256
    size = torch.Size(shape).numel() * dtype.itemsize
    whole = torch.randint(0, high, (size,), dtype=torch.uint8).view(dtype).reshape(shape)
    boxes = data.draw(partitions(shape))
    copies = data.draw(st.lists(st.sampled_from(boxes), max_size=2))  # held by several processes

    def save(process: Processes) -> Path:
        parts = {"t": part(whole, [*boxes, *copies][process.rank])}
        return save_state(Path(root), 1, parts, {}, keep=None, processes=process)

    with tempfile.TemporaryDirectory() as root:
        paths = together(len(boxes) + len(copies), save)
        assert set(paths) == {Path(root) / "step-00000001"}
        loaded = open_checkpoint(Path(root) / "step-00000001")
        assert (loaded.tensors["t"].dtype, loaded.tensors["t"].shape) == (dtype, shape)
        for box in data.draw(partitions(shape)):
            found = loaded.read("t", box)
            assert found.dtype == dtype
            assert torch.equal(bits(found), bits(part(whole, box).data))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), max_size=3).map(tuple))
def test_tiles_is_counting_each_value(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = [box for box in data.draw(partitions(shape)) if box.num_values]
    changed = data.draw(st.lists(st.sampled_from(boxes), max_size=len(boxes) + 1))
    for regions in (boxes, changed):
        counts = torch.zeros(shape)
        for region in regions:
            counts[region.within(Region.whole(shape))] += 1
        assert tiles(regions, shape) == bool((counts == 1).all())


def halves(rank: int, rows: int = 4) -> Part:
    """Half of a tensor of 4 rows, or all but a row or more of it."""
    return Part(torch.arange(8.0).reshape(4, 2)[2 * rank :][: rows // 2], (2 * rank, 0), (rows, 2))


def test_each_box_is_written_once_by_the_first_that_holds_it(tmp_path: Path) -> None:
    def save(process: Processes) -> Path:
        shared = {"count": Part(torch.tensor(7), (), ()), "half": halves(process.rank % 2)}
        return save_state(tmp_path, 1, shared, {"rank": process.rank}, keep=None, processes=process)

    together(4, save)
    path = tmp_path / "step-00000001"
    loaded = open_checkpoint(path)
    assert loaded.state == {"rank": 0}
    assert {name: [(file, box.offset) for file, box in t.parts] for name, t in loaded.manifest.tensors.items()} == {
        "count": [("tensors-00000-00001.safetensors", ())],
        "half": [("tensors-00000-00001.safetensors", (0, 0)), ("tensors-00001-00001.safetensors", (2, 0))],
    }
    assert len(list(path.iterdir())) == 4


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((halves(0), halves(0)), "do not make up a tensor"),
        ((halves(0), Part(torch.ones(3, 2), (1, 0), (4, 2))), "do not make up a tensor"),
        ((halves(0), Part(torch.ones(2, 2), (2, 0), (5, 2))), "a name must be one tensor's"),
        ((halves(0), Part(torch.ones(2, 2).half(), (2, 0), (4, 2))), "a name must be one tensor's"),
    ],
    ids=["a gap", "an overlap", "two shapes", "two dtypes"],
)
def test_parts_that_are_no_whole_are_refused_before_writing(
    parts: tuple[Part, Part], message: str, tmp_path: Path
) -> None:
    def save(process: Processes) -> Path:
        return save_state(tmp_path, 1, {"t": parts[process.rank]}, {}, keep=None, processes=process)

    for error in together(2, save):
        with pytest.raises(ValueError, match=message):
            raise error  # type: ignore[misc]
    assert list(tmp_path.iterdir()) == []


def test_what_one_process_cannot_store_is_an_error_in_all(tmp_path: Path) -> None:
    def save(process: Processes) -> Path:
        tensor = torch.ones(2, dtype=torch.complex64 if process.rank == 1 else torch.float32)
        parts = {f"t{process.rank}": Part(tensor, (0,), (2,))}
        return save_state(tmp_path, 1, parts, {}, keep=None, processes=process)

    first, second = together(2, save)
    assert isinstance(second, ValueError)
    assert isinstance(first, CheckpointError)
    assert "process 1: ValueError: tensor 't1' cannot be stored" in str(first)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "box", [Region((0, 0), (5, 2)), Region((3, 0), (2, 2)), Region((0, 1), (1, 2))], ids=["more", "beyond", "beside"]
)
def test_a_box_that_is_not_there_is_an_error(box: Region, tmp_path: Path) -> None:
    whole = torch.ones(4, 2)
    loaded = open_checkpoint(save_state(tmp_path, 1, {"t": part(whole, Region.whole((4, 2)))}, {}, keep=None))
    with pytest.raises(CheckpointError, match=r"values of t at .* are in no file"):
        loaded.read("t", box)


def test_processes_divide_the_verifying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": Part(torch.ones(10), (0,), (10,)) for i in range(6)}
    path = save_state(tmp_path, 1, tensors, {}, keep=None, max_file_bytes=40)
    hashed: list[str] = []
    monkeypatch.setattr(
        "llava_core.train.stored.file_digest", lambda file: (hashed.append(file.name), file_digest(file))[1]
    )
    together(4, lambda process: open_checkpoint(path, process))
    assert sorted(hashed) == sorted(file.name for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("number", range(1, 4))
def test_all_processes_fall_back_where_one_finds_damage(number: int, tmp_path: Path) -> None:
    tensors = {f"t{i}": Part(torch.full((10,), float(i)), (0,), (10,)) for i in range(3)}
    for step in (1, 2):
        save_state(tmp_path, step, tensors, {}, keep=None, max_file_bytes=40)
    damaged = tmp_path / "step-00000002" / f"tensors-00000-{number:05d}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    opened = [
        found for found in together(3, lambda process: open_newest(tmp_path, process)) if isinstance(found, tuple)
    ]
    assert [checkpoint and checkpoint.step for checkpoint, _ in opened] == [1, 1, 1]
    reasons = {reason for _, ((_, reason),) in opened}
    assert len(reasons) == 1
    assert f"process {number - 1}: {damaged} is damaged" in reasons.pop()


def test_boxes_of_any_two_cuts_overlap_as_index_sets_do() -> None:
    boxes = [Region((a, b), (c, d)) for a, b, c, d in itertools.product(range(3), range(2), range(3), range(1, 3))]
    for one, other in itertools.product(boxes, repeat=2):
        cells = [
            {tuple(index) for index in itertools.product(*(range(f, e) for f, e in zip(r.offset, r.end, strict=True)))}
            for r in (one, other)
        ]
        overlap = one.overlap(other)
        assert (overlap.num_values if overlap else 0) == len(cells[0] & cells[1])


def test_a_tensor_that_one_process_has_alone_is_saved(tmp_path: Path) -> None:
    def save(process: Processes) -> Path:
        own = {f"stage {process.rank}": Part(torch.tensor(process.rank), (), ())}
        return save_state(tmp_path, 1, own, {}, keep=None, processes=process)

    together(2, save)
    loaded = open_checkpoint(tmp_path / "step-00000001")
    assert {name: int(loaded.read(name)) for name in loaded.tensors} == {"stage 0": 0, "stage 1": 1}


def test_a_reason_is_told_once_with_all_whose_it_is() -> None:
    def fail(reasons: str) -> list[str]:
        def work(process: Processes) -> None:
            def refuse() -> None:
                raise CheckpointError(reasons[process.rank])

            agree(process, refuse if reasons[process.rank] != "-" else lambda: None)

        return [str(error) for error in together(len(reasons), work)]

    assert fail("x") == ["x"]
    assert fail("xxx") == ["x"] * 3
    assert fail("-x-x") == ["processes 1, 3: x"] * 4
    assert fail("x-y") == ["process 0: x; process 2: y"] * 3
