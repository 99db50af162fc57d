"""No text of any figure overlaps another or is cut off, whatever is drawn."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutlayer.plotting.curves import Curve, make_curves
from cutlayer.plotting.figures import FIGURES, Options, make_figure
from cutlayer.plotting.figures.layout import text_width, wrapped
from cutlayer.plotting.runs import Run
from cutlayer.plotting.style import METHODS, applied
from cutlayer.plotting.timing import Link
from tests.plotting.making import check_texts, draw, make_run

LONG = "a_method_of_ones_own_with_quite_a_long_name_that_goes_on_and_on"
TITLE = "A data set with a long name, a model with one too, " * 3
KINDS = {f"{way}/{kind}/z" for way in ("up", "down") for kind in ("model", "smashed", "align", "something_else")}
OF_NO_METRIC = {"latency", "traffic_kinds", "partition", "client_accuracy", "fine_tuning", "client_histogram"}
every_figure = pytest.mark.parametrize("name", sorted(FIGURES))


def rich(folder: Path, method: str, number: int, *, alpha: float = 0.1, rounds: int = 4, **keys: object) -> Run:
    """A run that every figure can draw; its figures depend on its number alone."""
    generator = np.random.default_rng(number)
    load = int(10 ** generator.uniform(3, 11))
    traffic = {
        name: [count * (at + 1) for at in range(rounds)] for at, name in enumerate(sorted(KINDS)) for count in [load]
    }
    return make_run(
        folder / f"run{number}",
        method,
        accuracy=list(np.sort(generator.uniform(0.1, 0.99, rounds))),
        load=load,
        results={"traffic": traffic},
        partition=generator.integers(0, 500, (7, 10)).tolist(),
        clients={"local_acc": list(generator.uniform(0, 1, 7))},
        personalized={
            ("full", 0.01 * (number % 2 + 1)): {at: list(generator.uniform(0, 1, 7)) for at in (0, 1, 5, 50)}
        },
        distribution="noniid_dirichlet",
        alpha=alpha,
        num_clients=7,
        **keys,  # type: ignore[arg-type]
    )


def check(name: str, runs: Sequence[Run], monkeypatch: pytest.MonkeyPatch, options: Options | None = None) -> list[str]:
    options = options or Options(TITLE, target=0.6)
    curves: list[Curve] = make_curves(runs, options.metric, options.without_fields, options.link)
    assert FIGURES[name].applies(curves, options), name
    with applied():
        return check_texts(make_figure(name, curves, options), monkeypatch)


@every_figure
def test_eight_methods_with_long_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        rich(
            tmp_path,
            f"{LONG}_{at}",
            100 * at + round(10 * swept + alpha),
            alpha=alpha,
            more={"algorithm.align_interval": swept},
        )
        for at in range(8)
        for swept, alpha in ((1, 0.1), (2, 0.1), (1, 1.0))
    ]
    reported = check(name, runs, monkeypatch, Options(TITLE, target=0.6, over="algorithm.align_interval"))
    # Long names are broken into lines, and nothing of them is lost.
    whole = "".join("".join(reported).split())
    for at in range(8) if name != "partition" else ():
        assert f"{LONG}_{at}" in whole


@every_figure
def test_all_methods_and_three_settings_of_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [rich(tmp_path, method, at, alpha=alpha) for at, method in enumerate(METHODS) for alpha in (0.1,)]
    runs += [rich(tmp_path, "fsl_sage", 50 + at, alpha=alpha) for at, alpha in enumerate((0.5, 0.55, 1000.0))]
    runs += [
        rich(tmp_path, "fsl_sage", 60 + at, more={"model.cut": cut}) for at, cut in enumerate(("layer1", "layer2"))
    ]
    check(name, runs, monkeypatch, Options("All methods", target=0.5, over="model.cut"))


@every_figure
@pytest.mark.parametrize("accuracy", [(0.5,), (None, 0.4, None, 0.6), (None, None), (0.2, 0.2, 0.2)], ids=str)
def test_one_run_alone(
    name: str, accuracy: tuple[float | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(
        tmp_path / "run",
        "fsl_sage",
        accuracy=accuracy,
        partition=[[1]],
        clients={"local_acc": [0.5]},
        personalized={("full", 0.1): {0: [0.5], 1: [1.0]}},
        more={"lr": 1},
    )
    if not FIGURES[name].applies(make_curves([run]), Options()):
        return  # it compares runs, or needs what this one did not measure
    check(name, [run], monkeypatch)


@every_figure
def test_all_values_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that reach the target with the same bytes and end at the same value, with and without seeds."""
    runs = [
        make_run(
            tmp_path / f"{method}-{alpha}-{seed}-{lr}",
            method,
            partition=[[5, 5], [5, 5]],
            clients={"local_acc": [0.8, 0.8]},
            personalized={("full", 0.1): {0: [0.8, 0.8], 5: [0.8, 0.8]}, ("head", 0.1): {0: [0.8, 0.8], 1: [0.8, 0.8]}},
            distribution="noniid_dirichlet",
            alpha=alpha,
            seed=seed,
            more={"lr": lr},
        )
        for method in ("fed_avg", "fsl_sage", "sl", "centralized")
        for alpha in (0.1, 1)
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    check(name, runs, monkeypatch, Options("Alike", target=0.7, over="lr"))


@every_figure
@pytest.mark.parametrize("target", [0.0001, 1.0], ids=["a target that all reach at once", "one that nobody reaches"])
def test_extreme_targets(name: str, target: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [rich(tmp_path, method, at, alpha=at + 1) for at, method in enumerate(("sl", "fed_avg"))]
    runs += [rich(tmp_path, "sl", 9, alpha=1, more={"lr": 7})]
    reported = check(name, runs, monkeypatch, Options("Targets", target=target, over="lr"))
    if name == "accuracy_communication":
        assert sum("not reached" in text for text in reported) == (3 if target == 1 else 0)


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (1, 200), (50, 10), (50, 200), (1000, 10)])
def test_partitions_of_any_size(clients: int, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).integers(0, 900, (clients, classes)).tolist()
    runs = [
        make_run(tmp_path / f"{alpha}", partition=counts, distribution="noniid_dirichlet", alpha=alpha)
        for alpha in (0.1, 0.3, 1, 3, 10, 30, 100)
    ]
    for some in (1, 7):
        reported = check("partition", runs[:some], monkeypatch)
        assert ("1 more not shown" in reported) == (some == 7)


