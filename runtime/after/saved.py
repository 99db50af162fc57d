"""A finished (or checkpointed) run restored from its folder, to measure something more of it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from cutlayer.runtime.after.generate import Generated, continued, generate, generated_folder, settled
from cutlayer.runtime.after.personalize import Personalized, personalize
from cutlayer.runtime.after.personalize import personalized_folder as personalized_in
from cutlayer.runtime.after.probe import Probed, probe
from cutlayer.runtime.after.probe import probed_folder as probed_in
from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.ground.config import ConfigError, plain, show
from cutlayer.runtime.ground.files import MODEL_FILE, RESULTS
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.ground.process import prepare_process, set_threads
from cutlayer.runtime.ground.reading import MissingError, check_links, inside, read_text, read_yaml
from cutlayer.runtime.ground.text import print_lines
from cutlayer.runtime.keys import identity_of, uses_of
from cutlayer.runtime.records.console import Progress, show_rows
from cutlayer.runtime.rounds.clients import MakeClients
from cutlayer.runtime.rounds.federation import CHECKPOINT_FOLDER, Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.place import ClientsPlace, here
from cutlayer.runtime.run_folder import IDENTITY, LOCK
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.trust import FOLDER_RULES, MODEL_BYTES, RULES, Limit, Named, check, check_made, covered, to_take

_RULES = {**RULES, **FOLDER_RULES}
_USES = uses_of(RunConfig)
# What may differ from the run: where its data and this machine's device are, and what is measured.
MACHINE = tuple(key for key, use in _USES.items() if use.later)
CHANGEABLE = (*(key for key in _USES if key.startswith("personalize.")), *MACHINE)
PROBE_KEYS = tuple(key for key in _USES if key.startswith("probe.") and key != "probe.after")
GENERATE_KEYS = tuple(key for key in _USES if key.startswith("generate.") and key != "generate.after")
# Sections of the configuration that runs of earlier versions lack.
_SECTIONS = ("personalize", "monitor", "probe", "generate")
# What the folder of a run says in vain: where it was kept and shown, and who was where.
_NOT_TAKEN = tuple(
    key for key, use in _USES.items() if use.scope in ("machine", "record") and "." not in key and key not in _RULES
)
# Of these what may be changed for a run that is over.
_OWN = ("workers", "engine", "data_changed")
_PATH = 4096
PlaceOf = Callable[[RunConfig], ClientsPlace]


def folders_with_results(above: Path) -> list[Path]:
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


class Saved(NamedTuple):
    """What a run's folder says of itself, checked, and what may be done for it beyond its folder.

    Attributes:
        config: of the run. over_network: whether its clients were elsewhere.
        download: whether published data that are missing may be downloaded. limit: how large its model may be.
    """

    config: RunConfig
    over_network: bool
    download: bool
    limit: Limit | None


def read_config(
    run: Path, changes: Mapping[str, Any], changeable: Sequence[str] = CHANGEABLE, own: RunConfig | None = None
) -> Saved:
    """The run's configuration, with some keys changed.

    The folder may be anyone's, so what it says is checked like what a server says to its client, see `runtime.trust`.
    Keys that are not ``changeable`` name values of the run that would not be taken otherwise, and have to equal them.

    Args:
        changes: dotted keys to their values, as on the command line.
        own: a configuration of this process's own, whose values count as named.

    Raises:
        ConfigError: a key that cannot change, a bad value, one that the command line has to name, or a folder without
            a readable ``config.yaml``.
    """
    values = read_yaml(run, "config.yaml")
    transport = values.get("transport")
    over_network = isinstance(transport, dict) and cast(dict[str, Any], transport).get("name") == "grpc"
    named = _naming(changes, values, changeable, own)
    # What concerns neither the result nor this machine is not taken at all.
    for key in _NOT_TAKEN:
        values.pop(key, None)
    for section in _SECTIONS:
        values.setdefault(section, {})
    source = "the run's folder"
    for key, value in changes.items():
        if key in changeable and key not in _OWN:
            *above, last = key.split(".")
            section = values
            for name in above:
                if not isinstance(section.get(name), dict):
                    section[name] = {}
                section = section[name]
            section[last] = value
    root = _root(values)
    check(values, named, source, _RULES)
    if not named("dataset.root", root):
        _check_root(root, source)
    values["dataset"]["root"] = root
    values |= {"save_dir": str(run), "resume": "never", "jobs_per_gpu": 1, "logger": {}}
    values |= {key: changes[key] for key in _OWN if key in changes}
    values |= {"transport": "grpc", "role": "server"} if over_network else {"transport": "local"}
    config = RunConfig.from_mapping(values)
    check_made(config, named, source)
    name = config.model.name
    limit = None if named("model.name", name) else Limit(MODEL_BYTES, f"if you trust it, add: model={name}")
    return Saved(config, over_network, "dataset.root" in changes, limit)


def _naming(
    given: Mapping[str, Any], values: Mapping[str, Any], changeable: Sequence[str], own: RunConfig | None
) -> Named:
    """What the command line names, each of it as the run has it if that cannot be changed.

    Raises:
        ConfigError: the run has another value.
    """
    names: dict[str, Any] = {}
    for key, value in given.items():
        if key in changeable:
            names[key] = value
            continue
        full = f"{key}.name" if key in ("model", "dataset") else key
        found = _value(values, full)
        # Of several runs each may have another model.
        allowed = cast(list[Any], value) if full == "model.name" and isinstance(value, list) else [value]
        if found is None or not any(_same(each, found) for each in allowed):
            if found is None or not key.startswith(("model", "dataset")):
                raise ConfigError("key", key, "one that may be set for a run that is over", changeable)
            raise ConfigError(key, cast(object, value), f"{show(found)}, as in the run")
        names[full] = found
    mine = {} if own is None else own.to_mapping()

    def named(key: str, value: object) -> bool:
        if covered(names, key):
            return True
        at = _value(mine, key)
        return at is not None and _same(at, value)

    return named


def _value(values: Mapping[str, Any], key: str) -> Any:
    """What a dotted key comes to; None where there is nothing."""
    found: Any = values
    for name in key.split("."):
        found = cast(Mapping[str, Any], found).get(name) if isinstance(found, Mapping) else None
    return found


def _same(here: object, there: object) -> bool:
    return plain(here) == plain(there)


def _root(values: dict[str, Any]) -> str:
    """Take the folder of the data out of a run's configuration."""
    dataset = values.get("dataset")
    root = cast(dict[str, Any], dataset).pop("root", "data") if isinstance(dataset, dict) else "data"
    if not isinstance(root, str) or not root.strip() or "\0" in root or len(root) > _PATH:
        raise ConfigError("dataset.root", root, "a folder")
    return root


