"""A recipe's name or a YAML file, plus `key=value` overrides, to a RunConfig; each mistake as one message."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from llava_core.config.schema import RunConfig
from llava_core.errors import ConfigError

RECIPES = "llava_core.config.recipes"


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files(RECIPES).iterdir() if p.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a recipe by name, or of a YAML file, with dotted `key=value` overrides.

    Raises:
        ConfigError: listing every problem: unknown keys with the nearest that exists, wrong types, missing values.
    """
    return build_config(merge(source, overrides))


def merge(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings as given, not yet checked."""
    bad = [item for item in overrides if "=" not in item or item.startswith(("-", "="))]
    if bad:
        raise ConfigError(f"override {bad[0]!r}: expected key=value, e.g. optimizer.learning_rate=2e-5.")
    try:
        given = OmegaConf.load(io.StringIO(_read(source)))
        if not isinstance(given, DictConfig):
            raise ConfigError(f"{source}: expected a mapping of settings, found a list.")
        merged = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ConfigError(f"{source}: {error}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def build_config(settings: dict[str, Any]) -> RunConfig:
    """The checked config.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"the config cannot be used:\n{problems}") from error


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML that `load_config` reads back to an equal one."""
    return settings_to_yaml(config.model_dump(mode="json"))


def settings_to_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, checked or not."""
    return OmegaConf.to_yaml(OmegaConf.create(settings))


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config may have."""
    for name, info in model.model_fields.items():
        section = next((t for t in (info.annotation, *get_args(info.annotation)) if _is_section(t)), None)
        if section is None:
            yield prefix + name
        else:
            yield from known_keys(section, f"{prefix}{name}.")


def _read(source: str) -> str:
    if source in recipe_names():
        return (resources.files(RECIPES) / f"{source}.yaml").read_text()
    path = Path(source)
    if path.is_file():
        return path.read_text()
    close = difflib.get_close_matches(source, recipe_names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{source!r} is neither a recipe nor a file.{hint} Recipes: {', '.join(recipe_names())}; or give a YAML file."
    )


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key.{_nearest(key)}"
    if problem["type"] == "missing":
        return f"{key}: not set, and it has no default. Add it to the file, or pass {key}=…"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}."
    return f"{key} = {problem['input']!r}: {message}."


def _nearest(key: str) -> str:
    keys = list(known_keys())
    leaves = {known.rpartition(".")[2]: known for known in keys}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    by_leaf = difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.8)
    if by_leaf:
        close = [leaves[by_leaf[0]]]
    return f" Did you mean {close[0]!r}?" if close else f" Sections: {', '.join(RunConfig.model_fields)}."


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
