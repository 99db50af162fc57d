"""Time to read, average and draw many saved runs, and of the whole `plot_results.py`.

The runs are made up, in a temporary folder: their files have the content and the size of real ones. Each data set and
model comes with several distributions, each of these with the ten settings of methods in `SETTINGS` and several seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cutlayer.plotting.compose import compose
from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.experiments import PlotConfig
from cutlayer.plotting.figures import FIGURES
from cutlayer.plotting.runs import Found, find_runs
from cutlayer.plotting.selection import automatic, select
from cutlayer.runtime.ground.config import plain
from cutlayer.runtime.launching.hydra_support import load_config

ROOT = Path(__file__).resolve().parent.parent
DATA = tuple(product(("cifar10", "mnist"), ("resnet18", "simple_conv")))
ALPHAS = (0.1, 1.0, 10.0, 100.0)
# Method, what it sends of each field in a round, and what is swept.
_MODEL = ("up/model/client", "down/model/client")
_SPLIT = ("up/smashed/z", "up/smashed/y")
SETTINGS: tuple[tuple[str, tuple[str, ...], dict[str, int]], ...] = (
    ("centralized", (), {}),
    ("fed_avg", ("up/model/model", "down/model/model"), {}),
    ("fed_prox", ("up/model/model", "down/model/model"), {}),
    ("scaffold", ("up/model/model", "down/model/model", "up/model/control", "down/model/control"), {}),
    ("sl_multi_server", (*_MODEL, *_SPLIT, "down/smashed/grad"), {}),
    ("sl_single_server", (*_MODEL, *_SPLIT, "down/smashed/grad"), {}),
    ("cse_fsl", (*_MODEL, *_SPLIT, "up/model/auxiliary", "down/model/auxiliary"), {}),
    *(("fsl_sage", (*_MODEL, *_SPLIT, "down/align/auxiliary"), {"align_interval": every}) for every in (5, 10, 20)),
)


def write_runs(saves: Path, count: int, rounds: int, alphas: int) -> None:
    """Write `count` finished runs of `rounds` evaluated rounds, spread evenly over all settings."""
    spreads = [("iid", 0.1), *(("noniid_dirichlet", alpha) for alpha in ALPHAS[:alphas])]
    settings = list(product(DATA, spreads, SETTINGS))
    bases = {method: plain(load_config([f"algorithm={method}"])) for method, *_ in SETTINGS}
    for number in range(count):
        seed, at = divmod(number, len(settings))
        (dataset, model), (distribution, alpha), (method, fields, swept) = settings[at]
        config = copy.deepcopy(bases[method])
        config["algorithm"] = {"name": config.pop("algorithm_name"), **config["algorithm"], **swept}
        config["model"]["name"] = model
        config["dataset"].update(name=dataset, distribution=distribution, alpha=alpha)
        config.update(seed=seed, rounds=rounds)
        folder = saves / method / model / f"{dataset}-{distribution}" / f"lr=0.001,seed={seed}" / f"{number:06d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "results.json").write_text(json.dumps(results_of(at, seed, rounds, fields)))
        _write_clients(folder, np.random.default_rng(at))


def results_of(at: int, seed: int, rounds: int, fields: Sequence[str]) -> dict[str, Any]:
    """Content of a made-up `results.json`: noisy saturating accuracy, bytes and seconds that grow with the rounds."""
    noise = np.random.default_rng((at, seed))
    number = np.arange(1, rounds + 1)
    accuracy = (0.7 + 0.25 * ((at * 7) % 11) / 11) * (1 - np.exp(-number / (10 + at % 10)))
    traffic = {name: (number * (100_000 * (1 + at % 10) + 8 * place)).tolist() for place, name in enumerate(fields)}
    load = {
        way: sum((np.array(traffic[name]) for name in fields if name.startswith(way)), 0 * number)
        for way in ("up", "down")
    }
    seconds = np.cumsum(noise.uniform(0.4, 0.6, (3, rounds)), axis=1)
    return {
        "rounds": number.tolist(),
        "test_acc": np.clip(accuracy + noise.normal(0, 0.01, rounds), 0, 1).tolist(),
        "test_loss": (2.3 * np.exp(-accuracy) + noise.normal(0, 0.01, rounds)).tolist(),
        "train_loss": (2.3 * np.exp(-accuracy) + noise.normal(0, 0.01, rounds)).tolist(),
        "comm_load": (load["up"] + load["down"]).tolist(),
        "comm_up": load["up"].tolist(),
        "comm_down": load["down"].tolist(),
        "comm_framed": ((load["up"] + load["down"]) * 101 // 100).tolist(),
        "round_trips": (number * 10 * len(fields)).tolist(),
        "client_rounds": (number * 10).tolist(),
        "time_wall": seconds.sum(axis=0).tolist(),
        **{f"time_{part}": row.tolist() for part, row in zip(("client", "server", "eval"), seconds, strict=True)},
        "metrics": {"dropped": [0.0] * rounds},
        "traffic": traffic,
        "in_turn": False,
        "finished": True,
    }


def _write_clients(folder: Path, noise: np.random.Generator) -> None:
    """The two small files of clients: the partition, and the accuracy of each."""
    counts = noise.multinomial(500, noise.dirichlet([0.5] * 10, 10)[0], 10)
    lines = ["client,samples," + ",".join(map(str, range(10)))]
    lines += [f"{client},{row.sum()}," + ",".join(map(str, row)) for client, row in enumerate(counts)]
    (folder / "partition.csv").write_text("\n".join(lines) + "\n")
    lines = ["metric,client,samples,accuracy"]
    lines += [f"local_acc,{client},50,{noise.uniform(0.5, 0.9)}" for client in range(10)]
    (folder / "client_accuracy.csv").write_text("\n".join(lines) + "\n")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _average(found: Found, saves: Path) -> int:
    config = PlotConfig()
    return sum(len(make_curves(select(each, found, saves))) for each in automatic(found.runs, config))


def measure(saves: Path, out: Path, options: argparse.Namespace, show: Callable[[str], None]) -> None:
    """Show the time of each stage in this process, then that of the whole command."""
    seconds, found = _timed(lambda: find_runs(saves))
    show(f"  reading              {seconds:6.2f} s  {len(found.runs)} runs")
    seconds, curves = _timed(lambda: _average(found, saves))
    show(f"  averaging            {seconds:6.2f} s  {curves} curves")
    if options.stages:
        for stage, config in _stages():
            seconds, made = _timed(lambda config=config: compose(saves, out / "stages", config))
            show(f"  {stage:<20} {seconds:6.2f} s  {len(made.files)} files, reading included, one process")
    command = [sys.executable, "plot_results.py", "--saves", str(saves), "--out", str(out / "whole")]
    seconds, done = _timed(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True))
    files = [Path(line) for line in done.stdout.splitlines()]
    folders, size = len({path.parent for path in files}), sum(path.stat().st_size for path in files)
    drawn = f"{folders} comparisons, {len(files)} files, {size / 1e6:.0f} MB"
    show(f"  plot_results.py      {seconds:6.2f} s  {drawn}")


def _stages() -> list[tuple[str, PlotConfig]]:
    nothing = PlotConfig(figures=(), tables=(), report=False)
    figures = [(name, PlotConfig(figures=(name,), tables=(), report=False)) for name in FIGURES]
    formats = [
        (f"figures as {name}", PlotConfig(formats=(name,), tables=(), report=False)) for name in ("svg", "pdf", "png")
    ]
    rest = [
        ("tables", PlotConfig(figures=(), report=False)),
        ("reports", PlotConfig(figures=(), tables=())),
    ]
    return [("nothing", nothing), *figures, *formats, *rest]


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure with the options' number of runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plotting", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=2000, help="default: 2000")
    parser.add_argument("--rounds", type=int, default=200, help="evaluated rounds of each (default: 200)")
    parser.add_argument(
        "--alphas", type=int, choices=range(1, 5), default=2, help="Dirichlet distributions (default: 2)"
    )
    parser.add_argument("--stages", action="store_true", help="also every figure and format by itself (minutes)")
    options = parser.parse_args(arguments)
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as folder:
        saves = Path(folder) / "saves"
        seconds, _ = _timed(lambda: write_runs(saves, options.runs, options.rounds, options.alphas))
        size = sum(path.stat().st_size for path in saves.rglob("results.json"))
        show(f"{options.runs} runs of {options.rounds} rounds, {size / 1e6:.0f} MB of results.json, {load}")
        show(f"  writing them         {seconds:6.2f} s  (not part of what is measured)")
        measure(saves, Path(folder) / "figures", options, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
