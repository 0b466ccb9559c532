"""The whole configuration of a run.

A run is a TOML file plus ``section.key=value`` words. Two rules hold everywhere: an unknown key is an error that
names the nearest right one, and a setting that would have no effect in this run is an error that says why
(``inert``). Where plain words are wanted instead of errors (writing the resolved file), the inert keys are left out.

Imports without torch.
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
from common.config.rules import inert
from common.config.schema import Config, ModelConfig, OptimizerConfig, RunConfig, SyncConfig, TaskConfig, TimeoutConfig

__all__ = [
    "Config",
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
    "inert",
    "load",
    "may_change",
    "meant_by",
    "read_toml",
    "reread",
    "resolved_toml",
]
