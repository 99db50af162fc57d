"""Personalisation to compare: figures, tables and chart against numbers computed from the clients' accuracies."""

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import StepPatch

from cutlayer.plotting.compose import compose
from cutlayer.plotting.curves import higher_is_better, make_curves
from cutlayer.plotting.experiments import Comparison, PlotConfig
from cutlayer.plotting.figures import FIGURES, Options
from cutlayer.plotting.figures.axes import line_look
from cutlayer.plotting.figures.tuned import make_tuned
from cutlayer.plotting.report_tuning import tuning_charts
from cutlayer.plotting.runs import Run, find_runs
from cutlayer.plotting.style import METHODS
from cutlayer.plotting.tuning_tables import GAIN_COLUMNS, SPEED_COLUMNS, Table, tuning_tables
from tests.plotting.making import check_texts, draw, make_run, write_personalized
from tests.plotting.test_report import check
from tests.plotting.test_tables import parse_latex

CLIENTS = 30
FULL = ("full", 0.001)
PERSONAL = ("fed_avg", "fed_babu", "fed_per", "fed_rep", "lg_fed_avg", "per_fed_avg", "ditto", "mhmd")


def accuracies(number: int, epochs: Sequence[int] = (0, 1, 5)) -> dict[int, list[float]]:
    generator = np.random.default_rng(number)
    return {count: generator.uniform(0.3, 0.6, CLIENTS).tolist() for count in epochs}


def tuned_run(
    folder: Path, method: str = "fed_avg", *, of: Mapping[int, Sequence[float]] | None = None, **keys: Any
) -> Run:
    personalized = keys.pop("personalized", {FULL: of or accuracies(0)})
    return make_run(folder, method, personalized=personalized, **keys)


def row_of(table: Table, name: str) -> dict[str, str]:
    heads = [column.head for column in table.columns]
    (found,) = [row for row in table.cells(lambda text: f"<{text}>") if row[0] == name]
    return dict(zip(heads, found, strict=True))


# ------------------------------------------------------------------ grouping


def test_seeds_are_averaged_and_the_spread_stays_that_of_clients(tmp_path: Path) -> None:
    by_seed = [accuracies(seed) for seed in range(3)]
    runs = [tuned_run(tmp_path / f"{seed}", of=by_seed[seed], seed=seed) for seed in range(3)]
    (tuned,) = make_tuned(make_curves(runs))
    assert [point.epochs for point in tuned.points] == [0, 1, 5]
    for point in tuned.points:
        values = np.asarray([each[point.epochs] for each in by_seed])
        np.testing.assert_allclose(point.mean, values.mean(axis=1).mean())
        np.testing.assert_allclose(point.std, values.std(axis=1).mean())
        np.testing.assert_allclose(point.worst, np.sort(values, axis=1)[:, :3].mean())
        counts = np.histogram(values, np.linspace(0, 1, 21))[0]
        np.testing.assert_allclose(point.shares, counts / (3 * CLIENTS), atol=1e-12)
    assert (tuned.name, tuned.variant, len(tuned.runs)) == ("FedAvg", 0, 3)


