"""One run with anything in its files: it is drawn or named, and the others are drawn as if it were not there."""

import copy
import csv
import json
import math
import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from cutlayer.plotting.compose import compose
from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.experiments import PlotConfig
from cutlayer.plotting.figures import FIGURES, Options, layout
from cutlayer.plotting.runs import find_runs
from cutlayer.plotting.tables import as_csv, table_rows
from cutlayer.plotting.tuning_tables import tuning_tables
from tests.plotting.making import make_run

SEEDS = 60
ESCAPE = "\x1b]8;;http://e\x07x\u202e\x9b"
BOMB = [f"{after}: &{after} [*{name}, *{name}]\n" for name, after in pairwise("abcdefgh")]
_TEXTS = (
    "",
    "---",
    "=1+1",
    "\x1b[2J",
    "\u202eab\u2066",
    "\x9b31m",
    "a\nb\r\x08",
    "$x_{1}$",
    "[red]b[/]",
    "\\textbf{",
    "%",
)
_TEXTS += (
    "<script>alert(1)</script>",
    "|",
    "{{ x }}",
    "N" * 300,
    "N" * 10_000,
    "_x",
    "../..",
    "\ud800",
    "nan",
    "iid",
    "9",
)
_NUMBERS = (0, -1, 1, 2**62, 2**63, 10**400, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf, True, 0.5, 57)
_THINGS = (None, [], {}, [1], {"a": 1}, [[[]]], [{}] * 3, ["a"] * 300)


def write_all(saves: Path) -> Path:
    """Three methods, of which one is to be odd; with everything that a figure is drawn from."""
    for method, seed in (("fed_avg", 0), ("fed_avg", 1), ("fsl_sage", 0), ("ditto", 0)):
        make_run(
            saves / f"{method}{seed}",
            method,
            seed=seed,
            partition=[[3, 4, 5], [1, 2, 3]],
            clients={"client_acc": [0.5, 0.75, 1.0]},
            personalized={("full", 0.1): {0: [0.25, 0.5], 5: [0.5, 0.75]}},
            more={"lr": 0.1},
            results={"metrics": {"local_acc/mean": [0.5, 0.5, 0.75]}},
        )
    return saves / "ditto0"


def places(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in nested mappings and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [above, *(place for key, value in inner for place in places(value, (*above, key)))]


def mutated(tree: Any, chance: random.Random) -> Any:
    """The tree with a few odd changes."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.choice(places(tree))
        odd: Any = copy.deepcopy(chance.choice(chance.choice((_TEXTS, _NUMBERS, _THINGS))))
        if not place:
            if chance.random() < 0.1:
                return odd
            continue
        holder = tree
        for key in place[:-1]:
            holder = holder[key]
        kind, key = chance.randrange(4), place[-1]
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(_TEXTS)] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], list):
            holder[key] = [odd] * len(holder[key])
        else:
            holder[key] = odd
    return tree


def garbage(raw: bytes, chance: random.Random) -> bytes:
    """The file with some bytes that are others, or cut, or doubled."""
    content = bytearray(raw)
    for _ in range(chance.randrange(1, 20)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(chance.choice((content, content[: chance.randrange(len(content))], content * 2)))


def spoil(folder: Path, chance: random.Random) -> None:
    """Change something in the files of a run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chance.choice([*files, *(folder / name for name in ("results.json", "config.yaml") for _ in range(4))])
    raw = path.read_bytes()
    if path.suffix not in (".json", ".yaml") or chance.random() < 0.25:
        path.write_bytes(garbage(raw, chance))
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(raw), chance)))
    else:
        path.write_text(yaml.dump(mutated(yaml.safe_load(raw), chance)), errors="surrogatepass")


def of_others(saves: Path) -> str:
    """What tables say of the methods that nobody touched, at a fixed target and budget."""
    runs = [run for run in find_runs(saves).runs if run.method in ("fed_avg", "fsl_sage")]
    curves = make_curves(runs)
    tables = [
        as_csv(table_rows(curves, Options(target=0.75, budget=2e6))),
        *(t.text("csv", "") for t in tuning_tables(curves)),
    ]
    return "\n".join(tables)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_content_of_one_run_stops_or_changes_the_others(tmp_path: Path) -> None:
    odd = write_all(tmp_path)
    before, files = of_others(tmp_path), contents(odd)
    drawn = left = 0
    for seed in range(SEEDS):
        for name, content in files.items():
            (odd / name).write_bytes(content)
        spoil(odd, random.Random(seed))
        found = find_runs(tmp_path)
        mine = [run for run in found.runs if run.folder == odd]
        reported = {**found.damaged, **found.unfinished}
        assert len(mine) + (odd in reported) == 1, seed
        assert all(reason.isprintable() and 0 < len(reason) <= 300 for reason in reported.values()), reported
        assert of_others(tmp_path) == before, seed
        # What is not left out can be drawn with the others; figures are below.
        curves = make_curves(found.runs)
        text = as_csv(table_rows(curves, Options(target=0.75, budget=2e6)))
        assert text.replace("\n", "").isprintable()
        drawn, left = drawn + len(mine), left + len(reported)
    assert min(drawn, left) > SEEDS / 5


