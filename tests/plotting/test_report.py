"""The page of a comparison as a file: its charts as data, and what it tells. What it does is tested in a browser."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from cutlayer import HOME
from cutlayer.plotting.compose import compose
from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.experiments import PlotConfig
from cutlayer.plotting.figures import Options
from cutlayer.plotting.figures.axes import line_look
from cutlayer.plotting.report import write_report
from cutlayer.plotting.report_charts import Chart
from cutlayer.plotting.report_curves import curves_chart
from cutlayer.plotting.report_style import DASHES, SYMBOLS, LegendEntry, on_dark
from cutlayer.plotting.report_sweeps import sweep_charts
from cutlayer.plotting.report_traffic import traffic_charts
from cutlayer.plotting.runs import Run
from cutlayer.plotting.style import METHODS, dashes, shade
from cutlayer.plotting.tables import as_markdown, table_rows
from cutlayer.plotting.timing import Link
from tests.places import ROOT
from tests.plotting.making import make_run

PLOTTING = HOME / "plotting"
HOSTILE = '</script><img src=x onerror="window.hacked=1">\'%{y}'


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each kind of element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "path"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def written(path: Path, runs: Sequence[Run], left_out: Sequence[str] = (), **keys: Any) -> Path:
    options = Options(**{"title": "A comparison", "target": 0.7, **keys})
    curves = make_curves(runs, options.metric, options.without_fields, options.link)
    return write_report(path, curves, options, table_rows(curves, options), left_out)


def some_runs(folder: Path) -> list[Run]:
    """Two seeds of a method, another in three settings, and one that sends nothing."""
    runs = [make_run(folder / f"a{seed}", "fed_avg", seed=seed, accuracy=(0.5, 0.7 + 0.1 * seed)) for seed in (0, 1)]
    runs += [make_run(folder / f"lr{lr}", "fsl_sage", lr=lr, accuracy=(0.4, 0.9)) for lr in (0.1, 0.01, 0.001)]
    return [*runs, make_run(folder / "alone", "centralized", accuracy=(0.8, 0.9), load=0, results={"traffic": {}})]


def spread_runs(folder: Path) -> list[Run]:
    return [
        make_run(
            folder / f"{method}{alpha}", method, distribution="noniid_dirichlet", alpha=alpha, accuracy=(0.1, alpha / 2)
        )
        for method in ("fed_avg", "fsl_sage")
        for alpha in (0.1, 1.0)
    ]


# ---------------------------------------------------------------------- looks


def test_every_look_of_the_figures_is_one_of_the_report() -> None:
    methods = [*METHODS, *(f"method{number}" for number in range(200))]
    markers = {line_look(method, variant)["marker"] for method in methods for variant in range(18)}
    assert markers <= set(SYMBOLS)
    # Each is another symbol, and each is another outline in the legend.
    assert len({SYMBOLS[marker] for marker in markers}) == len(markers)
    outlines = {LegendEntry("", "", "#000000", marker=marker).outline for marker in markers}
    assert len(outlines) == len(markers)
    for outline in outlines:
        assert max(abs(float(number)) for number in re.findall(r"-?\d+\.\d+", outline)) <= 8
    assert {dashes(number) for number in range(20)} <= set(DASHES)


def test_every_colour_stands_out_from_a_dark_page() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    _, page = re.findall(r"--back: (#\w+);", (PLOTTING / "report.css").read_text().partition("@media print")[0])
    colors = [shade(style.color, variant) for style in METHODS.values() for variant in range(3)]
    for color in colors:
        assert (luminance(on_dark(color)) + 0.05) / (luminance(page) + 0.05) >= 3, color
    own = [on_dark(style.color).lower() for style in METHODS.values()]
    assert len(set(own)) == len({style.color for style in METHODS.values()})
    assert on_dark(METHODS["fsl_sage"].color) == METHODS["fsl_sage"].color, "it stands out as it is"


# ---------------------------------------------------------------------- charts


def check(chart: Chart) -> None:
    """The library knows every property of the chart on each of its axes, and every group has its key."""
    groups = {key.group for key in chart.keys}
    spec = json.loads(json.dumps(chart.spec(), allow_nan=False))
    for name, axis in spec["axes"].items():
        layout = spec["layout"] | {"xaxis": axis["layout"]}
        layout["shapes"] = [{key: shape[key] for key in shape if key != "groups"} for shape in layout["shapes"]]
        drawn = [trace for trace in spec["traces"] if name in spec["columns"][trace["at"]]]
        assert drawn, f"nothing on {name}"
        for trace in drawn:
            assert set(trace["groups"]) <= groups
            x = spec["columns"][trace["at"]][name]
            assert len(x) == len(trace["y"])
            assert len(trace.get("customdata", x)) == len(x)
            go.Figure([{key: trace[key] for key in trace if key not in ("at", "groups")} | {"x": x}])
        go.Figure(layout=layout)


def test_the_library_knows_every_property(tmp_path: Path) -> None:
    for runs in (some_runs(tmp_path / "some"), spread_runs(tmp_path / "spread")):
        curves = make_curves(runs)
        options = Options(target=0.6)
        for chart in (curves_chart(curves, options), *sweep_charts(curves, options), *traffic_charts(curves, options)):
            check(chart)


def trace_of(chart: Chart, name: str, mode: str) -> dict[str, Any]:
    (found,) = [trace for trace in chart.traces if trace["name"] == name and trace.get("mode") == mode]
    return found


def test_curves_are_means_over_seeds_on_each_axis(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "0", "fed_avg", seed=0, accuracy=(0.5, None, 0.9), load=(1000, 2000, 3000)),
        make_run(tmp_path / "1", "fed_avg", seed=1, accuracy=(0.7, 0.8, 1.0), load=(1000, 2000, 3001)),
    ]
    link = Link(bandwidth_mbit=8e-3, rtt_ms=0)  # a kilobyte takes a second
    chart = curves_chart(make_curves(runs, link=link), Options(target=0.85, link=link))
    check(chart)
    line = trace_of(chart, "FedAvg", "lines+markers")
    np.testing.assert_allclose([line["y"][0], line["y"][2]], [0.6, 0.95])
    assert line["y"][1] is None
    np.testing.assert_allclose([pair[1] for pair in line["customdata"]][::2], [0.1, 0.05])
    columns = chart.columns[line["at"]]
    assert columns["rounds"] == [1, 2, 3]
    assert columns["bytes"] == [1000, 2000, 3000.5]
    # A round: two clients at once, half a second of client and server each, and the bytes at a kilobyte a second.
    np.testing.assert_allclose(columns["seconds"], [(0.25 + 0.5 + 0.5) * n for n in (1, 2)] + [3.75 + 0.00025])
    low, high = (trace["y"] for trace in chart.traces if trace.get("mode") == "lines")
    np.testing.assert_allclose([low[0], high[0], low[2], high[2]], [0.5, 0.7, 0.9, 1.0])
    (mark,) = (trace for trace in chart.traces if trace.get("mode") == "markers")
    # Both seeds reach it in the third round.
    assert chart.columns[mark["at"]] == {"bytes": [3000.5], "rounds": [3], "seconds": [columns["seconds"][2]]}
    assert "2 of 2 seeds" in mark["hovertemplate"]
    (shape,) = chart.shapes
    assert (shape["y0"], shape["y1"], shape["groups"]) == (0.85, 0.85, ["target"])


def test_a_target_that_a_part_of_the_seeds_reaches_says_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed, accuracy=(0.1, 0.5 + 0.2 * seed)) for seed in (0, 1)]
    runs.append(make_run(tmp_path / "never", "fsl_sage", accuracy=(0.1, 0.2)))
    chart = curves_chart(make_curves(runs), Options(target=0.6))
    (mark,) = (trace for trace in chart.traces if trace.get("mode") == "markers")
    assert "1 of 2 seeds" in mark["hovertemplate"]
    assert chart.columns[mark["at"]]["bytes"] == [2_000_000]


def test_less_of_a_loss_is_better(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", accuracy=(0.1, 0.4, 0.8, 0.9))
    chart = curves_chart(make_curves([run], "test_loss"), Options(metric="test_loss", target=0.3))
    check(chart)
    (mark,) = (trace for trace in chart.traces if trace.get("mode") == "markers")
    assert chart.columns[mark["at"]]["rounds"] == [3]  # the losses are 0.9, 0.6, 0.2, 0.1
    assert chart.log_y
    assert "%" not in chart.y["tickformat"]


def test_what_sends_nothing_is_a_level_but_by_round(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "fed_avg", load=(100, 200, 400))]
    runs.append(make_run(tmp_path / "b", "centralized", accuracy=(0.6, 0.95, 0.9), load=0))
    chart = curves_chart(make_curves(runs), Options())
    line, level = (trace for trace in chart.traces if trace["name"] == "Centralized")
    assert level["mode"] == "lines+markers"
    assert set(level["y"]) == {0.9}
    assert {name: (min(x), max(x)) for name, x in chart.columns[level["at"]].items() if name == "bytes"} == {
        "bytes": (100, 400)
    }
    assert chart.columns[line["at"]] == {"rounds": [1, 2, 3]}
    assert list(curves_chart(make_curves(runs[1:]), Options()).axes) == ["rounds"]


def test_methods_of_very_different_cost_start_on_a_logarithmic_axis(tmp_path: Path) -> None:
    near = [make_run(tmp_path / "a", "fed_avg", load=1000), make_run(tmp_path / "b", "fsl_sage", load=2000)]
    far = [make_run(tmp_path / "c", "cse_fsl", load=50_000)]
    assert not curves_chart(make_curves(near), Options()).axes["bytes"].log
    assert curves_chart(make_curves(near + far), Options()).axes["bytes"].log


def test_runs_without_times_have_no_axis_of_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", results={"round_trips": None})
    assert list(curves_chart(make_curves([run]), Options()).axes) == ["bytes", "rounds"]


def test_the_metric_against_alpha(tmp_path: Path) -> None:
    (chart,) = sweep_charts(make_curves(spread_runs(tmp_path)), Options())
    assert chart.name == "alpha"
    assert [(key.group, key.label) for key in chart.keys][:2] == [("g0", "FedAvg"), ("g1", "FSL-SAGE")]
    assert chart.axes["x"].layout["ticktext"] == ["0.1", "1"]
    line = trace_of(chart, "FSL-SAGE", "lines+markers")
    np.testing.assert_allclose(chart.columns["g1"]["x"], chart.axes["x"].layout["tickvals"])
    np.testing.assert_allclose(np.diff(chart.columns["g1"]["x"]), 1.0)  # a decade
    np.testing.assert_allclose(line["y"], [0.05, 0.5])
    best = trace_of(chart, "FSL-SAGE", "markers")
    np.testing.assert_allclose(best["y"], [0.1, 0.5])


def test_the_metric_against_a_swept_key(tmp_path: Path) -> None:
    (chart,) = sweep_charts(make_curves(some_runs(tmp_path)), Options())
    assert chart.name == "ablation"
    assert chart.axes["x"].title == "learning rate"
    assert trace_of(chart, "FSL-SAGE", "lines+markers")["y"] == [0.9, 0.9, 0.9]
    assert chart.axes["x"].layout["ticktext"] == ["0.001", "0.01", "0.1"]
    assert sweep_charts(make_curves(some_runs(tmp_path / "again")[:2]), Options()) == []


def test_bytes_by_kind(tmp_path: Path) -> None:
    sent = {"up/model/m": [1, 10], "down/model/m": [2, 20], "up/smashed/z": [3, 30], "up/smashed/y": [1, 4]}
    sent |= {"up/metrics/loss": [1, 1]}
    runs = [make_run(tmp_path / "0", accuracy=(0.1, 0.2), results={"traffic": sent})]
    more = {name: [2 * count for count in counts] for name, counts in sent.items()}
    runs.append(make_run(tmp_path / "1", seed=1, accuracy=(0.1, 0.2), results={"traffic": more}))
    (chart,) = traffic_charts(make_curves(runs), Options(without_fields=("y",)))
    check(chart)
    assert {trace["name"]: chart.columns[trace["at"]]["x"] for trace in chart.traces} == {
        "model, to clients": [30],
        "model, to the server": [15],
        "activations, to the server": [45],
    }
    assert traffic_charts(make_curves([make_run(tmp_path / "2", results={"traffic": {}})]), Options()) == []


# ---------------------------------------------------------------------- page


def test_the_page_asks_for_nothing_and_runs_its_own_scripts_only(tmp_path: Path) -> None:
    page = Page(written(tmp_path / "out" / "report.html", some_runs(tmp_path / "saves")))
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    (policy,) = [each["content"] for each in page.attributes("meta") if "http-equiv" in each]
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    scripts = zip(page.texts["script"], page.attributes("script"), strict=True)
    (own,) = (text for text, attributes in scripts if "type" not in attributes)
    digests = (hashlib.sha256(text.encode()).digest() for text in (own, get_plotlyjs()))
    assert rules["script-src"].split() == [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert page.attributes("html") == [{"lang": "en"}]
    assert page.texts["title"] == page.texts["h1"] == ["A comparison"]
    assert len(page.texts["caption"]) == 1
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) in {None, *ids}


def test_the_table_is_that_of_the_other_formats(tmp_path: Path) -> None:
    runs = some_runs(tmp_path / "saves")
    page = Page(written(tmp_path / "report.html", runs, budget=1.5e6))
    options = Options(title="A comparison", target=0.7, budget=1.5e6)
    lines = as_markdown(table_rows(make_curves(runs), options), options).splitlines()
    cells = [line.replace("**", "").strip("| ").split(" | ") for line in lines if line.startswith("|")]
    texts = [text.strip() for text in (*page.texts["th"], *page.texts["td"])]
    assert sorted(text for row in (cells[2:]) for text in row) == sorted(text for text in texts if text)
    heads = [text.strip() for text in page.texts["button"]]
    assert heads[-len(cells[0]) :] == cells[0]


def test_the_page_tells_of_each_run(tmp_path: Path) -> None:
    runs = some_runs(tmp_path / "saves")
    env = {"git": {"revision": "abc123", "dirty": True}, "python": "3.11.7", "packages": {"torch": "2.11.0"}}
    env["command"] = "main.py x"
    (runs[0].folder / "env.json").write_text(json.dumps(env))
    (runs[1].folder / "env.json").write_text('{"git": ')
    (runs[2].folder / "env.json").write_text('{"git": [], "packages": null}')
    (runs[3].folder / "env.json").write_text("[]")
    page = Page(written(tmp_path / "report.html", runs, left_out=["saves/x: cut off"]))
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=False))
    assert facts["git revision"] == "abc123 with changes that are not committed"
    assert facts["versions"] == "python 3.11.7, torch 2.11.0"
    assert facts["command"] == "main.py x"
    folders = [dd for dt, dd in zip(page.texts["dt"], page.texts["dd"], strict=True) if dt == "folder"]
    assert sorted(folders) == sorted(run.folder.name for run in runs)
    assert str(tmp_path / "saves") in "".join(page.texts["p"])
    assert [dd for dt, dd in zip(page.texts["dt"], page.texts["dd"], strict=True) if dt == "lr"]
    assert len(page.texts["pre"]) == len(runs)
    assert "name: fed_avg" in page.texts["pre"][1]
    assert page.texts["li"][-1] == "saves/x: cut off"


def test_text_stays_text(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "saves" / "<b>bold", HOSTILE, lr=HOSTILE, seed=HOSTILE),
        make_run(tmp_path / "saves" / "b", HOSTILE, lr="0.1"),
    ]
    page = Page(written(tmp_path / "report.html", runs, left_out=[HOSTILE], title=HOSTILE))
    assert page.texts["title"] == page.texts["h1"] == [HOSTILE]
    assert not {"img", "b"} & {tag for tag, _ in page.elements}
    assert page.texts["li"][-1] == HOSTILE
    drawn = json.loads(page.texts["script"][0])
    assert {trace["name"] for trace in drawn["charts"]["curves"]["traces"]} == {
        f'&lt;/script&gt;&lt;img src=x onerror="window.hacked=1"&gt;\'%{{y}}, lr={value}'
        for value in ('&lt;/script&gt;&lt;img src=x onerror="window.hacked=1"&gt;\'%{y}', "0.1")
    }


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    some_runs(tmp_path / "saves")
    code = """
