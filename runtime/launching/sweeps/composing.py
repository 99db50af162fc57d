"""The configurations of a sweep's jobs: what their choices of files come to is composed once, and not for each job.

Hydra reads, parses and merges some twenty files for every job, and twice: before the sweep begins, and where it runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher  # pyright: ignore[reportMissingTypeStubs]
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cutlayer.runtime.launching.hydra_errors import groups

# A key with a value, for which no file is chosen.
_VALUE = re.compile(r"(?:\+\+)?([A-Za-z_]\w*)((?:\.\w+)*)=")
_MOST = 100
_composed: dict[tuple[Any, ...], DictConfig] = {}


def compose_quickly(context: HydraContext) -> None:
    """Let a sweep's configurations be composed in less time, here and where its context is sent."""
    if not isinstance(context.config_loader, Remembering):
        context.config_loader = cast(ConfigLoader, Remembering(context.config_loader))


class ParallelLauncher(JoblibLauncher):
    """Joblib's, whose jobs' configurations are composed quickly."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives to every launcher."""
        compose_quickly(hydra_context)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)


class Remembering:
    """A loader that sets a job's values in a copy of what its choices of files came to before; else it is Hydra's own.

    Whatever is not plainly a value is left to Hydra, and so is every mistake.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that is being unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration of the job with these overrides."""
        try:
            config = self._with_values(master_config, [_parsed(text) for text in sweep_overrides])
        except (HydraException, OmegaConfBaseException):
            config = None
        if config is None:
            return self._loader.load_sweep_config(master_config, sweep_overrides)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def _with_values(self, master: DictConfig, overrides: Sequence[Override]) -> DictConfig | None:
        """None where Hydra has to compose it."""
        values = [each for each in overrides if _is_value(str(each.input_line))]
        if not values or any(each.is_sweep_override() or each.is_hydra_override() for each in overrides):
            return None
        chosen = [str(each.input_line) for each in overrides if each not in values]
        config = self._of_files(master, chosen)
        for each in values:
            OmegaConf.update(config, each.key_or_group, each.value(), merge=True, force_add=each.is_force_add())
        hydra, naming = config.hydra, config.hydra.job.config.override_dirname
        hydra.overrides.task = [each.input_line for each in overrides]
        with open_dict(hydra):
            hydra.job.override_dirname = get_overrides_dirname(
                list(overrides), naming.exclude_keys, naming.item_sep, naming.kv_sep
            )
        return config

    def _of_files(self, master: DictConfig, chosen: list[str]) -> DictConfig:
        key = (master.hydra.job.config_name, *master.hydra.overrides.hydra, None, *chosen)
        if key not in _composed:
            if len(_composed) >= _MOST:
                _composed.clear()
            _composed[key] = self._loader.load_sweep_config(master, chosen)
        return copy.deepcopy(_composed[key])


def _is_value(override: str) -> bool:
    found = _VALUE.match(override)
    return found is not None and (bool(found[2]) or found[1] not in groups())


@lru_cache(10_000)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