def test_several_settings_are_reported_by_what_differs(tmp_path: Path) -> None:
    def names(*settings: Sequence[tuple[str, float]]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        runs = [
            tuned_run(folder / method, method, personalized={setting: accuracies(0) for setting in each})
            for method, each in zip(("fed_avg", "fed_babu"), settings, strict=True)
        ]
        return [each.name for each in make_tuned(make_curves(runs))]

    assert names([FULL], [FULL]) == ["FedAvg", "FedBABU"]
    assert names([FULL], [("head", 0.001)]) == ["FedAvg, part=full", "FedBABU, part=head"]
    reported = ["FedAvg, fine-tuning lr=0.001", "FedAvg, fine-tuning lr=0.01", "FedBABU, fine-tuning lr=0.01"]
    assert names([FULL, ("full", 0.01)], [("full", 0.01)]) == reported
    both = names([FULL, ("head", 0.01)], [FULL])
    assert both[1] == "FedAvg, part=head, fine-tuning lr=0.01"
    assert names([], [FULL]) == ["FedBABU"]
    assert names([], []) == []


def test_every_setting_has_a_look_and_the_first_that_of_its_curve(tmp_path: Path) -> None:
    settings = {("full", 0.001): accuracies(0), ("head", 0.001): accuracies(1)}
    runs = [tuned_run(tmp_path / f"{lr}", "fed_avg", lr=lr, personalized=settings) for lr in (0.1, 0.2)]
    runs.append(tuned_run(tmp_path / "babu", "fed_babu", personalized={("head", 0.001): accuracies(2)}))
    curves = make_curves(runs)
    tuned = make_tuned(curves)
    assert [each.variant for each in tuned if each.part == "full"] == [curve.variant for curve in curves[:2]]
    looks = [str(line_look(each.curve.method, each.variant)) for each in tuned]
    assert len(set(looks)) == len(looks) == 5
    assert line_look("fed_babu", tuned[-1].variant)["color"] == METHODS["fed_babu"].color.lower()
    assert [each.name for each in tuned[:2]] == ["FedAvg, lr=0.1, part=full", "FedAvg, lr=0.1, part=head"]


def test_only_epochs_of_every_seed_count_and_seeds_that_share_none_stay_apart(tmp_path: Path) -> None:
    runs = [
        tuned_run(tmp_path / f"{at}", seed=at, of=accuracies(at, epochs))
        for at, epochs in enumerate([(0, 1, 5), (0, 5, 9)])
    ]
    (tuned,) = make_tuned(make_curves(runs))
    assert [point.epochs for point in tuned.points] == [0, 5]
    runs = [
        tuned_run(tmp_path / f"b{at}", seed=at, of=accuracies(at, epochs)) for at, epochs in enumerate([(0, 1), (2, 3)])
    ]
    tuned = make_tuned(make_curves(runs))
    assert [each.name for each in tuned] == ["FedAvg, epochs=0-1", "FedAvg, epochs=2-3"]
    assert len({each.variant for each in tuned}) == 2


def test_histograms_with_other_edges_are_not_averaged(tmp_path: Path) -> None:
    run = tuned_run(tmp_path / "a")
    other = make_run(tmp_path / "b", seed=1)
    halves = {"edges": [0.0, 0.5, 1.0], "counts": [[1, 2]] * 3}
    write_personalized(other.folder, *FULL, accuracies(1), histogram=halves)
    (tuned,) = make_tuned(make_curves([run, other]))
    assert tuned.points[0].shares == ()
    assert not FIGURES["client_histogram"].applies(make_curves([run, other]), Options())
    assert FIGURES["fine_tuning"].applies(make_curves([run, other]), Options())
    third = tuned_run(tmp_path / "c", "sl")
    _, axes = draw("client_histogram", [run, other, third])
    assert "not drawn, as there is no histogram of clients: FedAvg" in axes.get_xlabel().replace("\n", " ")


def test_how_it_was_fine_tuned_does_not_split_runs(tmp_path: Path) -> None:
    ways = [{"part": "full", "epochs": [0, 1], "lr": 0.1}, {"part": "head", "epochs": [0, 5], "lr": 0.2}]
    runs = [make_run(tmp_path / f"{at}", seed=at, more={"personalize": way}) for at, way in enumerate(ways)]
    runs.append(make_run(tmp_path / "none", seed=2))
    (curve,) = make_curves(runs)
    assert (len(curve.runs), curve.label) == (3, "")
    assert not FIGURES["ablation"].applies(make_curves(runs), Options())
    assert len(find_runs(tmp_path).runs) == 3
    # What is no part of it still does.
    assert len(make_curves([*runs, make_run(tmp_path / "lr", seed=0, lr=7)])) == 2


# ------------------------------------------------------------------ figures


def test_the_line_of_fine_tuning(tmp_path: Path) -> None:
    by_seed = [accuracies(seed) for seed in range(2)]
    runs = [tuned_run(tmp_path / f"{seed}", of=by_seed[seed], seed=seed) for seed in range(2)]
    runs += [tuned_run(tmp_path / "one", "fed_babu", of=accuracies(5, (2,))), make_run(tmp_path / "none", "sl")]
    figure, axes = draw("fine_tuning", runs)
    (line, single) = [each for each in axes.get_lines() if each.get_marker() in ("o", "<")]
    np.testing.assert_allclose(line.get_xdata(), [0, 1, 5])
    means = [np.mean([each[epochs] for each in by_seed]) for epochs in (0, 1, 5)]
    np.testing.assert_allclose(line.get_ydata(), means)
    np.testing.assert_allclose(single.get_xdata(), [2])
    spread = [np.mean([np.std(each[epochs]) for each in by_seed]) for epochs in (0, 1, 5)]
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(
        [band[:, 1].min(), band[:, 1].max()], [min(np.subtract(means, spread)), max(np.add(means, spread))]
    )
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "5"]
    assert "not drawn, as there is no evaluation of fine-tuning: SL" in axes.get_xlabel().replace("\n", " ")
    title = figure.legends[0].get_title().get_text()
    assert title == "bands: one standard deviation over clients; mean over seeds"


