"""A finished (or checkpointed) run taken up again from its folder, to measure something more of it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml

from runtime.config import ConfigError
from runtime.console import Progress, personal_rows, probe_rows, show_rows
from runtime.experiment import prepare_process, set_threads
from runtime.federation import CHECKPOINT_FOLDER, Federation
from runtime.files import MODEL_FILE, RESULTS
from runtime.locks import FileLock
from runtime.personalize import Personalized, personalize
from runtime.personalize import folder_of as personalized_in
from runtime.probe import Probed, probe
from runtime.probe import folder_of as probed_in
from runtime.probes import ProbeConfig
from runtime.run_folder import IDENTITY, LOCK
from runtime.settings import RunConfig

# What may differ from the run: where its data and this machine's device are, and what is measured.
MACHINE = (
    *("device", "threads", "eval_batch_size", "state_memory_mb", "progress"),
    *("dataset.root", "dataset.storage", "dataset.workers"),
)
CHANGEABLE = ("personalize.part", "personalize.epochs", "personalize.lr", *MACHINE)
PROBE_KEYS = tuple(f"probe.{field.name}" for field in fields(ProbeConfig) if field.name != "after")
# Sections of the configuration that runs of earlier versions lack.
_SECTIONS = ("personalize", "monitor", "probe")


def find_runs(above: Path) -> list[Path]:
    """The folder itself, or those below it, that hold a run with results.

    Raises:
        ConfigError: there is none.
    """
    if (above / RESULTS).is_file():
        return [above]
    found = sorted(path.parent for path in above.rglob(RESULTS)) if above.is_dir() else []
    if not found:
        raise ConfigError("run", str(above), f"the folder of a run, or a folder with runs below it ({RESULTS})")
    return found


def read_config(run: Path, changes: Mapping[str, Any], changeable: Sequence[str] = CHANGEABLE) -> RunConfig:
    """The run's configuration, with some keys changed.

    Args:
        changes: dotted keys, all of them ``changeable``, to their values.

    Raises:
        ConfigError: a key that cannot change, a bad value, or a folder without a readable ``config.yaml``.
    """
    for key in changes:
        if key not in changeable:
            raise ConfigError("key", key, "one that may be set for a run that is over", changeable)
    path = run / "config.yaml"
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("run", str(run), f"a folder with a readable config.yaml ({error})") from error
    if not isinstance(mapping, dict):
        raise ConfigError("run", str(run), "a folder with a readable config.yaml")
    values = cast(dict[str, Any], mapping)
    for section in _SECTIONS:
        values.setdefault(section, {})
    for key, value in changes.items():
        *above, last = key.split(".")
        section = values
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value
    return RunConfig.from_mapping(values)


@contextlib.contextmanager
def owned(run: Path) -> Generator[None]:
    """Own a run's folder for the length of the block.

    Raises:
        ConfigError: another process has it.
    """
    lock = FileLock.take(run / LOCK)
    if lock is None:
        raise ConfigError("run", str(run), "a run that no other process is using")
    try:
        yield
    finally:
        lock.release()


def restore(run: Path, config: RunConfig) -> Federation:
    """The run's federation as its last checkpoint left it.

    A run whose checkpoint was removed is taken up from its model, if one model is all that the method learns.

    Raises:
        ConfigError: nothing is left of what was learnt.
    """
    federation = Federation(config, run)
    if config.role == "server" and (federation.personal or config.dataset.distribution == "own"):
        raise ConfigError(
            "run", str(run), "a run in one process: this one's clients have their data or parts elsewhere"
        )
    recorded = (run / IDENTITY).read_text(encoding="utf-8").strip() if (run / IDENTITY).is_file() else None
    if federation.resume(recorded=recorded) is not None:
        return federation
    if not (run / MODEL_FILE).is_file() or (federation.personal and federation.population > 1):
        raise ConfigError("run", str(run), f"a run with its {CHECKPOINT_FOLDER} folder, which this one lacks")
    values = config.to_mapping()
    values["model"]["init"] = str(run)
    return Federation(RunConfig.from_mapping(values))


@contextlib.contextmanager
def taken_up(run: Path, config: RunConfig) -> Generator[tuple[Federation, Progress]]:
    """Own a run's folder for the length of the block, with the run's federation and a display of progress.

    Raises:
        ConfigError: as `owned` and `restore`.
    """
    with owned(run):
        prepare_process(config.torch_device())
        federation = restore(run, config)
        set_threads(config, federation)
        with Progress(federation.round, config.title, config.progress, done=federation.round) as progress:
            yield federation, progress


def personalize_run(run: Path, changes: Mapping[str, Any]) -> Personalized:
    """Personalise a run by its own ``personalize`` settings with ``changes``; shows its table.

    Raises:
        ConfigError: as `read_config`, `owned` and `restore`; or no part is named.
    """
    config = read_config(run, changes)
    if config.personalize.part is None:
        raise ConfigError("personalize.part", None, "what is fine-tuned", ("body", "head", "full"))
    with taken_up(run, config) as (federation, progress):
        found = personalize(federation, config.personalize, run, progress.clients)
    show_rows(personal_rows(found), personalized_in(run, config.personalize), config.title, config.progress)
    return found


def probe_run(run: Path, changes: Mapping[str, Any]) -> Probed:
    """Probe a run's features by its own ``probe`` settings with ``changes``; shows its table.

    Raises:
        ConfigError: as `read_config`, `owned`, `restore` and `probe`.
    """
    config = read_config(run, changes, (*PROBE_KEYS, *MACHINE))
    with taken_up(run, config) as (federation, progress):
        found = probe(federation, config.probe, run, progress.doing)
    show_rows(probe_rows(found), probed_in(run, config.probe), config.title, config.progress)
    return found
