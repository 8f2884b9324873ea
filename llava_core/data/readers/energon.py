"""Data sets that `energon prepare` described: webdataset shards with a `.nv-meta` folder beside them.

`.nv-meta/dataset.yaml` says what a sample is and from which members its fields come, `split.yaml` which shards are for
training, `.info.json` (`.info.yaml` in older ones) how many samples each shard has. Source of the form:
Megatron-Energon, docs/source/basic/data_prep.md and flavors/webdataset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava_core.data.overlong import Overlong
from llava_core.data.readers import Content
from llava_core.data.readers.tar_samples import TarSample, TarSamples
from llava_core.data.readers.webdataset import (
    IMAGE_SUFFIXES,
    caption_turns,
    decode_json,
    decode_text,
    parse_sample,
    sample_images,
)
from llava_core.data.records import IMAGE_MARK, EmbeddedImage, Record, Turn, malformed, parse_text
from llava_core.errors import DataError

META_FOLDER = ".nv-meta"
USUAL_SPLIT = "train"
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
ACCESS = re.compile(r"([^[\]]+)((?:\[[^[\]]+\])*)")

FIELDS: Mapping[str, tuple[set[str], set[str]]] = {
    "VQA": ({"image", "context", "answers"}, {"answer_weights"}),
    "Captioning": ({"image", "caption"}, set()),
    "Crude": (set(), set()),
}
"""Kinds of samples that can be read, with the fields that they must and may map. Crude ones are as webdataset's."""


class EnergonReader:
    """The samples of one split. See `Reader`.

    Args:
        path: the folder that `.nv-meta` is in.
        split: by name; `train` if None, as in energon.

    Raises:
        DataError: as `TarSamples`; a description that is missing or cannot be honoured; a shard with more or fewer
            samples than were counted when it was prepared.
    """

    content: Content = "conversations"
    usual_overlong: Overlong = "truncate"

    def __init__(self, path: Path, *, split: str | None = None, index_folder: Path | None = None) -> None:
        self.path, self.split = path, split or USUAL_SPLIT
        self._kind, self._fields = _read_kind(path)
        shards, excluded = _read_split(path, self.split)
        left_out = [name for names in excluded.values() for name in names]
        self._samples = TarSamples([path / shard for shard in shards], shards, index_folder, left_out)
        self._check_counts(excluded)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def fingerprint(self) -> Mapping[str, str | int]:
        """See `describe_files`; and the `split`."""
        return {**self._samples.describe(self.path), "split": self.split}

    def read(self, index: int) -> Record:
        """Row `index`. See `Reader.read`; reasons `malformed_row`, `malformed_json` and those of `TarSamples.read`."""
        sample = self._samples.read(index)
        if self._kind == "Crude":
            return Record(sample.key, index, parse_sample(sample, index), sample_images(sample))
        image = EmbeddedImage(f"{sample.key}.image", self._image(sample, index))
        if self._kind == "Captioning":
            return Record(sample.key, index, caption_turns(self._text(sample, "caption", index)), (image,))
        question = self._text(sample, "context", index)
        if IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n{question}"
        turns = (Turn("human", question), Turn("assistant", self._answer(sample, index)))
        return Record(sample.key, index, turns, (image,))

    def _image(self, sample: TarSample, index: int) -> bytes:
        suffixes = [access[0] for access in self._fields["image"]]
        found = next((sample.members[suffix] for suffix in suffixes if suffix in sample.members), None)
        if found is None:
            raise malformed(index, sample.key, ", ".join(sample.members), f"an image .{' or .'.join(suffixes)}")
        return found

    def _text(self, sample: TarSample, field: str, index: int) -> str:
        return parse_text(self._value(sample, field, index), index, f"{sample.key}, {field}")

    def _answer(self, sample: TarSample, index: int) -> str:
        """The one answer, or of several the one of the highest weight, the first of those."""
        answers = self._value(sample, "answers", index)
        if isinstance(answers, str):
            return parse_text(answers, index, "answers")
        if not isinstance(answers, list) or not answers:
            raise malformed(index, f"{sample.key}, answers", answers, "a text or a list of texts")
        best = 0
        if "answer_weights" in self._fields:
            weights = self._value(sample, "answer_weights", index)
            numbers = isinstance(weights, list) and all(isinstance(weight, int | float) for weight in weights)
            if not isinstance(weights, list) or not numbers or len(weights) != len(answers):
                raise malformed(index, f"{sample.key}, answer_weights", weights, f"{len(answers)} numbers")
            best = weights.index(max(weights))
        return parse_text(answers[best], index, f"{sample.key}, answers[{best}]")

    def _value(self, sample: TarSample, field: str, index: int) -> object:
        """What the field's member holds, at the place in it that the field map says; of several, the first there is."""
        options = self._fields[field]
        suffix, *keys = next((access for access in options if access[0] in sample.members), options[-1])
        if suffix not in sample.members:
            raise malformed(index, sample.key, ", ".join(sample.members), f"a member .{suffix} for {field}")
        is_json = suffix.rpartition(".")[2] == "json"
        value = decode_json(sample, suffix, index) if is_json else decode_text(sample, suffix, index)
        for key in keys:
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]  # type: ignore[index]
            except (LookupError, TypeError, ValueError) as error:
                raise malformed(index, f"{sample.key}.{suffix}", value, f"something at [{key}], for {field}") from error
        return value

    def _check_counts(self, excluded: Mapping[str, Sequence[str]]) -> None:
        counted = _read_yaml(self.path, ".info.json", ".info.yaml").get("shard_counts")
        if not isinstance(counted, dict):
            raise DataError(f"{self.path / META_FOLDER}: the .info file has no shard_counts: run energon prepare again")
        for shard, found in zip(self._samples.names, self._samples.counts(), strict=True):
            expected = counted.get(shard)
            if not isinstance(expected, int) or not found <= expected <= found + len(excluded[shard]):
                raise DataError(
                    f"{self.path / shard} has {found} samples that are not excluded, and {expected} when it was "
                    "prepared: copy it again, or run energon prepare again if it was made anew"
                )