def test_many_methods_have_no_bands(tmp_path: Path) -> None:
    runs = [tuned_run(tmp_path / method, method, of=accuracies(at)) for at, method in enumerate(PERSONAL)]
    figure, axes = draw("fine_tuning", runs)
    assert not axes.collections
    assert "band" not in figure.legends[0].get_title().get_text()
    assert len(figure.legends[0].get_texts()) == len(PERSONAL)


def test_one_number_of_epochs_makes_no_line(tmp_path: Path) -> None:
    curves = make_curves([tuned_run(tmp_path / "run", of=accuracies(0, (5,)))])
    assert not FIGURES["fine_tuning"].applies(curves, Options())
    assert tuning_charts(curves) == []
    assert FIGURES["client_histogram"].applies(curves, Options())
    assert [table.name for table in tuning_tables(curves)] == ["table_personalization"]


def test_histograms_are_those_of_the_clients(tmp_path: Path) -> None:
    by_method = {method: accuracies(at) for at, method in enumerate(("fed_avg", "fed_babu"))}
    runs = [tuned_run(tmp_path / method, method, of=values) for method, values in by_method.items()]
    figure, axes = draw("client_histogram", runs)
    stairs = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]
    heights = [(data.values - data.baseline) for data in stairs]
    edges = np.linspace(0, 1, 21)
    # Of each method the last number of epochs, and then before.
    counts = [np.histogram(values[epochs], edges)[0] for values in by_method.values() for epochs in (5, 0)]
    scale = max(map(max, heights)) / max(map(max, counts))
    for height, count in zip(heights, counts, strict=True):
        np.testing.assert_allclose(height, scale * count, atol=1e-12)
    # No histogram reaches into the row above.
    floors = sorted({float(data.baseline) for data in stairs})
    assert len(floors) == 2
    assert floors[1] - floors[0] > max(map(max, heights))
    upright = [
        each.get_xdata()[0] for each in axes.get_lines() if len(each.get_xdata()) == 2 and each.get_xdata()[0] > 0
    ]
    np.testing.assert_allclose(upright, [np.mean(values[epochs]) for values in by_method.values() for epochs in (5, 0)])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["before fine-tuning", "mean before", "after 5 epochs", "mean after"]
    assert (
        f"{100 * max(map(max, counts)) / CLIENTS:.0f}% where it is highest" in figure.legends[0].get_title().get_text()
    )
    low, high = axes.get_xlim()
    np.testing.assert_allclose([low, high], [0.3, 0.6])


