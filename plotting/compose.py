"""From a folder of runs and `exp_configs.yaml` to a folder of figures, tables and reports."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from cutlayer.plotting.curves import Curve, default_budget, default_target, make_curves
from cutlayer.plotting.experiments import Comparison, PlotConfig
from cutlayer.plotting.figures import FIGURES, Options, make_figure, save_figure
from cutlayer.plotting.generation_table import generation_tables
from cutlayer.plotting.runs import Found, Run, find_runs, short
from cutlayer.plotting.saving import as_svg
from cutlayer.plotting.selection import NoRuns, automatic, outside, resolve_key, select
from cutlayer.plotting.style import applied
from cutlayer.plotting.tables import as_csv, as_latex, as_markdown, table_rows
from cutlayer.plotting.timing import Link
from cutlayer.plotting.tuning_tables import tuning_tables
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import RESULTS
from cutlayer.runtime.ground.forking import server
from cutlayer.runtime.ground.text import one_line

_TABLES = {"md": as_markdown, "tex": as_latex, "csv": lambda rows, _: as_csv(rows)}
# Another process takes longer to start than a few comparisons to draw.
_PARALLEL_FROM = 4
_LIBRARIES = (__name__, "cutlayer.plotting.report")
# So many runs take longer to read than those processes to start.
_MANY_RUNS = 300
# What a figure may meet in content that nobody has thought of.
_ODD = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
# In a title.
_NAMED = 6


@dataclass(frozen=True)
class Composed:
    """What was read and what was made.

    found: the runs. files: in order. empty: for each comparison without a run, why. left_out: what comparisons leave
    out, one line each.
    """

    found: Found
    files: list[Path] = field(default_factory=list)
    empty: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """One comparison with its runs and all that is drawn of it."""

    comparison: Comparison
    runs: list[Run]
    folder: Path
    formats: tuple[str, ...]
    left_out: list[str]


def compose(saves: Path, out: Path, config: PlotConfig, only: str | None = None, processes: int = 1) -> Composed:
    """Draw every comparison into its own folder below `out`, with its tables and its report.

    Args:
        saves: folder below which runs lie.
        out: folder for the figures; made if it is not there.
        config: what to draw.
        only: name of the one comparison to draw; None: all.
        processes: that draw, where there is enough to do. More than one need a main module that may be imported.

    Raises:
        ConfigError: a key, a folder or a metric that no run has, or `only` is no comparison.
        OSError: a file cannot be written.
    """
    if processes > 1 and any(islice(saves.rglob(RESULTS), _MANY_RUNS, None)):
        server(*_LIBRARIES)  # loads while this process reads
    made = Composed(find_runs(saves, *outside(config.comparisons, saves)))
    comparisons = config.comparisons or automatic(made.found.runs, config)
    jobs: list[_Job] = []
    for comparison in _chosen(comparisons, only):
        try:
            jobs.append(_job(config.complete(comparison), made, saves, out, config.formats))
        except NoRuns as error:
            made.empty[comparison.name] = str(error)
        except ConfigError as error:
            raise error.within(f"comparisons.{comparison.name}") from None
    workers = min(processes, len(jobs)) if len(jobs) >= _PARALLEL_FROM else 1
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=server(*_LIBRARIES), initializer=gc.disable) as pool:
            drawn = list(pool.map(_draw, jobs))
    else:
        drawn = [_draw(job) for job in jobs]
    for files, left_out in drawn:
        made.files.extend(files)
        made.left_out.extend(left_out)
    return made


def _chosen(comparisons: Sequence[Comparison], only: str | None) -> Sequence[Comparison]:
    names = [comparison.name for comparison in comparisons]
    if only is not None and only not in names:
        raise ConfigError("--only", only, "the name of a comparison", names)
    return [comparison for comparison in comparisons if only in (None, comparison.name)]


def _job(comparison: Comparison, made: Composed, saves: Path, out: Path, formats: tuple[str, ...]) -> _Job:
    metric = comparison.metric or "test_acc"
    runs = select(comparison, made.found, saves)
    measured = [run for run in runs if metric in run.metrics]
    if not measured:
        everywhere = {name for run in made.found.runs for name in run.metrics}
        if metric not in everywhere:
            raise ConfigError("metric", metric, "a metric of its runs", sorted(everywhere))
        raise NoRuns(f"none of its runs has the metric {metric}")
    lacking = [f"{run.folder} has no metric {metric}" for run in runs if metric not in run.metrics]
    damaged = dict[Path, str]()
    for run in measured:
        damaged |= run.personalized.damaged | run.generated.damaged
    lacking += [f"{folder} is damaged: {reason}" for folder, reason in damaged.items()]
    made.left_out.extend(f"comparison {comparison.name}: {line}" for line in lacking)
    # What could not be read may have belonged to it.
    lacking += [f"{folder} is not finished: {state}" for folder, state in made.found.unfinished.items()]
    lacking += [f"{folder} is damaged: {reason}" for folder, reason in made.found.damaged.items()]
    if comparison.over is not None:
        resolve_key(comparison.over, measured, "over")
    return _Job(comparison, measured, out / comparison.name, formats, lacking)


def _draw(job: _Job) -> tuple[list[Path], list[str]]:
    """Draw one comparison; returns the files and what was left out."""
    comparison, folder = job.comparison, job.folder
    fields, link = comparison.without_fields or (), comparison.link or Link()
    curves = make_curves(job.runs, comparison.metric or "test_acc", fields, link)
    options = _options(comparison, job.runs, curves)
    names = "auto" if comparison.figures is None else comparison.figures
    wanted = list(FIGURES) if names == "auto" else names
    drawn = [name for name in wanted if FIGURES[name].applies(curves, options)]
    files: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    pictures: dict[str, bytes] = {}
    with applied():
        for name in drawn:
            try:
                figure = make_figure(name, curves, options)
                files += save_figure(figure, folder / name, job.formats)
                if comparison.report and not FIGURES[name].charted:
                    # Under the page's title, which is the same.
                    pictures[name] = as_svg(make_figure(name, curves, replace(options, title="")))
            except _ODD as error:  # of one figure: the others and the tables hold all the same
                failed.append(f"{name}: it cannot be drawn ({type(error).__name__}: {one_line(error)})")
    rows = table_rows(curves, options)
    for ending in comparison.tables or ():
        path = folder / f"table.{ending}"
        path.write_text(_TABLES[ending](rows, options), encoding="utf-8")
        files.append(path)
    for table in (*tuning_tables(curves), *generation_tables(curves)):
        for ending in comparison.tables or ():
            path = folder / f"{table.name}.{ending}"
            path.write_text(table.text(ending, options.title), encoding="utf-8")
            files.append(path)
    if comparison.report:
        # Its libraries take long to import, and not everyone asks for it.
        from cutlayer.plotting.report import Picture, write_report

        shown = [Picture(name, FIGURES[name].caption, svg) for name, svg in pictures.items()]
        files.append(write_report(folder / "report.html", curves, options, rows, job.left_out, shown))
    left_out = [f"{name}: it needs {FIGURES[name].needs}" for name in wanted if name not in drawn and names != "auto"]
    return files, [f"comparison {comparison.name}: no figure {text}" for text in left_out + failed]


def _options(comparison: Comparison, runs: Sequence[Run], curves: Sequence[Curve]) -> Options:
    fields = comparison.without_fields or ()
    target, budget = comparison.target, comparison.budget_mb
    return Options(
        title=_title(runs) if comparison.title is None else comparison.title,
        metric=curves[0].metric,
        target=default_target(curves) if target == "auto" else target if isinstance(target, float) else None,
        without_fields=fields,
        link=comparison.link or Link(),
        budget=default_budget(curves, fields) if budget is None else budget * 1e6,
        over=None if comparison.over is None else resolve_key(comparison.over, runs, "over"),
    )


def _title(runs: Sequence[Run]) -> str:
    def each(values: Sequence[object]) -> str:
        names = list(dict.fromkeys(short(value) for value in values))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return " / ".join(names[:_NAMED]) + more

    datasets, models = each([run.get("dataset.name") for run in runs]), each([run.get("model.name") for run in runs])
    return f"{datasets}, {models}, {each([run.distribution_label for run in runs])}"