@pytest.mark.parametrize("name", ["latency", "traffic_kinds"])
def test_bars_with_tiny_and_with_huge_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        make_run(
            tmp_path / f"{at}", method, load=load, results={"traffic": {"up/a/z": [1] * 3, "down/b/z": [load] * 3}}
        )
        for at, (method, load) in enumerate([("fed_avg", 10**13), ("sl", 1000), ("cse_fsl", 1)])
    ]
    check(name, runs, monkeypatch, Options("Tiny", link=Link(0.1, 10_000)))


@pytest.mark.parametrize("metric", ["test_loss", "local_acc/worst_decile", "align/error_after"])
@pytest.mark.parametrize("name", sorted(set(FIGURES) - OF_NO_METRIC))
def test_other_metrics(name: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"local_acc/worst_decile": [0.1, None, 0.3, 0.4], "align/error_after": [1e-6, None, None, 1e3]}
    runs = [rich(tmp_path, method, at, alpha=at + 1) for at, method in enumerate(("sl", "fed_avg"))]
    runs += [rich(tmp_path, "sl", 9, alpha=1, more={"lr": 7})]
    for run in runs:
        run.results["metrics"] = values
        run.results["test_loss"] = [50.0, 2.0, 0.4, 0.01]
    check(name, runs, monkeypatch, Options("Metrics", metric, over="lr", target=0.3))


@pytest.mark.parametrize("name", ["latency", "traffic_kinds", "client_accuracy", "client_histogram", "fine_tuning"])
def test_methods_that_cannot_be_drawn_are_named_beside_long_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {"traffic": None, "round_trips": None}
    runs = [rich(tmp_path, LONG, 0), *(make_run(tmp_path / each, each, results=lacking) for each in METHODS)]
    reported = " ".join(check(name, runs, monkeypatch)).replace("\n", " ")
    (note,) = re.findall(r"not drawn, as .*: Centralized; .*", reported)
    assert all(style.label in note for style in METHODS.values())


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    loads=st.lists(st.integers(0, 10**14), min_size=1, max_size=12),
    names=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=120),
    title=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), max_size=200),
    data=st.data(),
)
def test_any_costs_and_names(
    loads: list[int],
    names: str,
    title: str,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = data.draw(st.sampled_from(("accuracy_communication", "accuracy_time", "traffic_kinds", "latency")))
    folder = tmp_path_factory.mktemp("runs")
    # The glyphs of the font that is used are known to be there; others would only be drawn as boxes.
    plain = "".join(sign if sign.isascii() else "ä" for sign in names)
    methods = [f"{plain}{at}" if at % 2 else list(METHODS)[at % len(METHODS)] for at in range(len(loads))]
    runs = [
        make_run(folder / f"{at}", method, load=load)
        for at, (method, load) in enumerate(zip(methods, loads, strict=True))
    ]
    for run, load in zip(runs, loads, strict=True):
        if not load:
            run.results["traffic"] = {}
    curves = make_curves(runs)
    if FIGURES[name].applies(curves, Options()):
        with applied():
            check_texts(make_figure(name, curves, Options(title, target=0.7)), monkeypatch)


def test_lines_are_broken_between_words_where_that_is_possible() -> None:
    assert wrapped("one two three", 100, 9) == "one two three"
    assert wrapped("one two three", text_width("one two", 9), 9) == "one two\nthree"
    # A word that is too long is broken after a sign, if it has one, and nothing of it is lost.
    assert wrapped("a_long_name of it", text_width("a_long_n", 9), 9) == "a_long_\nname of\nit"
    assert wrapped("abcdefgh", text_width("abcdef", 9), 9) == "abcdef\ngh"


def test_sums_of_bars_lie_within_the_axes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{at}", method) for at, method in enumerate(("fed_avg", "sl"))]
    figure, axes = draw("traffic_kinds", runs)
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    assert all(text.get_window_extent().x1 < inside.x1 for text in axes.texts)
