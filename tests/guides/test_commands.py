"""The commands of docs/guides.md are accepted, and each recipe of a guide is tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from llava_core.config import RunConfig, load_config
from llava_core.config.section import Section
from tests.guides.setups import SETUPS

PAGE = (Path(__file__).parents[2] / "docs" / "guides.md").read_text()
COMMANDS = re.findall(r"^llava-core train ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)

OURS = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("|")]
SETTINGS = sorted(set(re.findall(r"`([a-z]+\.[a-z_]+)(?:=[^`]*)?`", " ".join(OURS))))


def arguments(command: str) -> tuple[str, list[str]]:
    """Recipe and settings of a command."""
    recipe, *rest = shlex.split(command.replace("\\\n", " "))
    assert rest[:2] == ["--nproc", "8"]
    return recipe, rest[2:]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_settings_are_a_config(command: str) -> None:
    recipe, overrides = arguments(command)
    assert load_config(recipe, overrides).output.parts[0] == "runs"


def test_the_recipes_are_those_that_the_tests_train() -> None:
    assert [arguments(command)[0] for command in COMMANDS] == [setup.recipe for setup in SETUPS.values()]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_it_names_exists(setting: str) -> None:
    section, key = setting.split(".")
    kinds = get_args(RunConfig.model_fields[section].annotation) or (RunConfig.model_fields[section].annotation,)
    assert any(key in kind.model_fields for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
