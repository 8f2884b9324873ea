"""A run's data with something wrong in it, and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_core.config import RunConfig, build_config
from llava_core.testing.datasets import TinyParts, tiny_parts

LONG = " ".join(["blue"] * 400)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """40 rows, some of them bad. The model has no weights, which a check does not need."""
    parts = tiny_parts(tmp_path_factory.mktemp("parts"), num_rows=40)
    for folder in (parts.vision, parts.language):
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    rows = json.loads(parts.data.read_text())
    (parts.images / "3.png").write_bytes(b"no picture")
    (parts.images / "5.png").unlink()
    Image.new("P", (31, 47)).save(parts.images / "7.png")
    Image.new("CMYK", (50, 20)).save(parts.images / "8.png", format="JPEG")
    rows[10]["conversations"] = "Hello."
    rows[11]["conversations"][1]["value"] = LONG  # is cut
    rows[12]["conversations"][0]["value"] = f"<image>\n{LONG}"  # nothing is left to learn
    rows[15]["image"] = ["gone.png", "16.png"]  # one mark for two images
    rows[16]["id"] = "row2"
    parts.data.write_text(json.dumps(rows))
    return parts


BAD = {
    3: "broken_image",
    5: "missing_image",
    10: "malformed_row",
    12: "no_supervised_token",
    15: "image_count",
}


def settings(parts: TinyParts, output: Path, **changes: dict[str, Any]) -> RunConfig:
    """The config of a run on these parts; `changes` go into its sections."""
    given: dict[str, Any] = parts.settings(output)
    for section, values in changes.items():
        given[section] = {**given[section], **values}
    return build_config(given)
