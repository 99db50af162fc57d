"""What stands between Hydra and a run: friendlier command lines, and the resolvers of the configuration.

Importing this module registers the resolvers that `hydra_config/config.yaml` uses; the worker processes of a sweep
import it when they receive their first job, before they compose.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.processors import cores
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR, CONFIG_NAME, check_choices, explain, parts
from cutlayer.runtime.launching.sweeps.slots import visible_gpus
from cutlayer.runtime.run_folder import unique_name

if TYPE_CHECKING:
    from cutlayer.runtime.settings import RunConfig

# A part's refinements, `model.<part>.optimizer.lr=0.01` or with a name or a mapping for the whole section.
_REFINEMENT = re.compile(r"^(model\.(\w+)\.(?:optimizer|scheduler))(\.[^=]+)?=(.?)")
# Other mappings that take any key: which are right depends on a name in them, and the typed configuration checks it.
_OPTIONS = r"(?:model\.options|dataset\.options|dataset\.distribution_options)"
_OPEN = re.compile(rf"(?:optimizer|scheduler)\.[^=]+=|{_OPTIONS}(?:\.[^=]+)?=")
_SIZE = re.compile(r"^model\.auxiliary=(?=[^{])")
_MAX_JOBS = 8


# ---------------------------------------------------------------------- the command line


_BUDGET = re.compile(r"auto:\w+<=[\w.]+")


def preprocess(arguments: Iterable[str]) -> list[str]:
    """The command line as Hydra wants it.

    Keys below open mappings get Hydra's `++` (optimizer.momentum=0.9), and `model.auxiliary=linear` becomes
    `model.auxiliary.size=linear`, likewise `model.client.optimizer=sgd` its name. Values, sweeps too, stay as they are.

    Raises:
        ConfigError: a group set to null.
    """
    # argparse itself refuses settings on both sides of an option: `main.py seed=1 -m lr=0.1,0.2`.
    arguments = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    check_choices(arguments)
    return [_preprocess(argument) for argument in arguments]


def _preprocess(argument: str) -> str:
    argument = _SIZE.sub("model.auxiliary.size=", argument)
    is_open = bool(_OPEN.match(argument))
    if (found := _REFINEMENT.match(argument)) and found[2] in parts():
        is_open = True
        if not found[3] and found[4] not in ("", "{"):
            argument = f"{found[1]}.name={argument.partition('=')[2]}"
    key, equals, value = argument.partition("=")
    # The folder of a run has = and , in its name, which Hydra reads as its own signs unless they are quoted; so does
    # [::1]:50505, which begins like a list.
    is_folder = equals and re.search(r"[=,]", value) and os.path.exists(value)
    if is_folder or (key == "server" and value.startswith("[")):
        argument = f"{key}='{value}'"
    elif "<=" in value and "'" not in value:
        argument = f"{key}=" + _BUDGET.sub(r"'\g<0>'", value)  # Hydra has another use for the sign
    return f"++{argument}" if is_open else argument


def plain_values(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration, without Hydra's own part, as resolved plain containers."""
    values: dict[str, Any] = {}
    for key in composed:
        if key != "hydra":
            value = composed[key]
            is_node = OmegaConf.is_config(value)
            values[str(key)] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if is_node else value
    return values


def run_config(composed: DictConfig) -> "RunConfig":
    """The typed configuration of what Hydra composed; ConfigError if it is not valid."""
    from cutlayer.runtime.settings import RunConfig  # imports torch, which a mistake in a key need not wait for

    return RunConfig.from_mapping(plain_values(composed))


def load_config(overrides: Sequence[str] = ()) -> "RunConfig":
    """The configuration that `python main.py <overrides>` would run.

    Raises:
        ConfigError: any mistake, of the kinds that Hydra reports too.
    """
    prepared = preprocess(overrides)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            composed = compose(CONFIG_NAME, overrides=prepared)
        return run_config(composed)
    except Exception as error:
        line = explain(error, prepared)
        if line is None or isinstance(error, ConfigError):
            raise
        key, _, reason = line.partition(": ")
        raise ConfigError(key, NO_VALUE, reason) from error


# ---------------------------------------------------------------------- resolvers


def _parallel_jobs(jobs_per_gpu: int = 1, workers: int | str = 1, device: str = "auto") -> int:
    """Jobs of a sweep at a time: one for each slot of a GPU, or half as many as cores (two, if there are two) up to 8.

    Of jobs with several workers so many fewer: no process is without a core or a slot of its own. Of those whose
    workers are all cores one.
    """
    slots, there = 0 if device == "cpu" else len(visible_gpus()) * int(jobs_per_gpu), cores()
    # On GPUs `auto` is a worker for each that a job sees.
    each = max(1, workers) if isinstance(workers, int) else 1 if slots else there
    alone = min(slots, there) if slots else min(_MAX_JOBS, max(there // 2, min(there, 2)))
    return max(1, alone // each)


_sweep: dict[str, str] = {}


def _sweep_folder(save_dir: str) -> str:
    """The folder of the sweep's own files: one for each `save_dir` and process, however often it launches."""
    return _sweep.setdefault(save_dir, str(Path(save_dir).absolute() / "multirun" / unique_name()))


def _share(rounds: int, share: float) -> int:
    """A share of the rounds, to the nearest one and at least 1, for schedules that follow the length of a run."""
    return max(1, round(int(rounds) * float(share)))


def _by_round(value: int, per: str, warmup: int | None = 0) -> int | None:
    """A number of rounds, for a schedule that is stepped by them from the run's start on; null for another."""
    return None if per == "step" or warmup else value


def _rounds_of(epochs: int, local_epochs: int) -> int:
    """The rounds in which a client takes `epochs` local epochs in all, at `local_epochs` a round."""
    return max(1, round(int(epochs) / max(1, int(local_epochs))))


def _by_method(method: str, values: Mapping[str, Any], otherwise: Any) -> Any:
    """The value that is given for a method, for experiments whose methods differ in a key: `{mhmd:average}`."""
    return values.get(method, otherwise)


def _require(key: str, expected: str) -> None:
    """The value of a key that an experiment cannot know, and the command line has to give."""
    raise ConfigError(key, None, expected)


def register_resolvers() -> None:
    """Make the resolvers of `hydra_config/config.yaml` known to OmegaConf."""
    # Cached: the workers of a launcher take the folder over with the configuration that they are sent.
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("parallel_jobs", _parallel_jobs, replace=True)
    OmegaConf.register_new_resolver("share", _share, replace=True)
    OmegaConf.register_new_resolver("by_round", _by_round, replace=True)
    OmegaConf.register_new_resolver("rounds_of", _rounds_of, replace=True)
    OmegaConf.register_new_resolver("by_method", _by_method, replace=True)
    OmegaConf.register_new_resolver("require", _require, replace=True)


register_resolvers()