import sys
from pathlib import Path
from cutlayer.plotting.compose import compose
from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.experiments import PlotConfig
from cutlayer.plotting.figures import Options
from cutlayer.plotting.report import write_report
from cutlayer.plotting.runs import find_runs
from cutlayer.plotting.tables import table_rows
curves = make_curves(find_runs(Path(sys.argv[1])).runs)
options = Options("title", target=0.7)
write_report(Path(sys.argv[2]), curves, options, table_rows(curves, options))
"""
    contents = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.html"
        command = [sys.executable, "-c", code, str(tmp_path / "saves"), str(path)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=120)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("accuracy", [(0.5,), (None,), (None, 0.3), (0.0, 0.0)])
def test_one_run_alone_is_a_page(tmp_path: Path, accuracy: Sequence[float | None]) -> None:
    run = make_run(tmp_path / "run", accuracy=accuracy)
    page = Page(written(tmp_path / "report.html", [run], budget=10.0))
    drawn = json.loads(page.texts["script"][0])
    (line,) = [each for each in drawn["charts"]["curves"]["traces"] if each.get("mode") == "lines+markers"]
    assert line["y"] == list(accuracy)
    assert "1 method, 1 setting, 1 run;" in page.texts["p"][0]


def test_what_could_not_be_read_is_reported(tmp_path: Path) -> None:
    make_run(tmp_path / "saves" / "good")
    broken = make_run(tmp_path / "saves" / "bad").folder
    (broken / "results.json").write_text('{"rounds": [1,')
    config = PlotConfig(figures=("accuracy_rounds",), formats=("svg",), tables=())
    made = compose(tmp_path / "saves", tmp_path / "out", config)
    (path,) = (path for path in made.files if path.suffix == ".html")
    (line,) = Page(path).texts["li"][-1:]
    assert line.startswith(f"{broken} is damaged: results.json")
