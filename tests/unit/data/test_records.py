"""Rows of LLaVA's JSON become records, or say what is wrong with them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.data.records import Record, Turn, modality_length, parse_record, word_length
from llava_core.errors import BadRow

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def test_a_row_of_llava_instruct() -> None:
    row = {"id": "000000033471", "image": "coco/000000033471.jpg", "conversations": TURNS, "model": ""}
    turns = (Turn("human", "<image>\nWhat is it?"), Turn("assistant", "A cat."))
    assert parse_record(row, 7) == Record("000000033471", 7, turns, ("coco/000000033471.jpg",))


@pytest.mark.parametrize(("given_id", "expected"), [(5, "5"), ("a", "a"), (None, "row-3"), ("", "")])
def test_ids(given_id: object, expected: str) -> None:
    assert parse_record({"id": given_id, "conversations": TURNS}, 3).id == expected


def test_absent_id() -> None:
    assert parse_record({"conversations": TURNS}, 3).id == "row-3"


@pytest.mark.parametrize(
    ("image", "expected"), [("a.jpg", ("a.jpg",)), (["a.jpg", "b.jpg"], ("a.jpg", "b.jpg")), ([], ()), (None, ())]
)
def test_images(image: object, expected: tuple[str, ...]) -> None:
    assert parse_record({"image": image, "conversations": TURNS}, 0).images == expected


def test_names_of_the_roles() -> None:
    turns = [{"from": "user", "value": "a"}, {"from": "assistant", "value": ""}]
    assert parse_record({"conversations": turns}, 0).turns == (Turn("human", "a"), Turn("assistant", ""))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ([], "the row is list"),
        (None, "the row is missing or null"),
        ({}, "conversations is missing"),
        ({"conversations": []}, "conversations is list"),
        ({"conversations": "hello"}, "conversations is str 'hello'"),
        ({"conversations": ["hello"]}, r"conversations\[0\] is str"),
        ({"conversations": [*TURNS, {"from": "system", "value": ""}]}, r"conversations\[2\].from is str 'system'"),
        ({"conversations": [{"value": ""}]}, r"conversations\[0\].from is missing"),
        ({"conversations": [{"from": ["gpt"], "value": ""}]}, r"conversations\[0\].from is list"),
        ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value is missing"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\].value is int 3"),
        ({"conversations": [{"from": "gpt", "value": "\ud83d"}]}, r"conversations\[0\].value is not valid Unicode"),
        ({"id": True, "conversations": TURNS}, "id is bool True"),
        ({"id": 1.5, "conversations": TURNS}, "id is float"),
        ({"image": 3, "conversations": TURNS}, "image is int 3"),
        ({"image": "", "conversations": TURNS}, "image is str ''"),
        ({"image": ["a", None], "conversations": TURNS}, r"image\[1\] is missing or null"),
    ],
)
def test_malformed_rows_name_the_row_and_the_key(row: object, named: str) -> None:
    with pytest.raises(BadRow, match=f"row 12: {named}") as caught:
        parse_record(row, 12)
    assert caught.value.reason == "malformed_row"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "image", "conversations", "from", "value"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(values)
def test_any_json_is_a_record_or_a_bad_row(row: object) -> None:
    try:
        record = parse_record(row, 0)
    except BadRow as error:
        json.dumps({"reason": error.reason, "message": error.message}).encode()
    else:
        assert record.turns


def test_lengths_are_those_of_the_original() -> None:
    """Counted by hand: the mark is followed by white space, so it is a word."""
    with_image = parse_record({"image": "a.jpg", "conversations": TURNS}, 0)
    assert word_length(with_image) == 6
    assert modality_length(with_image) == 6
    assert modality_length(parse_record({"conversations": TURNS}, 0)) == -6