def test_figures_and_pages_of_odd_runs_are_drawn(tmp_path: Path) -> None:
    saves, out = tmp_path / "saves", tmp_path / "out"
    for method in ("fed_avg", "fsl_sage"):
        make_run(saves / method, method)
    name = "=1+1|\x1b[31m$\\frac[red]<b>" + "N" * 3000
    more = {"dataset.name": name, "model.name": "---", "lr": math.inf, "classes": ["\u202ex"] * 300}
    make_run(saves / "odd", name, more=more, results={"traffic": {f"up/{ESCAPE}/x": [1, 2, 3]}})
    make_run(saves / "more", "__", more={**more, "lr": -1e308}, accuracy=[math.nan, None, 0.0], load=2**60)
    (saves / "bad\x1b]8;;x\x07").mkdir()
    (saves / "bad\x1b]8;;x\x07" / "config.yaml").write_text("a: &a [x]\nb: [*a, *a]")
    (saves / "bad\x1b]8;;x\x07" / "results.json").write_text("{}")
    figures = ("accuracy_communication", "traffic_kinds", "accuracy_scatter")
    made = compose(saves, out, PlotConfig(formats=("svg",), figures=figures))
    assert made.left_out == []
    assert made.empty == {}
    assert len(made.found.damaged) == 1
    texts = {path: path.read_text(encoding="utf-8") for path in made.files}
    assert len({path.parent for path in texts}) == 2
    for path, text in texts.items():
        assert all(line.isprintable() for line in text.replace("\t", " ").split("\n")) or path.suffix in (
            ".html",
            ".svg",
        )
        assert "\x1b" not in text
        assert "\u202e" not in text
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
            assert not any(cell.startswith(("=", "@", "+")) for cell in cells)
        if path.suffix == ".html":
            page = text.partition('<script type="text/plain"')[0]
            assert "[red]<b>" not in page
        if path.suffix == ".svg":
            ElementTree.fromstring(text)


def test_a_figure_that_fails_is_named_and_the_others_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OverflowError(ESCAPE)

    write_all(tmp_path / "saves")
    monkeypatch.setitem(FIGURES, "accuracy_rounds", replace(FIGURES["accuracy_rounds"], draw=fail))
    config = PlotConfig(formats=("svg",), figures=("accuracy_rounds", "latency"), report=False)
    made = compose(tmp_path / "saves", tmp_path / "out", config)
    (line,) = made.left_out
    assert "no figure accuracy_rounds: it cannot be drawn (OverflowError: " in line
    assert line.isprintable()
    assert "latency.svg" in {path.name for path in made.files}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("results.json", '{"rounds": [' + "9" * 400 + "]}", "results.json: "),
        ("results.json", '{"rounds": ' + "[" * 100_000, "results.json: "),
        ("config.yaml", "a: &a [1]\n" + "".join(BOMB), "config.yaml: line"),
        ("config.yaml", "a: " + "[" * 40, "config.yaml: "),
        ("config.yaml", "a: " + "x" * 10_000, "config.yaml: line 1 has a value of more than"),
        ("results.json", json.dumps({"accuracy": [1], "loss": [2]}), "results.json: no list rounds"),
    ],
    ids=["10^400", "deep json", "aliases", "deep yaml", "long", "another tool"],
)
def test_hostile_files_are_reported_in_one_line(tmp_path: Path, name: str, content: str, reason: str) -> None:
    odd = write_all(tmp_path)
    before = of_others(tmp_path)
    (odd / name).write_text(content)
    found = find_runs(tmp_path)
    assert found.damaged[odd].startswith(reason)
    assert of_others(tmp_path) == before


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    odd = write_all(tmp_path)
    for name in ("results.json", "partition.csv"):
        (odd / name).unlink()
        os.mkfifo(odd / name)
    assert find_runs(tmp_path).damaged == {odd: "results.json: it is no plain file"}


@pytest.mark.parametrize("names", [75, 300])
def test_the_work_of_wrapping_grows_with_the_text(names: int, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = 0

    def width(text: str, size: float) -> float:
        nonlocal measured
        measured += len(text)
        return len(text) * size / 144

    monkeypatch.setattr(layout, "text_width", width)
    for text in (json.dumps(["class_name"] * names), json.dumps(["class_name"] * names, separators=(",", ":"))):
        measured = 0
        lines = layout.wrapped(text, 4.0, 8.0).split("\n")
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(map(len, lines)) <= 72
        # A number of times each character, whatever the length.
        assert measured < 40 * len(text)


def test_a_very_long_curve_is_drawn_at_its_ends_and_extremes(tmp_path: Path) -> None:
    count = 20_000
    values = [0.5 + 0.25 * math.sin(at) for at in range(count)]
    values[11_234], values[15_234] = 0.99, 0.01
    run = make_run(tmp_path / "a", accuracy=values, load=1)
    (curve,) = make_curves([run])
    assert len(curve.value) <= 4002
    assert (curve.rounds[0], curve.rounds[-1], curve.bytes[-1]) == (1, count, count)
    assert (curve.value.max(), curve.value.min()) == (0.99, 0.01)
    assert all(curve.value == run.series("test_acc")[curve.rounds.astype(int) - 1])
