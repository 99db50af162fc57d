"""One page for a comparison: charts to play with, the table, and what each run was; one file, without a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from plotly.offline import get_plotlyjs

from cutlayer.plotting.content import read_file
from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import label_of
from cutlayer.plotting.figures.base import Options
from cutlayer.plotting.generation_table import generation_tables
from cutlayer.plotting.report_charts import Chart
from cutlayer.plotting.report_curves import curves_chart
from cutlayer.plotting.report_sweeps import sweep_charts
from cutlayer.plotting.report_traffic import traffic_charts
from cutlayer.plotting.report_tuning import tuning_charts
from cutlayer.plotting.runs import Run, short
from cutlayer.plotting.style import metric_label
from cutlayer.plotting.tables import table_cells, table_notes
from cutlayer.plotting.tuning_tables import Table, tuning_tables
from cutlayer.runtime.ground.reading import YAML_BYTES, read_json
from cutlayer.runtime.ground.text import one_line, printable

_FOLDER = Path(__file__).parent
# libyaml's, where PyYAML was built with it, is several times as fast.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# Marks the best cells; no text holds it.
_BEST = "\x01"
# Characters of a line that comes from a file.
_LONGEST = 4000


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, what it is sorted by (a number, a text, or "" for nothing), and its marks."""

    text: str
    value: str
    words: bool = False
    best: bool = False


@dataclass(frozen=True)
class PageTable:
    """One table: its id in the page, the heading above it, its caption, heads, rows of cells and notes."""

    name: str
    heading: str
    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    notes: list[str]


