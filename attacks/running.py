"""An attack on a saved run: what is shared by all attacks, from the keys to the files that are left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cutlayer.attacks import ATTACKS, AttackResult, Reported
from cutlayer.runtime.after.saved import owning, read_config, restore
from cutlayer.runtime.ground.config import build
from cutlayer.runtime.ground.files import SUMMARY, make_folder, replace_file
from cutlayer.runtime.ground.folders import nothing_left
from cutlayer.runtime.ground.process import prepare_process, set_threads
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import safe_component

FOLDER = "attacks"


def attack_run(
    name: str, run: Path, changes: Mapping[str, Any], reported: Reported = lambda *_: None
) -> tuple[AttackResult, Path]:
    """Attack a saved run; gives what was found and the folder it was written to.

    Args:
        name: of the attack.
        changes: keys of the attack as ``attack.<key>``, and those that `cutlayer.runtime.after.saved` lets change.

    Raises:
        ConfigError: a wrong name, key or value, a run that cannot be read, or one that cannot be attacked.
    """
    own = {key.removeprefix("attack."): value for key, value in changes.items() if key.startswith("attack.")}
    keys = build(ATTACKS.find(name, "attack", "an attack").config, own, "attack")
    saved = read_config(run, {key: value for key, value in changes.items() if not key.startswith("attack.")})
    config = saved.config
    with owning(run):
        prepare_process(config.torch_device(), config.arithmetic)
        federation = restore(run, saved)
        set_threads(config.threads, federation.setup.device, federation.setup.parameters)
        return attack(name, federation, keys, run, reported)


def attack(
    name: str, federation: Federation, config: Any, run: Path, reported: Reported = lambda *_: None
) -> tuple[AttackResult, Path]:
    """Attack a federation; writes ``summary.json``, and what else the attack leaves, below the run's folder.

    All of it appears when the attack is over, the summary last; a failure leaves nothing.

    Raises:
        ConfigError: it cannot be attacked.
    """
    folder = run / FOLDER / name / setting(config)
    with nothing_left(folder):
        found = ATTACKS[name].find(federation, config, reported)
        make_folder(run, folder)
        found.save(folder)
        told_of = {"attack": name, "knows": ATTACKS[name].knows, **vars(config), **found.to_json(), "finished": True}
        replace_file(folder / SUMMARY, json.dumps(told_of, allow_nan=False, indent=1) + "\n")
    return found, folder


def setting(config: Any) -> str:
    """The keys of an attack in one path component; null is written as "all"."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return safe_component(",".join(f"{key}={'all' if value is None else value}" for key, value in values.items()))
