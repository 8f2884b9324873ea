"""A recipe's name or a YAML file, plus `key=value` overrides, to a RunConfig; each mistake as one message."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from llava_core.config.schema import RunConfig
from llava_core.config.section import NOT_GIVEN
from llava_core.errors import ConfigError

RECIPES = "llava_core.config.recipes"


class IncompleteConfig(ConfigError):
    """A config with nothing wrong but values that are still to be given."""


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files(RECIPES).iterdir() if p.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = (), *, options: Mapping[str, str] | None = None) -> RunConfig:
    """The config of a recipe by name, or of a YAML file, with dotted `key=value` overrides.

    Args:
        overrides: a path or a text is taken as it stands, except that `null` is none; any other value is read as YAML.
        options: texts by dotted key, set last and exactly as they are.

    Raises:
        ConfigError: listing every problem: unknown keys with the nearest that exists, wrong types, missing values.
    """
    return build_config(merge(source, overrides, options=options))


def merge(source: str, overrides: Sequence[str] = (), *, options: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The settings as given, not yet checked; arguments as for `load_config`."""
    settings = _parse_file(source)
    for item in overrides:
        key, value = _parse_override(item)
        settings = _set(settings, key, value, f"override {item!r}")
    for key, text in (options or {}).items():
        if not text:
            raise ConfigError(f"{key} is given as an empty text; expected a value.")
        settings = _set(settings, key, _literal(text), f"{key} = {text!r}")
    try:
        container = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}{' with its overrides' if overrides else ''}: {error}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def build_config(settings: dict[str, Any]) -> RunConfig:
    """The checked config.

    Raises:
        IncompleteConfig: every problem is a value that is still to be given.
        ConfigError: as `load_config`.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        incomplete = all(problem["type"] in ("missing", NOT_GIVEN) for problem in error.errors())
        kind = IncompleteConfig if incomplete else ConfigError
        raise kind(f"the config cannot be used:\n{problems}") from error


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML that `load_config` reads back to an equal one."""
    return settings_to_yaml(config.model_dump(mode="json"))


def settings_to_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, checked or not."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(settings)))


def known_keys() -> Iterator[str]:
    """Every dotted key that a config may have."""
    return (key for key, _ in _typed_keys(RunConfig))


def _typed_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its type."""
    for name, info in model.model_fields.items():
        section = next((t for t in (info.annotation, *get_args(info.annotation)) if _is_section(t)), None)
        if section is None or get_origin(info.annotation) is tuple:
            yield prefix + name, info.annotation
        if section is not None:
            yield from _typed_keys(section, f"{prefix}{name}.")


def _parse_file(source: str) -> DictConfig:
    try:
        given = OmegaConf.load(io.StringIO(_read(source)))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{source}: expected a mapping of settings, found a list.")
    return given


def _parse_override(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"override {item!r}: expected key=value, e.g. optimizer.learning_rate=2e-5.")
    if _is_text(key):
        if not text:
            raise ConfigError(f"override {item!r}: there is nothing after the =; write {key}=null for none.")
        return key, None if text == "null" else _literal(text)
    try:
        return key, OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")
    except (OmegaConfBaseException, YAMLError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(f"override {item!r}: its value cannot be read as YAML: {reason}.") from error


def _set(settings: DictConfig, key: str, value: Any, said: str) -> DictConfig:
    """The settings with one more; a mapping is merged into the one that is there."""
    one = OmegaConf.create()
    try:
        if without_numbers(key) != key:  # within a list, which merging would replace
            merged: Any = settings.copy()
            OmegaConf.update(merged, key, value)
        else:
            OmegaConf.update(one, key, value)
            merged = OmegaConf.merge(settings, one)
    except (OmegaConfBaseException, TypeError) as error:  # a TypeError where a section is put in a list's place
        raise ConfigError(f"{said} cannot be set: {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _is_text(key: str) -> bool:
    """Whether a key's value is a path or any text, which YAML must not read: it would cut at ` #` and split at `: `."""
    types, key = dict(_typed_keys(RunConfig)), without_numbers(key)
    kind, parent = types.get(key), types.get(key.rpartition(".")[0])
    if kind is None and get_origin(parent) is dict:
        kind = get_args(parent)[1]
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return set(options) <= {Path, str, NoneType}


def _literal(value: Any) -> Any:
    """A value whose texts OmegaConf takes as they are, where it would follow `${…}` as a reference."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _read(source: str) -> str:
    if source in recipe_names():
        return (resources.files(RECIPES) / f"{source}.yaml").read_text(encoding="utf-8")
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8")
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
    if problem["type"] in ("value_error", NOT_GIVEN):
        return f"{key}: {message}."
    return f"{key} = {problem['input']!r}: {message}."


def _nearest(key: str) -> str:
    keys = list(known_keys())
    section, _, leaf = key.rpartition(".")
    general = without_numbers(section)
    # A key of the same section goes before one of that name elsewhere.
    leaves = {known.rpartition(".")[2]: known for known in sorted(keys, key=lambda k: k.rpartition(".")[0] == general)}
    close = difflib.get_close_matches(without_numbers(key), keys, n=1, cutoff=0.5)
    by_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
    if by_leaf:
        close = [leaves[by_leaf[0]]]
    if not close:
        return f" Sections: {', '.join(RunConfig.model_fields)}."
    parent, _, name = close[0].rpartition(".")
    return f" Did you mean {(f'{section}.{name}' if parent and parent == general else close[0])!r}?"


def without_numbers(key: str) -> str:
    """The key of a list's entry as that of every entry."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