def _check_root(root: str, source: str) -> None:
    """Refuse what is no folder. A folder's files are read as images and labels and as nothing else."""
    with contextlib.suppress(OSError):  # what is missing is reported when it is read
        if not stat.S_ISDIR(os.stat(os.path.expanduser(root)).st_mode):
            expected = f"a folder, as only {source} says so; {to_take([('dataset.root', root)])}"
            raise ConfigError("dataset.root", root, expected)


@contextlib.contextmanager
def owning(run: Path) -> Generator[None]:
    """Own a run's folder for the length of the block.

    Raises:
        ConfigError: another process has it, or something in it leads out of it.
    """
    check_links(run)
    lock = FileLock.take(run / LOCK)
    if lock is None:
        raise ConfigError("run", str(run), "a run that no other process is using")
    try:
        yield
    finally:
        lock.release()


def restore(run: Path, saved: Saved, clients: MakeClients = LocalClients) -> Federation:
    """The run's federation as its last checkpoint left it.

    A run whose checkpoint was removed is restored from its model, if one model is all that the method learns.

    Args:
        clients: makes its clients.

    Raises:
        ConfigError: nothing is left of what was learnt, or what is left is not of such a run.
    """
    eager = replace(saved.config, compile=False)  # which a processor refuses, and a short training does not need
    config, data = prepared(eager, limit=saved.limit, download=saved.download)
    federation = Federation(config, run, dataset=data, clients=clients)
    setup = federation.setup
    if saved.over_network and (setup.personal or not config.dataset.divided):
        raise ConfigError(
            "run", str(run), "a run in one process: this one's clients have their data or parts elsewhere"
        )
    try:
        recorded = read_text(run, IDENTITY).split()
    except MissingError:
        recorded = []
    _check_base(run, config, recorded)
    try:
        resumed = federation.resume(recorded=recorded) is not None
    except ConfigError:
        raise
    except Exception as error:  # whatever a file that was not written here leads to
        expected = f"a {CHECKPOINT_FOLDER} of this run ({type(error).__name__}: {error})"
        raise ConfigError("run", str(run), expected) from error
    if resumed:
        return federation
    if not (run / MODEL_FILE).is_file() or (setup.personal and setup.population > 1):
        raise ConfigError("run", str(run), f"a run with its {CHECKPOINT_FOLDER} folder, which this one lacks")
    init = inside(run, MODEL_FILE)
    return Federation(replace(config, model=replace(config.model, init=init)), dataset=data, clients=clients)


