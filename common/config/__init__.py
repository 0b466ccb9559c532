"""The whole configuration of a run: a TOML file plus ``section.key=value`` words.

An unknown key is an error that names the nearest right one, and a setting without effect in this run is an error that
says why (``unused_settings``); the resolved file leaves such keys out. Imports without torch.
"""

from common.config.reading import (
    build,
    changed,
    commented_toml,
    described,
    fields,
    load,
    may_change,
    meant_by,
    read_toml,
    reread,
    resolved_toml,
)
from common.config.rules import unused_settings
from common.config.schema import (
    Config,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SyncConfig,
    TaskConfig,
    TimeoutConfig,
)

__all__ = [
    "Config",
    "LearnerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SyncConfig",
    "TaskConfig",
    "TimeoutConfig",
    "build",
    "changed",
    "commented_toml",
    "described",
    "fields",
    "load",
    "may_change",
    "meant_by",
    "read_toml",
    "reread",
    "resolved_toml",
    "unused_settings",
]
