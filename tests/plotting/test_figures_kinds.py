"""What each kind of figure shows: the data of its artists against numbers computed from the runs' files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.figures import FIGURES, Options
from cutlayer.plotting.runs import Run
from cutlayer.plotting.timing import Link
from tests.plotting.making import draw, line, make_run

LINK = Link(8.0, 50.0)


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def read(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "results.json").read_text())


# ------------------------------------------------------------------ time


def timed(folder: Path, method: str, seed: int, **keys: Any) -> Run:
    generator = np.random.default_rng(seed)
    rounds = 6
    columns = {
        "time_client": generator.uniform(1, 2, rounds),
        "time_server": generator.uniform(0, 1, rounds),
        "round_trips": generator.integers(5, 50, rounds),
        "comm_framed": generator.integers(10**6, 10**7, rounds),
    }
    results = {name: np.cumsum(values).tolist() for name, values in columns.items()}
    results["client_rounds"] = [4 * number for number in range(1, rounds + 1)]
    accuracy = np.linspace(0.2, 0.9, rounds).tolist()
    return make_run(folder, method, accuracy=accuracy, results=results | keys.pop("results", {}), seed=seed, **keys)


def seconds_by_hand(run: Run, in_turn: bool = False) -> np.ndarray:
    results = read(run)
    clients = 1 if in_turn else 4
    bits, trips = 8 * np.asarray(results["comm_framed"]), np.asarray(results["round_trips"])
    parallel = np.asarray(results["time_client"]) + bits / 8e6 + 0.05 * trips
    return parallel / clients + np.asarray(results["time_server"])


def test_accuracy_against_simulated_time(tmp_path: Path) -> None:
    seeds = [timed(tmp_path / f"{seed}", "fed_avg", seed) for seed in (0, 1)]
    turn = timed(tmp_path / "turn", "sl", 2, results={"in_turn": True})
    other = make_run(tmp_path / "other", "cse_fsl", results={"round_trips": None})
    alone = make_run(tmp_path / "alone", "centralized", load=0, accuracy=(0.5, 0.97), results={"comm_framed": [0, 0]})
    figure, axes = draw("accuracy_time", [*seeds, turn, other, alone], Options(link=LINK))
    expected = np.mean([seconds_by_hand(run) for run in seeds], axis=0)
    np.testing.assert_allclose(line(axes, "FedAvg").get_xdata(), expected)
    np.testing.assert_allclose(line(axes, "SL").get_xdata(), seconds_by_hand(turn, in_turn=True))
    np.testing.assert_allclose(line(axes, "Centralized").get_ydata(), 0.97)
    assert "CSE-FSL" not in [each.get_label() for each in axes.get_lines()]
    first, second = axes.get_xlabel().split("\n")
    assert first == "simulated time (s), each client's link: 8 Mbit/s, 50 ms round trip"
    assert second == "not drawn, as no time was recorded: CSE-FSL"
    assert legend_texts(figure) == ["Centralized: sends nothing", "FedAvg", "SL"]


def test_latency_is_stacked_from_its_parts(tmp_path: Path) -> None:
    seeds = [timed(tmp_path / f"{seed}", "fed_avg", seed) for seed in (0, 1)]
    turn = timed(tmp_path / "turn", "sl", 2, results={"in_turn": True})
    figure, axes = draw("latency", [*seeds, turn], Options(link=LINK))
    bars = [[patch for patch in container if isinstance(patch, Rectangle)] for container in axes.containers]
    assert legend_texts(figure) == ["clients' computing", "server's computing", "transfer", "waiting for round trips"]
    for row, (runs, clients) in enumerate((([*seeds], 4), ([turn], 1))):
        last = [{name: values[-1] for name, values in read(run).items() if isinstance(values, list)} for run in runs]
        expected = [
            np.mean([each["time_client"] / clients for each in last]) / 6,
            np.mean([each["time_server"] for each in last]) / 6,
            np.mean([8 * each["comm_framed"] / 8e6 / clients for each in last]) / 6,
            np.mean([0.05 * each["round_trips"] / clients for each in last]) / 6,
        ]
        unit = {"s": 1.0, "ms": 1e-3}[axes.get_xlabel().split("\n")[0].split("(")[1].rstrip(")")]
        np.testing.assert_allclose([part[row].get_width() * unit for part in bars], expected)
        ends = np.cumsum(expected)
        np.testing.assert_allclose([part[row].get_x() * unit for part in bars], [0, *ends[:-1]], atol=1e-12)
        reported = axes.texts[row].get_text()
        size = {"s": 1.0, "ms": 1e-3}[reported.split()[1]]
        assert float(reported.split()[0]) * size == pytest.approx(ends[-1], rel=5e-3)
    assert "8 Mbit/s, 50 ms round trip" in axes.get_xlabel()


# ------------------------------------------------------------------ settings


def dirichlet(folder: Path, method: str, alpha: float, seed: int, accuracy: float, **keys: Any) -> Run:
    values = (0.1, accuracy + 0.02, accuracy)
    return make_run(folder, method, accuracy=values, distribution="noniid_dirichlet", alpha=alpha, seed=seed, **keys)


def test_a_metric_against_alpha(tmp_path: Path) -> None:
    runs = [
        dirichlet(tmp_path / f"{alpha}-{seed}", "fed_avg", alpha, seed, 0.5 + alpha / 20 + seed / 10)
        for alpha in (0.1, 1, 5)
        for seed in (0, 1)
    ]
    runs.append(make_run(tmp_path / "iid", "fed_avg", accuracy=(0.1, 0.93)))
    runs.append(dirichlet(tmp_path / "one", "sl", 1, 0, 0.7))
    figure, axes = draw("metric_alpha", runs)
    drawn = line(axes, "FedAvg")
    x = np.asarray(drawn.get_xdata(), dtype=float)
    np.testing.assert_allclose(x[:3], np.log10([0.1, 1, 5]))
    for each in (drawn, line(axes, "SL")):
        points = np.column_stack([each.get_xdata(), each.get_ydata()]).astype(float)
        seen = axes.transData.inverted().transform(each.get_transform().transform(points))
        np.testing.assert_allclose(10.0 ** seen[:, 0], 10.0 ** points[:, 0], rtol=0.01)
    assert x[3] > x[2]
    np.testing.assert_allclose(drawn.get_ydata(), [0.5 + 0.005 + 0.05, 0.5 + 0.05 + 0.05, 0.5 + 0.25 + 0.05, 0.93])
    np.testing.assert_allclose(line(axes, "SL").get_ydata(), [0.7])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "1", "5", "IID"]
    low, high = axes.get_ylim()
    assert low < 0.555 - 0.05
    assert high > 0.93
    bars = [segment for collection in axes.collections for segment in collection.get_segments()]
    np.testing.assert_allclose([bars[0][0][1], bars[0][1][1]], [0.555 - 0.05, 0.555 + 0.05])
    assert legend_texts(figure) == ["FedAvg", "SL"]


def test_the_scatter_grows_with_alpha(tmp_path: Path) -> None:
    alphas = (0.1, 1.0, 10.0)
    runs = [
        dirichlet(tmp_path / f"{at}-{seed}", "fed_avg", alpha, seed, 0.5 + at / 10, load=(at + 1) * 10**6)
        for at, alpha in enumerate(alphas)
        for seed in (0, 1)
    ]
    runs.append(make_run(tmp_path / "iid", "sl", accuracy=(0.1, 0.9), load=2 * 10**6))
    runs.append(make_run(tmp_path / "alone", "centralized", accuracy=(0.1, 0.95), load=0))
    figure, axes = draw("accuracy_scatter", runs)
    dots = {each.get_ydata()[0]: each for each in axes.get_lines() if len(each.get_xdata()) == 1}
    means = [0.5, 0.6, 0.7, 0.9, 0.95]
    np.testing.assert_allclose(sorted(dots), means)
    found = [dots[value] for value in sorted(dots)]
    np.testing.assert_allclose([each.get_xdata()[0] for each in found], [3, 6, 9, 4, 0])
    sizes = [each.get_markersize() for each in found]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == sizes[4]
    assert np.isclose(sizes[1] - sizes[0], sizes[2] - sizes[1])
    assert [each.get_marker() for each in found] == ["o", "o", "o", "X", "*"]
    assert axes.get_xlabel() == "communication, whole run (MB)"
    names = [
        "Centralized: sends nothing",
        "FedAvg",
        "SL",
        *(f"\N{GREEK SMALL LETTER ALPHA} = {a:g}" for a in alphas),
        "IID",
    ]
    assert legend_texts(figure) == names


def test_an_ablation_of_a_number(tmp_path: Path) -> None:
    accuracy = {1: 0.9, 2: 0.85, 40: 0.7}
    runs = [
        make_run(
            tmp_path / f"{swept}-{seed}",
            "fsl_sage",
            accuracy=(0.1, final + 0.05, final + seed / 50),
            seed=seed,
            more={"algorithm.align_interval": swept},
        )
        for swept, final in accuracy.items()
        for seed in (0, 1)
    ]
    runs.append(make_run(tmp_path / "other", "cse_fsl", accuracy=(0.1, 0.75)))
    figure, axes = draw("ablation", runs)
    assert axes.get_xlabel() == "alignment interval (rounds)"
    np.testing.assert_allclose(line(axes, "FSL-SAGE").get_xdata(), np.log10([1, 2, 40]))
    np.testing.assert_allclose(line(axes, "FSL-SAGE").get_ydata(), np.array([0.9, 0.85, 0.7]) + 0.01)
    (best,) = [each for each in axes.get_lines() if each.get_markerfacecolor() == "none"]
    np.testing.assert_allclose(best.get_ydata(), np.array([0.9, 0.85, 0.7]) + 0.05)
    np.testing.assert_allclose(line(axes, "CSE-FSL").get_ydata(), 0.75)
    assert legend_texts(figure) == ["CSE-FSL: not swept", "FSL-SAGE"]
    assert figure.legends[0].get_title().get_text().startswith("filled: last evaluation, hollow: best one")


def test_an_ablation_of_names_in_order_of_their_cost(tmp_path: Path) -> None:
    load = {"half": 200, "linear": 100, None: 300, "full": 400}
    runs = [
        make_run(tmp_path / f"{size}", "fsl_sage", load=bytes_, accuracy=(bytes_ / 1000,), more={"model.cut": size})
        for size, bytes_ in load.items()
    ]
    _, axes = draw("ablation", runs)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["linear", "half", "default", "full"]
    np.testing.assert_allclose(line(axes, "FSL-SAGE").get_ydata(), [0.1, 0.2, 0.3, 0.4])


def test_which_key_an_ablation_is_of(tmp_path: Path) -> None:
    kind, place = FIGURES["ablation"], iter(range(100))

    def applies(*settings: dict[str, Any], over: str | None = None) -> bool:
        runs = [make_run(tmp_path / f"{next(place)}", "fsl_sage", more=keys) for keys in settings]
        return kind.applies(make_curves(runs), Options(over=over))

    assert applies({"lr": 1}, {"lr": 2})
    assert applies({"lr": 1, "optimizer.lr": 1}, {"lr": 2, "optimizer.lr": 2})
    assert not applies({"lr": 1, "batch_size": 1}, {"lr": 2, "batch_size": 2})
    assert applies({"lr": 1, "batch_size": 1}, {"lr": 2, "batch_size": 1}, {"lr": 2, "batch_size": 2}, over="lr")
    assert not applies({"lr": 1}, {"lr": 1, "seed": 3})
    assert not applies({"lr": 1}, {"lr": 2}, over="no.such.key")
    # How data is spread has a figure of its own.
    shape = {"dataset.distribution": "noniid_dirichlet"}
    assert not applies(shape | {"dataset.alpha": 1}, shape | {"dataset.alpha": 2})
    assert applies(shape | {"dataset.alpha": 1}, shape | {"dataset.alpha": 2}, over="dataset.alpha")


# ------------------------------------------------------------------ bytes


def test_bytes_are_stacked_by_kind_and_direction(tmp_path: Path) -> None:
    traffic = {
        "up/model/client": [1_000_000, 2_000_000],
        "up/model/auxiliary": [500_000, 1_000_000],
        "down/model/client": [2_000_000, 5_000_000],
        "up/smashed/z": [100, 200],
        "up/smashed/y": [400_000, 800_000],
        "up/metrics/loss": [9 * 10**9, 10**10],
    }
    runs = [
        make_run(tmp_path / f"{seed}", "sl", accuracy=(0.1, 0.2), results={"traffic": traffic}, seed=seed)
        for seed in (0, 1)
    ]
    runs[1].results["traffic"] = {name: [2 * count for count in counts] for name, counts in traffic.items()}
    runs.append(make_run(tmp_path / "alone", "centralized", load=0, results={"traffic": {}}))
    runs.append(make_run(tmp_path / "other", "fed_avg", results={"traffic": None}))
    for without, smashed in (((), 800_200), (("y",), 200)):
        figure, axes = draw("traffic_kinds", runs, Options(without_fields=without))
        names = ["model, to clients", "model, to the server", "activations, to the server"]
        assert legend_texts(figure) == names
        widths = [[patch.get_width() for patch in container] for container in axes.containers]
        # The mean over two seeds, one of which sent twice as much.
        np.testing.assert_allclose(np.transpose(widths), [[0, 0, 0], 1.5 * np.array([5, 3, smashed / 1e6])])
        assert [text.get_text() for text in axes.texts] == ["nothing", "13.2 MB" if not without else "12.0 MB"]
        label = "communication without labels, whole run (MB)" if without else "communication, whole run (MB)"
        assert axes.get_xlabel() == f"{label}\nnot drawn, as no kinds were recorded: FedAvg"
    looks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()]
    assert looks[0][0] == looks[1][0] != looks[2][0]
    assert [hatch is not None for _, hatch in looks] == [True, False, False]


# ------------------------------------------------------------------ clients


def test_partitions_are_those_of_the_files(tmp_path: Path) -> None:
    spread, even = [[9, 0, 1], [0, 5, 2]], [[3, 3, 3], [2, 2, 2]]
    runs = [
        make_run(tmp_path / "a", "centralized", partition=[[9, 5, 3]], num_clients=2, distribution="noniid_dirichlet"),
        make_run(tmp_path / "b", partition=spread, num_clients=2, distribution="noniid_dirichlet"),
        make_run(tmp_path / "c", "sl", partition=even, num_clients=2),
        make_run(tmp_path / "d", "sl", num_clients=2, seed=1),
    ]
    (tmp_path / "d" / "partition.csv").write_text("client,samples,0\n0,some,thing\n")
    figure, _ = draw("partition", runs)
    maps = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images}
    assert set(maps) == {"Dirichlet \N{GREEK SMALL LETTER ALPHA}=0.1\n2 clients", "IID\n2 clients"}
    np.testing.assert_array_equal(maps["Dirichlet \N{GREEK SMALL LETTER ALPHA}=0.1\n2 clients"], np.transpose(spread))
    np.testing.assert_array_equal(maps["IID\n2 clients"], np.transpose(even))
    assert not FIGURES["partition"].applies(make_curves(runs[3:]), Options())


def test_accuracy_of_clients_is_that_of_the_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    local = [generator.uniform(size=count) for count in (7, 7, 400)]
    runs = [
        make_run(tmp_path / f"{seed}", "fed_avg", seed=seed, clients={"local_acc": list(local[seed])})
        for seed in (0, 1)
    ]
    clients = {"client_acc": [0.5], "local_acc": list(local[2])}
    runs += [make_run(tmp_path / "many", "local_only", clients=clients), make_run(tmp_path / "none", "sl")]
    figure, axes = draw("client_accuracy", runs)
    assert axes.get_xlabel() == "accuracy on local test sets\nnot drawn, as clients were not measured: SL"
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    dots = [each.get_xdata() for each in axes.get_lines() if each.get_marker() == "."]
    medians = [each.get_xdata()[0] for each in axes.get_lines() if each.get_linewidth() > 2]
    values = [np.concatenate(local[:2]), local[2]]
    for box, median, drawn, found in zip(boxes, medians, dots, values, strict=True):
        low, middle, high = np.percentile(found, (25, 50, 75))
        np.testing.assert_allclose([box.get_x(), box.get_x() + box.get_width(), median], [low, high, middle])
        assert set(drawn) <= set(found)
        assert {min(found), max(found)} <= set(drawn)
    assert [len(each) for each in dots] == [14, 150]
    assert abs(np.median(dots[1]) - np.median(local[2])) < 0.01
    assert "a client (of every 150 or more, 150 are drawn)" in legend_texts(figure)
    _, axes = draw("client_accuracy", runs[:1])
    assert axes.get_xlabel() == "accuracy on local test sets"


def test_a_damaged_table_of_clients_counts_as_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", clients={"local_acc": [0.5]})
    kind, table = FIGURES["client_accuracy"], tmp_path / "run" / "client_accuracy.csv"
    assert kind.applies(make_curves([run]), Options())
    for content in (b"", b"\xff\xfe\x00", b"metric,client,samples,accuracy\nlocal_acc,0\nlocal_acc,0,1,much\n", b'"'):
        table.write_bytes(content)
        assert not kind.applies(make_curves([run]), Options())
    table.unlink()
    table.mkdir()
    assert not kind.applies(make_curves([run]), Options())