@dataclass(frozen=True)
class Picture:
    """A figure that the page shows as it is: its name, its caption, and the content of its SVG file."""

    name: str
    caption: str
    svg: bytes

    @property
    def heading(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ").capitalize()

    @property
    def source(self) -> str:
        """The picture as the address of an image; what is in it can run nothing."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def write_report(
    path: Path,
    curves: Sequence[Curve],
    options: Options,
    rows: Sequence[dict[str, Any]],
    left_out: Sequence[str] = (),
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write the page of a comparison; the same input gives the same bytes.

    Args:
        path: the file, `report.html` by custom; its folder is made if it is not there.
        curves: what is compared.
        options: the same as of the figures.
        rows: `tables.table_rows` of the curves.
        left_out: what is not in it, one line each.
        pictures: figures that it has no chart of.

    Returns:
        `path`.
    """
    charts = [curves_chart(curves, options), *sweep_charts(curves, options), *tuning_charts(curves)]
    charts += traffic_charts(curves, options)
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    library, packed = _library()
    runs = [run for curve in curves for run in curve.runs]
    differing = _differing(runs)
    # What all folders have in common is shown once.
    shared = _shared_folder(runs)
    page = _template().render(
        title=one_line(options.title, _LONGEST) or "Comparison",
        summary=_summary(curves, options),
        policy=_policy(script, library),
        style=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        script=script,
        packed=packed,
        charts=charts,
        drawn={"charts": {chart.name: chart.spec() for chart in charts}, "on_dark": _colors_on_dark(charts)},
        pictures=pictures,
        tables=[_table(rows, options), *map(_other_table, (*tuning_tables(curves), *generation_tables(curves)))],
        curves=[(label_of(curve), [_run_facts(run, shared, differing) for run in curve.runs]) for curve in curves],
        shared=printable(shared),
        left_out=[one_line(line, _LONGEST) for line in left_out],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of folders may hold bytes that are no text.
    path.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    return path


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("report.html")


@cache
def _library() -> tuple[str, str]:
    """The chart library's script, and the same packed into text."""
    library = get_plotlyjs()
    return library, base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode()


def _policy(*scripts: str) -> str:
    """What the page may do: run these very scripts and style itself. It may ask for nothing."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # The library writes its styles itself, and saves a picture by way of a blob.
    rules = ("default-src 'none'", "base-uri 'none'", "form-action 'none'", f"script-src {allowed}")
    return "; ".join((*rules, "style-src 'unsafe-inline'", "img-src data: blob:"))


def _colors_on_dark(charts: Sequence[Chart]) -> dict[str, str]:
    return {color: other for chart in charts for color, other in chart.colors_on_dark().items()}


def _table(rows: Sequence[dict[str, Any]], options: Options) -> PageTable:
    """The table of the metric, as in the other formats."""
    heads, texts = table_cells(rows, options, bold=_marked)
    names = ["seeds", "rounds", "final", "best"] + (["at_budget"] if options.budget is not None else [])
    names += ["comm_load_bytes"] + (["bytes_to_target"] if options.target is not None else [])
    values = [[name, *(row[key] for key in names)] for row, (name, *_) in zip(rows, texts, strict=True)]
    caption = f"{metric_label(options.metric)} and communication by method"
    return PageTable("table", "Table", caption, heads, _cells(texts, values), table_notes(rows, options))


def _other_table(table: Table) -> PageTable:
    """A table of personalisation or of generated text, as in the other formats."""
    values = [list(row) for row in zip(*(column.values for column in table.columns), strict=True)]
    cells = _cells(table.cells(_marked), values)
    heads = [column.head for column in table.columns]
    return PageTable(table.name, table.heading, f"{table.heading} by method", heads, cells, table.notes)


def _cells(texts: Sequence[Sequence[str]], values: Sequence[Sequence[float | str | None]]) -> list[list[Cell]]:
    """Cells of the rows; the first of each is its name."""
    return [
        [
            Cell(text.removeprefix(_BEST), _sorted_by(value), words=not at, best=text.startswith(_BEST))
            for at, (text, value) in enumerate(zip(*row, strict=True))
        ]
        for row in zip(texts, values, strict=True)
    ]


def _marked(text: str) -> str:
    return f"{_BEST}{text}"


def _sorted_by(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None or not math.isfinite(value) else repr(value)


def _shared_folder(runs: Sequence[Run]) -> str:
    """The folder that all runs are below; "" where there is none to show."""
    try:
        return os.path.commonpath([run.folder.parent for run in runs])
    except ValueError:  # Some are absolute and some are not, or they lie on different drives.
        return ""


def _differing(runs: Sequence[Run]) -> set[str]:
    """The keys in which the runs differ, besides what names them anyway."""
    settings = [run.setting for run in runs]
    keys = {key for setting in settings for key in setting} - {"algorithm.name"}
    return {key for key in keys if len({setting[key] for setting in settings if key in setting}) > 1}


def _run_facts(run: Run, shared: str, differing: set[str]) -> dict[str, Any]:
    """What the page shows of a run."""
    facts = {
        "folder": printable(os.path.relpath(run.folder, shared) if shared else run.folder),
        **{key: run.get(key) for key in sorted(differing & set(run.setting))},
    }
    return {
        "seed": "unknown" if run.get("seed") is None else short(run.get("seed")),
        "facts": {key: value for key, value in (facts | _environment(run.folder)).items() if value not in (None, "")},
        "config": yaml.dump(run.config, Dumper=_DUMPER, sort_keys=False, allow_unicode=True),
    }


def _environment(folder: Path) -> dict[str, str]:
    """What `env.json` says of where a run came from; empty where there is none that can be read."""
    try:
        found: Any = read_file(read_json, folder, "env.json", YAML_BYTES)
    except ValueError:
        return {}
    git, packages = (each if isinstance(each := found.get(key), dict) else {} for key in ("git", "packages"))
    changed = " with changes that are not committed" if git.get("dirty") else ""
    versions = {"python": found.get("python"), **packages}
    reported = {
        "git revision": f"{git['revision']}{changed}" if git.get("revision") else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "started": str(found.get("started", "")),
        "command": str(found.get("command", "")),
    }
    return {name: one_line(text, _LONGEST) for name, text in reported.items()}


def _summary(curves: Sequence[Curve], options: Options) -> str:
    """What is compared, in one sentence."""
    counts = {
        "method": len({curve.method for curve in curves}),
        "setting": len(curves),
        "run": sum(len(curve.runs) for curve in curves),
    }
    reported = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())
    return f"{reported}; {metric_label(options.metric)}; simulated time at {options.link.label}"