@contextlib.contextmanager
def restored(run: Path, saved: Saved, place: PlaceOf = here) -> Generator[tuple[Federation, Progress]]:
    """Own a run's folder for the length of the block, with the run's federation and a display of progress.

    Args:
        place: tells where the federation's clients are.

    Raises:
        ConfigError: as `owning` and `restore`.
    """
    config = saved.config
    with owning(run):
        at = place(config)
        prepare_process(config.torch_device(), config.arithmetic)
        federation = restore(run, saved, at.clients)
        set_threads(config.threads, federation.setup.device, federation.setup.parameters, at.processes)
        showing = Progress(federation.round, config.title, config.progress, done=federation.round)
        with at.connected(federation, None), showing as progress:
            yield federation, progress


def personalize_run(
    run: Path, changes: Mapping[str, Any], own: RunConfig | None = None, *, place: PlaceOf = here
) -> Personalized:
    """Personalise a run by its own ``personalize`` settings with ``changes``; shows its table.

    Args:
        changes, own: as of `read_config`. place: as of `restored`.

    Raises:
        ConfigError: as `read_config`, `owning` and `restore`; or no part is named.
    """
    saved = read_config(run, changes, own=own)
    config = saved.config
    if config.personalize.part is None:
        raise ConfigError("personalize.part", None, "what is fine-tuned", ("body", "head", "full"))
    with restored(run, saved, place) as (federation, progress):
        found = personalize(federation, config.personalize, run, progress.clients)
    show_rows(found.section().rows, personalized_in(run, config.personalize), config.title, config.progress)
    return found


def probe_run(run: Path, changes: Mapping[str, Any], own: RunConfig | None = None) -> Probed:
    """Probe a run's features by its own ``probe`` settings with ``changes``; shows its table.

    Args:
        changes, own: as of `read_config`.

    Raises:
        ConfigError: as `read_config`, `owning`, `restore` and `probe`.
    """
    saved = read_config(run, changes, (*PROBE_KEYS, *MACHINE), own)
    config = saved.config
    with restored(run, saved) as (federation, progress):
        found = probe(federation, config.probe, run, progress.doing)
    show_rows(found.section().rows, probed_in(run, config.probe), config.title, config.progress)
    return found


def generate_run(run: Path, changes: Mapping[str, Any], own: RunConfig | None = None) -> Generated | str:
    """Generate text by a run's own ``generate`` settings with ``changes``, and show its table; or go on with a text.

    Args:
        changes, own: as of `read_config`.

    Returns:
        What was found; with ``generate.prompt`` the text that follows it, which is shown and nowhere written.

    Raises:
        ConfigError: as `read_config`, `owning`, `restore` and `generate`.
    """
    saved = read_config(run, changes, (*GENERATE_KEYS, *MACHINE), own)
    config, setting = saved.config, settled(saved.config)
    with restored(run, saved) as (federation, progress):
        if setting.prompt is None:
            found = generate(federation, setting, run, progress.doing)
        else:
            found = continued(federation, setting, setting.prompt)
    if isinstance(found, str):
        print_lines(f"{config.title}:", *f"{setting.prompt}{found}".split("\n"))
    else:
        show_rows(found.section().rows, generated_folder(run, setting), config.title, config.progress)
    return found


def _check_base(run: Path, config: RunConfig, recorded: Sequence[str]) -> None:
    """Raises ConfigError where trained weights are named at another place than the run's, and are not its weights."""
    values = read_yaml(run, "config.yaml")
    model = values.get("model")
    base = config.model.base
    if (
        base is None
        or not recorded
        or not isinstance(model, dict)
        or cast(dict[str, Any], model).get("base") == str(base)
    ):
        return
    if identity_of(RunConfig, {**values, "model": {**cast(dict[str, Any], model), "base": str(base)}}) not in recorded:
        expected = "a folder with the trained weights that the run began from"
        raise ConfigError("model.base", str(base), expected)
