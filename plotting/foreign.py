"""Folders that FSL-SAGE's own code wrote (Nair et al. 2025), read as if this platform had written them.

Its `results.json` holds `test_acc` (or `accuracy`), `test_loss` and `comm_load` by round. What ran is in the names of
the folders, `<algorithm>/<model>/<dataset>-<distribution>/<settings>/<date>`, where the settings are for instance
`R200m3E1B128q5l10-alp1.00e-01-seed200`: rounds, clients, local epochs, batch size, upload interval q, alignment
interval l, Dirichlet alpha, seed. Its first versions named folders freely and left a `settings.yml`. Its bytes hold no
labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.plotting.content import check_results, plain_text, read_file
from cutlayer.runtime.ground.files import RESULTS
from cutlayer.runtime.ground.reading import MissingError, read_yaml

CODE = "FSL-SAGE"
_SETTINGS = re.compile(
    r"R(?P<rounds>\d+)m(?P<num_clients>\d+)E(?P<local_epochs>\d+)B(?P<batch_size>\d+)(q(?P<q>\d+))?(l(?P<l>\d+))?"
    r"(-alp(?P<alpha>\d+(\.\d+)?(e[+-]?\d+)?))?-seed(?P<seed>\d+)"
)
# Names of algorithms and data sets as its first versions spelled them, and those of today's folders.
_METHODS = {
    **{name: name for name in ("fed_avg", "sl_single_server", "sl_multi_server", "cse_fsl", "fsl_sage")},
    "fsl_approx": "fsl_sage",
}
_DATASETS = {"cifar": "cifar10"}
# Its settings give every algorithm both intervals.
_INTERVALS = {"fsl_sage": ("upload_interval", "align_interval"), "cse_fsl": ("upload_interval",)}


# The old `settings.yml` hold devices, as Python objects.
_IGNORED_TAGS = "tag:yaml.org,2002:python/"


def read_foreign(folder: Path, results: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and results of one run in this platform's terms.

    Args:
        folder: of the run; names of the folders above it count.
        results: content of its `results.json`.

    Raises:
        ValueError: it is no such folder, or it is damaged; the text says why.
    """
    accuracy = results.get("test_acc", results.get("accuracy"))
    if "rounds" in results or not isinstance(accuracy, list) or not isinstance(results.get("comm_load"), list):
        raise ValueError(f"config.yaml is missing, and {RESULTS} is not one of {CODE}'s code")
    made: dict[str, Any] = {
        "rounds": list(range(1, len(accuracy) + 1)),
        "test_acc": accuracy,
        # A sum of floats there; each of them is a whole number.
        "comm_load": [int(count) if _whole(count) else count for count in results["comm_load"]],
        **({"test_loss": results["test_loss"]} if "test_loss" in results else {}),
        "finished": True,
    }
    try:
        check_results(made, required=("rounds", "test_acc", "comm_load"))
    except ValueError as error:
        raise ValueError(f"{RESULTS}: {error}") from None
    return _from_names(folder) or _from_settings(folder), made


def _whole(count: Any) -> bool:
    return isinstance(count, float) and count.is_integer()


def _from_names(folder: Path) -> dict[str, Any] | None:
    """The configuration that the folders' names give; None for names of another kind."""
    names = folder.absolute().parts
    for at in range(len(names) - 1, 2, -1):
        found = _SETTINGS.fullmatch(names[at])
        if found is not None:
            dataset, _, distribution = names[at - 1].partition("-")
            numbers = {key: int(found[key]) for key in ("rounds", "num_clients", "local_epochs", "batch_size", "seed")}
            alpha = None if found["alpha"] is None else float(found["alpha"])
            intervals = {"upload_interval": found["q"], "align_interval": found["l"]}
            known = {name: int(value) for name, value in intervals.items() if value is not None}
            return _config(names[at - 3], names[at - 2], (dataset, distribution, alpha), known, numbers)
    return None


def _from_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a folder of the first versions, from its name and its `settings.yml`."""
    try:
        settings = read_file(read_yaml, folder, "settings.yml", ignored_tags=_IGNORED_TAGS)
    except MissingError:
        raise ValueError(f"no folder of {CODE}'s code: neither its name nor a settings.yml says what ran") from None
    user = settings.get("u_args")
    if not isinstance(user, dict):
        raise ValueError("settings.yml has no u_args")
    method = next((found for found in map(_method, (folder.name, user.get("method"))) if found is not None), None)
    if method is None:
        raise ValueError(
            f"settings.yml: u_args.method is {user.get('method')!r:.40}, expected one of {', '.join(_METHODS)}"
        )
    client, server = (
        part if isinstance(part, dict) else {} for part in (settings.get("client"), settings.get("server"))
    )
    numbers = {
        "rounds": server.get("round"),
        "num_clients": user.get("client"),
        "local_epochs": client.get("epoch"),
        "batch_size": user.get("batch_size"),
        "seed": user.get("seed"),
        "lr": client.get("lr"),
    }
    intervals = {"upload_interval": user.get("batch_round"), "align_interval": server.get("align")}
    dataset = str(user.get("dataset"))
    return _config(
        method,
        "unknown",
        (_DATASETS.get(dataset, dataset), str(user.get("sample")), None),
        {name: intervals[name] for name in _INTERVALS.get(method, ()) if intervals[name] is not None},
        {name: value for name, value in numbers.items() if value is not None},
    )


def _method(text: Any) -> str | None:
    """The algorithm that a free name begins with, e.g. fsl_sage for "FSL-SAGE_h5"."""
    plain = str(text).lower().replace("-", "_")
    return next((method for name, method in _METHODS.items() if plain.startswith(name)), None)


def _config(
    method: str,
    model: str,
    data: tuple[str, str, float | None],
    intervals: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    dataset, distribution, alpha = data
    made = {
        "algorithm": {"name": method, **intervals},
        "model": {"name": model},
        "dataset": {"name": dataset, "distribution": distribution, **({} if alpha is None else {"alpha": alpha})},
        **numbers,
    }
    return plain_text(made)
