"""A finished run as Python objects: its curves, its bytes, its configuration and its trained model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas
import torch
from safetensors.torch import load_file
from torch import nn

from cutlayer import algorithms
from cutlayer.datasets import Dataset
from cutlayer.interface.overrides import overrides_of, settings_in
from cutlayer.models import build_model, input_channels, make_parts
from cutlayer.models.frozen import fill_whole, unshare
from cutlayer.plotting.content import reason
from cutlayer.plotting.runs import Run, read_run
from cutlayer.runtime.after.saved import Saved, read_config
from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import MODEL_FILE
from cutlayer.runtime.ground.memory import memory_told
from cutlayer.runtime.ground.reading import inside
from cutlayer.runtime.settings import RunConfig

_COUNTED = ("comm_load", "comm_up", "comm_down", "comm_framed", "round_trips", "client_rounds")
_TIMED = ("time_wall", "time_client", "time_server", "time_eval")


def curves(run: Run) -> pandas.DataFrame:
    """A row for each evaluated round: `round`, accuracy, losses, bytes and seconds so far, further metrics by name.

    Columns are as docs/results_format.md says of `results.json`; what was not measured is NaN.
    """
    columns: dict[str, Any] = {"round": run.results["rounds"]}
    columns |= {name: run.series(name) for name in ("test_acc", "test_loss", "train_loss") if name in run.metrics}
    columns |= {name: run.results[name] for name in (*_COUNTED, *_TIMED) if name in run.results}
    return pandas.DataFrame(columns | {name: run.series(name) for name in run.metrics if name not in columns})


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: of the run, absolute; docs/results_format.md says what is in it.
        config: the configuration that it ran with.
    """

    folder: Path
    config: RunConfig
    _saved: Saved = field(repr=False)
    _run: Run = field(repr=False)

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """A row for each evaluated round.

        Columns: `round`; `test_acc` (fraction), `test_loss` and `train_loss` (nats); `comm_load`, `comm_up`,
        `comm_down`, `comm_framed` (bytes so far); `time_*` (seconds so far); then further metrics by name.
        """
        return curves(self._run)

    @cached_property
    def communication(self) -> pandas.DataFrame:
        """Every message of the run, as `communication.csv` has it.

        Columns: `round`, `direction`, `kind`, `field`, `client`, `payload_bytes`, `framed_bytes`.
        """
        return pandas.read_csv(inside(self.folder, "communication.csv"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The run in a few figures: last and best accuracy (fractions), last loss, bytes and seconds in all."""
        results = self._run.results
        rounds, accuracies = list[int](results["rounds"]), list[float | None](results["test_acc"])
        known = [
            (accuracy, -number) for accuracy, number in zip(accuracies, rounds, strict=True) if accuracy is not None
        ]
        best, where = max(known, default=(None, None))
        figures = {
            "rounds": rounds[-1],
            "final_acc": accuracies[-1],
            "final_loss": results["test_loss"][-1],
            "best_acc": best,
            "best_round": None if where is None else -where,
        }
        return figures | {name: results[name][-1] for name in (*_COUNTED, *_TIMED) if name in results}

    def model(self) -> nn.Module:
        """The whole trained model, on the processor, in evaluation mode.

        Reads the run's data set, for the shape of what the model takes.

        Raises:
            ConfigError: clients have models of their own, so that there is no one model; or no such data or model.
        """
        config, data = self._trained()
        info = data.repeated(input_channels(config.model, data.info)).info
        with torch.random.fork_rng(devices=[]):
            model = build_model(replace(config.model, init=None), info)
        # What no file has, as weights that are frozen as they were drawn, is the parts'.
        unshare(model)
        fill_whole(model, load_file(inside(self.folder, MODEL_FILE)), self.parts().values())
        return model.eval()

    def parts(self) -> dict[str, nn.Module]:
        """The trained model as the method divides it, by name in the order in which data go through: client, server.

        The first's output is the next one's input. On the processor, in evaluation mode.

        Raises:
            ConfigError: as `model`.
        """
        config, data = self._trained()
        info = data.repeated(input_channels(config.model, data.info)).info
        layout = algorithms.get(config.algorithm_name).layout
        made = make_parts(config.model, info, layout.parts, seed=config.seed, options=config.options_for)
        return {name: made[name][0].eval() for name in layout.whole}

    def _trained(self) -> tuple[RunConfig, Dataset]:
        """The configuration with the trained weights as the model's first, and the data."""
        if not os.path.exists(self.folder / MODEL_FILE):
            expected = f"a run with one model ({MODEL_FILE}); of this one each client has its own"
            raise ConfigError("run", str(self.folder), expected)
        with memory_told():
            config, data = prepared(
                replace(self.config, device="cpu"), limit=self._saved.limit, download=self._saved.download
            )
        return replace(config, model=replace(config.model, init=inside(self.folder, MODEL_FILE))), data


def result_in(folder: Path, saved: Saved) -> RunResult:
    """The result of the finished run in a folder.

    Raises:
        ConfigError: there is none.
    """
    expected = "the folder of a finished run"
    try:
        run = read_run(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("run", str(folder), f"{expected} ({reason(error)})") from error
    if not run.results.get("finished", True):
        raise ConfigError("run", str(folder), expected)
    return RunResult(folder.absolute(), saved.config, saved, run)


def own_result(folder: Path, config: RunConfig) -> RunResult:
    """The result of a finished run that this process has configured itself, so that it may hold whatever that says.

    Raises:
        ConfigError: as `result_in`.
    """
    return result_in(folder, read_config(folder, {}, own=config)._replace(config=config))


def load_run(folder: str | Path, *named: str, **values: object) -> RunResult:
    """The result of a finished run.

    A run's folder may be anyone's. So what it says is checked, and what would run code, such as a model of a package of
    your own, is taken only if it is named as in the run: ``cutlayer.load(folder, "model=import/nets.Net")``.

    Args:
        folder: of the run, as `RunResult.folder`.
        named: such keys, and those of where things are here: ``dataset.root=...``.
        values: the same, as Python values.

    Raises:
        ConfigError: no finished run is there, or one that needs a key named.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError("run", str(folder), "the folder of a finished run")
    given: Mapping[str, Any] = settings_in(overrides_of(named, values))
    return result_in(path, read_config(path, given))