def test_a_histogram_without_before_and_with_other_epochs(tmp_path: Path) -> None:
    runs = [
        tuned_run(tmp_path / f"{method}", method, of=accuracies(0, epochs))
        for method, epochs in (("fed_avg", (1,)), ("fed_babu", (2, 10)))
    ]
    figure, axes = draw("client_histogram", runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["after fine-tuning", "mean after"]
    names = [tick.get_text().replace("\n", " ") for tick in axes.get_yticklabels()]
    assert names == ["FedAvg, 1 epoch", "FedBABU, 10 epochs"]
    figure, _ = draw("client_histogram", [tuned_run(tmp_path / "zero", of=accuracies(0, (0,)))])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before fine-tuning", "mean before"]


@pytest.mark.parametrize("name", ["fine_tuning", "client_histogram"])
@pytest.mark.parametrize("epochs", [(0, 1), (0, 1, 2, 3, 4, 5, 10, 20, 50, 100), tuple(range(60)), (0, 1000)], ids=len)
def test_no_text_overlaps_with_any_epochs(
    name: str, epochs: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [FULL, ("head", 0.5), ("body", 1e-6)]
    runs = [
        tuned_run(tmp_path / method, method, personalized={setting: accuracies(at, epochs) for setting in settings})
        for at, method in enumerate(("fed_avg", "fed_babu", "a_method_of_ones_own_with_a_long_name"))
    ]
    figure, _ = draw(name, [*runs, *(make_run(tmp_path / f"none-{each}", each) for each in PERSONAL[2:])])
    reported = "".join("".join(check_texts(figure, monkeypatch)).split())
    for setting in ("part=full", "part=head", "lr=1e-06"):
        assert setting in reported


# ------------------------------------------------------------------ tables


def test_tables_agree_with_pandas(tmp_path: Path) -> None:
    by_seed = [accuracies(seed) for seed in range(2)]
    runs = [tuned_run(tmp_path / f"{seed}", of=by_seed[seed], seed=seed) for seed in range(2)]
    runs.append(tuned_run(tmp_path / "babu", "fed_babu", of=accuracies(7, (0, 1, 5, 10))))
    gain, speed = tuning_tables(make_curves(runs))
    clients = pd.concat(
        pd.read_csv(path).assign(run=number)
        for number, run in enumerate(runs)
        for path in (run.folder / "personalized").glob("*/clients.csv")
    )
    each = clients.groupby(["run", "epochs"])["accuracy"].agg(mean="mean", std=lambda values: values.std(ddof=0))
    table = pd.read_csv(StringIO(gain.text("csv", ""))).set_index("method")
    assert ("method", *table.columns) == GAIN_COLUMNS
    assert table.loc["fed_avg", ["seeds", "seeds_evaluated", "clients", "round", "epochs"]].tolist() == [2, 2, 30, 3, 5]
    for method, numbers, last in (("fed_avg", [0, 1], 5), ("fed_babu", [2], 10)):
        row, expected = table.loc[method], each.loc[numbers].groupby("epochs").mean()
        found = [row[name] for name in ("before", "before_std", "after", "after_std", "gain")]
        before, after = expected.loc[0], expected.loc[last]
        np.testing.assert_allclose(found, [*before, *after, after["mean"] - before["mean"]], rtol=1e-9)
    long = pd.read_csv(StringIO(speed.text("csv", "")))
    assert tuple(long.columns) == SPEED_COLUMNS
    assert long[["method", "epochs"]].apply(tuple, axis=1).tolist() == [
        *[("fed_avg", epochs) for epochs in (0, 1, 5)],
        *[("fed_babu", epochs) for epochs in (0, 1, 5, 10)],
    ]
    np.testing.assert_allclose(long["mean"][3:], each.loc[2]["mean"], rtol=1e-9)
    np.testing.assert_allclose(long["std"][3:], each.loc[2]["std"], rtol=1e-9)


def test_what_the_tables_say(tmp_path: Path) -> None:
    values = {
        "fed_avg": {0: 0.5, 1: 0.75, 5: 0.8},
        "fed_babu": {0: 0.25, 1: 0.78, 5: 0.9},
        "centralized": {0: 0.95, 5: 0.99},
    }
    runs = [
        tuned_run(
            tmp_path / method,
            method,
            of={epochs: [mean - 0.01, mean + 0.01] for epochs, mean in each.items()},
            load=0 if method == "centralized" else 10,
        )
        for method, each in values.items()
    ]
    gain, speed = tuning_tables(make_curves(runs))
    assert row_of(gain, "FedBABU") == {
        "method": "FedBABU",
        "part": "full",
        "lr": "0.001",
        "seeds": "1",
        "before (%)": "25.00 ± 1.00",
        "after 5 epochs (%)": "<90.00 ± 1.00>",
        "worst tenth (%)": "<89.00>",
        "gain (points)": "+65.00",
    }
    assert row_of(gain, "FedAvg")["before (%)"] == "<50.00 ± 1.00>"
    # A reference that sends nothing does not compete.
    assert row_of(gain, "Centralized")["before (%)"] == "95.00 ± 1.00"
    assert row_of(speed, "FedAvg") == {
        "method": "FedAvg",
        "0 epochs": "<50.00>",
        "1 epoch": "75.00",
        "5 epochs": "80.00",
    }
    assert row_of(speed, "FedBABU") == {
        "method": "FedBABU",
        "0 epochs": "25.00",
        "1 epoch": "<78.00>",
        "5 epochs": "<90.00>",
    }
    assert row_of(speed, "Centralized")["1 epoch"] == "-"
    assert "Fine-tuned: full, lr 0.001." in speed.notes
    text = gain.text("md", "T")
    assert text.startswith("## T: Personalisation\n\n| method |")
    assert "**90.00 ± 1.00**" in text
    assert "trained for 3 rounds." in text
    assert "seeds." not in text
    heads, *cells = parse_latex(speed.text("tex", "50% & more"))
    assert heads == ["method", "0 epochs", "1 epoch", "5 epochs"]
    assert cells[2] == ["FedBABU", "25.00", r"\textbf{78.00}", r"\textbf{90.00}"]
    assert "\\caption{50\\% \\& more: Speed of fine-tuning. " in speed.text("tex", "50% & more")


def test_a_part_of_the_seeds_is_reported_and_does_not_compete(tmp_path: Path) -> None:
    high = {0: [0.9], 5: [0.95]}
    runs = [tuned_run(tmp_path / "a", of=high), make_run(tmp_path / "b", seed=1)]
    runs += [tuned_run(tmp_path / method, method, of=accuracies(at, (0, 5))) for at, method in enumerate(PERSONAL[1:3])]
    gain, speed = tuning_tables(make_curves(runs))
    assert row_of(gain, "FedAvg")["seeds"] == "1 of 2"
    assert row_of(gain, "FedAvg")["after 5 epochs (%)"] == "95.00 ± 0.00"
    assert row_of(speed, "FedAvg (1 of 2 seeds)")["5 epochs"] == "95.00"
    assert sum("<" in row[2] for row in speed.cells(lambda text: f"<{text}>")) == 1


def test_settings_and_epochs_that_differ_have_columns_of_their_own(tmp_path: Path) -> None:
    settings = {FULL: accuracies(0, (0, 5)), ("head", 0.1): accuracies(1, (1, 2)), ("head", 0.2): accuracies(2, (0,))}
    curves = make_curves([tuned_run(tmp_path / "run", personalized=settings, results={"finished": True})])
    gain, speed = tuning_tables(curves)
    columns = {column.head: column.texts for column in gain.columns}
    assert columns["method"] == ["FedAvg"] * 3
    assert (columns["part"], columns["lr"]) == (["full", "head", "head"], ["0.001", "0.1", "0.2"])
    assert columns["epochs"] == ["5", "2", "-"]
    assert columns["before (%)"][1] == columns["after (%)"][2] == "-"
    assert columns["gain (points)"][1:] == ["-", "-"]
    names = [f"FedAvg (part={part}, fine-tuning lr={lr:g})" for part, lr in settings]
    assert speed.columns[0].texts == names
    assert [column.head for column in speed.columns] == ["method", "0 epochs", "1 epoch", "2 epochs", "5 epochs"]
    assert tuning_tables(make_curves([make_run(tmp_path / "none")])) == []


def test_less_spread_over_clients_is_better() -> None:
    assert [higher_is_better(f"local_acc/{name}") for name in ("mean", "std", "worst_decile")] == [True, False, True]


# ------------------------------------------------------------------ report and command


def test_the_chart_holds_the_means(tmp_path: Path) -> None:
    values = accuracies(3)
    runs = [tuned_run(tmp_path / "a", of=values), tuned_run(tmp_path / "b", "fed_babu", of=accuracies(4, (0, 5)))]
    (chart,) = tuning_charts(make_curves(runs))
    check(chart)
    (line,) = [trace for trace in chart.traces if trace["name"] == "FedAvg" and trace["mode"] == "lines+markers"]
    np.testing.assert_allclose(line["y"], [np.mean(values[epochs]) for epochs in (0, 1, 5)], rtol=1e-8)
    np.testing.assert_allclose(
        [reported[0] for reported in line["customdata"]], [np.std(values[n]) for n in (0, 1, 5)], rtol=1e-8
    )
    assert chart.columns[line["at"]] == {"epochs": [0, 1, 5]}
    # The page's script puts the axis' own words in this place, once.
    assert line["hovertemplate"].count("{x}") == 1
    assert "%{x}" not in line["hovertemplate"]
    assert [key.label for key in chart.keys] == ["FedAvg", "FedBABU", "± standard deviation over clients"]
    many = [tuned_run(tmp_path / f"m{method}", method) for method in PERSONAL]
    (chart,) = tuning_charts(make_curves(many))
    check(chart)
    assert len(chart.traces) == len(chart.keys) == len(PERSONAL)


def test_everything_is_made_without_any_edit(tmp_path: Path) -> None:
    runs = [tuned_run(tmp_path / "saves" / method, method, of=accuracies(at)) for at, method in enumerate(PERSONAL[:2])]
    odd = write_personalized(runs[0].folder, "head", 0.1, {0: [0.5]}, mean=["x"])
    with mpl.rc_context():
        made = compose(tmp_path / "saves", tmp_path / "out", PlotConfig(formats=("svg",)))
    names = {path.name for path in made.files}
    tables = {
        f"{name}.{ending}" for name in ("table_personalization", "table_fine_tuning") for ending in ("md", "tex", "csv")
    }
    assert tables | {"fine_tuning.svg", "client_histogram.svg", "table.md", "report.html"} <= names
    line = f"{odd} is damaged: summary.json: mean holds 'x', which is no fraction"
    assert made.left_out == [f"comparison cifar10-resnet18-iid: {line}"]
    page = next(path for path in made.files if path.suffix == ".html").read_text()
    assert line in page.replace("&#39;", "'")
    assert page.count("<caption>") == 3
    drawn = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    assert "fine_tuning" in drawn["charts"]


def test_nothing_of_it_is_made_of_runs_that_have_none(tmp_path: Path) -> None:
    make_run(tmp_path / "saves" / "run")
    made = compose(tmp_path / "saves", tmp_path / "out", PlotConfig(formats=("svg",)))
    text = " ".join(path.name for path in made.files)
    assert not [word for word in ("fine_tuning", "client_histogram", "personalization") if word in text]
    page = next(path for path in made.files if path.suffix == ".html").read_text()
    assert page.count("<caption>") == 1
    assert "ersonalis" not in page
    asked = PlotConfig(figures=("fine_tuning",), formats=("svg",), tables=(), report=False)
    made = compose(tmp_path / "saves", tmp_path / "out", asked)
    assert made.left_out == [
        "comparison cifar10-resnet18-iid: no figure fine_tuning: it needs a run whose clients were evaluated after "
        "several numbers of epochs"
    ]


def test_a_comparison_names_them(tmp_path: Path) -> None:
    for at, method in enumerate(PERSONAL[:3]):
        tuned_run(tmp_path / "saves" / method, method, of=accuracies(at))
    where = {"algorithm": ["fed_avg", "fed_babu"]}
    comparison = Comparison("babu", where=where, figures=("fine_tuning", "client_histogram"))
    config = PlotConfig(comparisons=(comparison,), formats=("svg",), tables=("csv",), report=False)
    made = compose(tmp_path / "saves", tmp_path / "out", config)
    assert [path.name for path in made.files] == [
        *("fine_tuning.svg", "client_histogram.svg", "table.csv", "table_personalization.csv", "table_fine_tuning.csv")
    ]
    table = pd.read_csv(tmp_path / "out" / "babu" / "table_personalization.csv")
    assert table["method"].tolist() == ["fed_avg", "fed_babu"]
