"""RunConfig: a run's settings, from dataclass defaults, YAML files and the command line."""

from mega_scale.config.arguments import DEFAULT_CONFIG, load_config, local_paths, parse, refuse
from mega_scale.config.continued import changes, require_same
from mega_scale.config.files import save_config, to_yaml
from mega_scale.config.model_section import ModelSection, model_config
from mega_scale.config.run_config import RunConfig

__all__ = [
    "DEFAULT_CONFIG",
    "ModelSection",
    "RunConfig",
    "changes",
    "load_config",
    "local_paths",
    "model_config",
    "parse",
    "refuse",
    "require_same",
    "save_config",
    "to_yaml",
]
