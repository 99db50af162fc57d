"""Which data a run was begun with: they belong to its identity, as its configuration does."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from cutlayer.datasets.facts import changed
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.files import replace_file
from cutlayer.runtime.ground.reading import MissingError, read_json

log = logging.getLogger(__name__)

DATA = "data.json"
Changed = Literal["refuse", "accept"]


def record_data(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down in a run's folder which data it has."""
    replace_file(folder / DATA, json.dumps({"data": facts, "sha256": _sum_of(facts)}, indent=1) + "\n")


def check_data(folder: Path, facts: Callable[[], Mapping[str, Any]], if_changed: Changed) -> None:
    """Compare the data that a run's folder records with those that are there now; runs of earlier versions have none.

    Args:
        facts: gives what is known of the data now; asked for only where there is something to compare with.

    Raises:
        ConfigError: they have changed, and that is not accepted.
    """
    try:
        content = read_json(folder, DATA)
        before = cast(dict[str, Any], content["data"])
        if content["sha256"] != _sum_of(before):
            raise ValueError("it has other content than was written")
    except MissingError:
        return
    except (ValueError, LookupError, TypeError) as error:
        reason = f"{folder / DATA} cannot be read ({' '.join(str(error).split())[:120]})"
    else:
        difference = changed(before, json.loads(json.dumps(facts())))
        if difference is None:
            return
        reason = f"the data have changed since run {folder.name} was begun: {difference}"
    if if_changed == "refuse":
        advice = "resume=never begins a new run, data_changed=accept continues this one anyway"
        raise ConfigError("dataset", NO_VALUE, f"{reason}; {advice}")
    log.warning("%s; accepted", reason)


def _sum_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