def expand_braces(name: str) -> list[str]:
    """`a{0..2}{x,y}` written out: a range keeps the zeros in front of its first number."""
    found = BRACES.search(name)
    if found is None:
        return [name]
    numbers = RANGE.fullmatch(found[1])
    parts = found[1].split(",")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        parts = [str(number).zfill(len(numbers[1])) for number in range(first, last + step, step)]
    names = [rest for part in parts for rest in expand_braces(name[: found.start()] + part + name[found.end() :])]
    return list(dict.fromkeys(names))  # braces within braces, expanded first, write the outer ones several times


def _read_kind(path: Path) -> tuple[str, Mapping[str, list[list[str]]]]:
    """What the samples are, and for each of their fields the members to look at, each with the keys to follow in it."""
    found = _read_yaml(path, "dataset.yaml", "dataset.json")
    typed = found.get("sample_type", found)
    name = typed.get("__class__") if isinstance(typed, dict) else None
    kind = re.sub("(Webdataset|Sample)$", "", str(name))
    where = path / META_FOLDER / "dataset.yaml"
    if kind not in FIELDS:
        raise DataError(f"{where} is of {name}; {', '.join(FIELDS)} samples can be read")
    for key in ("sample_loader", "part_filter"):
        if found.get(key):
            raise DataError(f"{where} has a {key}, which is code: describe the samples by a field_map")
    given = found.get("field_map") or {}
    needed, allowed = FIELDS[kind]
    if not isinstance(given, dict) or not needed <= given.keys() <= needed | allowed:
        raise DataError(
            f"{where} maps the fields {', '.join(map(str, given)) or 'none'}; {kind} needs "
            f"{', '.join(sorted(needed)) or 'none'}{' and may have ' + ', '.join(sorted(allowed)) if allowed else ''}"
        )
    fields = {
        str(field): [_access(where, option) for option in str(value).split(",")] for field, value in given.items()
    }
    for suffix, *keys in fields.get("image", []):
        if keys or suffix.rpartition(".")[2] not in IMAGE_SUFFIXES:
            raise DataError(f"{where}: image = {given['image']!r} names no image; expected e.g. jpg")
    return kind, fields


def _access(where: Path, option: str) -> list[str]:
    found = ACCESS.fullmatch(option.strip())
    if found is None:
        raise DataError(f"{where}: {option!r} in field_map is neither a suffix nor like json[0][value]")
    return [found[1].lower(), *(key for key in found[2].strip("[]").split("][") if key)]


def _read_split(path: Path, split: str) -> tuple[list[str], dict[str, list[str]]]:
    """The shards of a split, and for each the samples that are excluded of it, as `<shard>/<key>`."""
    found = _read_yaml(path, "split.yaml", "split.json")
    parts = found.get("split_parts")
    if not isinstance(parts, dict) or split not in parts:
        known = ", ".join(map(str, parts)) if isinstance(parts, dict) else "none"
        raise DataError(f"{path} has no split {split!r}; there are: {known}. Set split to one of them")
    excluded = dict.fromkeys(name for given in found.get("exclude") or [] for name in expand_braces(str(given)))
    shards = [name for given in parts[split] or [] for name in expand_braces(str(given)) if name not in excluded]
    if not shards:
        raise DataError(f"the split {split!r} of {path} has no shards")
    by_shard: dict[str, list[str]] = {shard: [] for shard in shards}
    for name in excluded:
        slashes = [position for position, character in enumerate(name) if character == "/"]
        shard = next((name[:position] for position in slashes if name[:position] in by_shard), None)
        if shard is not None:
            by_shard[shard].append(name)
    return shards, by_shard


def _read_yaml(path: Path, *names: str) -> dict[str, Any]:
    """The first of these files of `.nv-meta` that there is; JSON is YAML."""
    files = [path / META_FOLDER / name for name in names]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise DataError(f"{files[0]} is not there: run energon prepare, or choose the reader webdataset")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is {type(found).__name__}, expected a mapping")
    return found
