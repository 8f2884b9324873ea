"""Settings: typed, frozen, read from recipes and YAML files with overrides."""

from llava_core.config.load import build_config, load_config, merge, recipe_names, to_yaml
from llava_core.config.schema import RunConfig

__all__ = ["RunConfig", "build_config", "load_config", "merge", "recipe_names", "to_yaml"]
