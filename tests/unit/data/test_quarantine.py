"""Quarantine: each bad row listed once, all counted, and too many stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_core.data.quarantine import MIN_BAD_ROWS, Quarantine
from llava_core.errors import ConfigError, TrainingError


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(quarantine: Quarantine, indices: range, reason: str = "missing_image") -> None:
    for index in indices:
        quarantine.add(f"id-{index}", index, reason, "is not there")


def test_a_line_per_row_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.1)
    assert not path.exists()
    quarantine.add("a\nb\ud800", 3, "broken_image", 'says "no"\n')
    assert lines(path) == [
        {"id": "a\nb\ud800", "index": 3, "reason": "broken_image", "message": 'says "no"\n', "source": 0}
    ]


def test_a_row_met_again_is_counted_but_not_listed_again(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    fill(quarantine, range(3))
    fill(quarantine, range(3))
    assert quarantine.num_bad == 6
    assert len(lines(quarantine.path)) == 3


def test_duplicate_ids_are_different_rows(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    quarantine.add("same", 1, "missing_image", "")
    quarantine.add("same", 2, "missing_image", "")
    assert len(lines(quarantine.path)) == 2


def test_the_first_bad_rows_do_not_stop_a_run(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.01)
    fill(quarantine, range(MIN_BAD_ROWS - 1))
    quarantine.check()
    fill(quarantine, range(MIN_BAD_ROWS - 1, MIN_BAD_ROWS))
    with pytest.raises(TrainingError):
        quarantine.check()


def test_too_many_bad_rows_name_the_counts_and_the_file(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    quarantine.add_good(180)
    fill(quarantine, range(15))
    fill(quarantine, range(15, 20), "broken_image")
    quarantine.check()  # 20 of 200 is the limit, not above it
    fill(quarantine, range(20, 21))
    with pytest.raises(TrainingError, match="21 of 201") as caught:
        quarantine.check()
    assert "16 missing_image, 5 broken_image" in str(caught.value)
    assert str(quarantine.path) in str(caught.value)


def test_a_limit_of_zero_stops_at_the_first(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0)
    quarantine.add_good(1000)
    quarantine.check()
    fill(quarantine, range(1))
    with pytest.raises(TrainingError):
        quarantine.check()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_the_limit_is_a_fraction(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"0…1"):
        Quarantine(tmp_path / "q.jsonl", fraction)


def test_a_resumed_run_goes_on_counting_and_lists_nothing_twice(tmp_path: Path) -> None:
    """Rows 0-4 before the checkpoint, 5-9 after it; then killed, resumed, and 5-9 met again, and 10."""
    path = tmp_path / "q.jsonl"
    first = Quarantine(path, 0.5)
    first.add_good(50)
    fill(first, range(5))
    state = json.loads(json.dumps(first.state_dict()))
    first.add_good(7)
    fill(first, range(5, 10), "broken_image")

    second = Quarantine(path, 0.5)
    second.load_state_dict(state)
    assert (second.num_good, second.num_bad) == (50, 5)
    second.add_good(7)
    fill(second, range(5, 10), "broken_image")
    assert second.state_dict() == first.state_dict()
    fill(second, range(10, 11))
    fill(second, range(5))  # the next epoch
    assert [line["index"] for line in lines(path)] == list(range(11))


def test_a_line_cut_short_by_a_crash_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    fill(Quarantine(path, 0.5), range(3))
    content = path.read_bytes()
    for length in range(content.rfind(b"\n", 0, -1) + 1, len(content)):
        path.write_bytes(content[:length])
        resumed = Quarantine(path, 0.5)
        fill(resumed, range(3))
        assert path.read_bytes() == content


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.5)
    quarantine.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space"):
        quarantine.add("a", 0, "missing_image", "")
