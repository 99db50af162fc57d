"""The table beside the figures: a metric's final and best value, its value at a byte budget, and bytes to a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cutlayer.plotting.curves import (
    Array,
    Curve,
    best_values,
    bytes_to_reach,
    final_values,
    higher_is_better,
    total_bytes,
    values_at_budget,
)
from cutlayer.plotting.figures import Options
from cutlayer.plotting.figures.base import without
from cutlayer.plotting.measures import competing, marked, measured
from cutlayer.plotting.style import format_metric, is_share, method_style, metric_label
from cutlayer.plotting.table_text import emphasized, latex, latex_bold, markdown, markdown_bold, table_csv
from cutlayer.runtime.ground.units import byte_unit, format_bytes

TABLE_COLUMNS = (
    *("method", "setting", "code", "metric", "seeds", "rounds", "final", "final_std", "best", "best_std"),
    *("comm_load_bytes", "comm_load_bytes_std", "budget_bytes", "at_budget", "at_budget_std", "at_budget_seeds"),
    *("target", "target_seeds", "bytes_to_target", "bytes_to_target_std", "measured"),
)
_MEASURES = {
    "kNN": "kNN: accuracy of a nearest-neighbour classifier on features learnt without labels",
    "own models": "own models: made for local accuracy, mean over clients' own models on the whole test set",
    "start of own models": "start of own models: made for local accuracy, before clients make models of their own",
}


def table_rows(curves: Sequence[Curve], options: Options) -> list[dict[str, Any]]:
    """One row a curve with the columns `TABLE_COLUMNS`, figures unrounded.

    Each figure is a mean over seeds, and its `_std` the population standard deviation. `at_budget` is the last
    evaluation within `options.budget` bytes and `at_budget_seeds` the number of seeds that have one; `target_seeds`
    counts the seeds that reached the target, `bytes_to_target` is their mean. What does not apply is None; a figure
    that is not finite is NaN. `code` names the program that wrote the runs where it is another one, `measured` what the
    metric is of, as `measures.measured`.
    """
    return [dict(zip(TABLE_COLUMNS, _row_values(curve, options), strict=True)) for curve in curves]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as csv, unrounded; empty where a figure does not apply."""
    return table_csv(TABLE_COLUMNS, rows)


def as_markdown(rows: Sequence[dict[str, Any]], options: Options) -> str:
    """The rows as a Markdown table with its notes."""
    return markdown(options.title, *table_cells(rows, options, bold=markdown_bold), table_notes(rows, options))


def as_latex(rows: Sequence[dict[str, Any]], options: Options) -> str:
    """The rows as a LaTeX table for `booktabs`; title and notes are its caption."""
    return latex(options.title, *table_cells(rows, options, bold=latex_bold), table_notes(rows, options))


def _row_values(curve: Curve, options: Options) -> tuple[Any, ...]:
    fields = options.without_fields
    needed = [] if options.target is None else bytes_to_reach(curve, options.target, fields)
    reached = np.asarray([count for count in needed if count is not None], dtype=np.float64)
    budget = options.budget
    within = None if budget is None else values_at_budget(curve, budget, fields)
    known = None if within is None else within[~np.isnan(within)]
    return (
        *(curve.method, curve.label, curve.runs[0].code, curve.metric, len(curve.runs), int(curve.rounds[-1])),
        *(*_moments(final_values(curve)), *_moments(best_values(curve)), *_moments(total_bytes(curve, fields))),
        *(budget, *_moments(known), None if known is None else len(known)),
        *(options.target, None if options.target is None else len(reached), *_moments(reached)),
        measured(curve.runs[0], curve.metric),
    )


def _moments(values: Array | None) -> tuple[float | None, float | None]:
    """Mean and population standard deviation; None and None of nothing."""
    return (None, None) if values is None or not len(values) else (float(np.mean(values)), float(np.std(values)))


def table_cells(
    rows: Sequence[dict[str, Any]], options: Options, bold: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """The heads, and for each row its texts, the best ones of each column bold."""
    unit = " (%)" if is_share(options.metric) else ""
    columns: list[tuple[str, list[str]]] = [
        ("method", [_name(row) for row in rows]),
        ("seeds", [str(row["seeds"]) for row in rows]),
        ("rounds", [str(row["rounds"]) for row in rows]),
    ]
    names = ["final", "best"] + (["at_budget"] if options.budget is not None else [])
    for name in names:
        head = name if name != "at_budget" or options.budget is None else f"at {format_bytes(options.budget)}"
        texts = [_value(row, name) for row in rows]
        less = not higher_is_better(options.metric)
        columns.append((f"{head}{unit}", _emphasized(rows, name, texts, bold, less)))
    columns.append(("communication", [_bytes(row, "comm_load_bytes") for row in rows]))
    if options.target is not None:
        texts = [_reached(row) for row in rows]
        head = f"bytes to {format_metric(options.metric, options.target)}"
        columns.append((head, _emphasized(rows, "bytes_to_target", texts, bold, less=True)))
    return [head for head, _ in columns], [list(texts) for texts in zip(*(texts for _, texts in columns), strict=True)]


def _emphasized(
    rows: Sequence[dict[str, Any]], name: str, texts: Sequence[str], bold: Callable[[str], str], less: bool
) -> list[str]:
    competing = [row[name] if _competes(row, name, rows) else None for row in rows]
    return emphasized(competing, texts, bold, less)


def _competes(row: dict[str, Any], name: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a row may be the best: not a reference that sends nothing (unless all are), nor a part of the seeds,
    nor what was measured in another way."""
    sending = [other for other in rows if other["comm_load_bytes"]]
    sends = row["comm_load_bytes"] > 0 or not sending
    sends = sends and row["measured"] in competing([other["measured"] for other in sending or rows])
    seeds = {"bytes_to_target": "target_seeds", "at_budget": "at_budget_seeds"}.get(name, "seeds")
    return sends and row[name] is not None and bool(np.isfinite(row[name])) and row[seeds] == row["seeds"]


def table_notes(rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    less = "" if higher_is_better(options.metric) else " (less is better)"
    label = metric_label(options.metric)
    notes = [f"{label[:1].upper()}{label[1:]}{less}: of the last evaluation, and of the best one."]
    if any(row["seeds"] > 1 for row in rows):
        notes.append("Mean ± population standard deviation over seeds.")
    if options.budget is not None:
        notes.append(f"At {format_bytes(options.budget)}: of the last evaluation that came with at most these bytes.")
    notes.append(f"Communication: payload of the whole run{without(options)}; 1 kB is 1000 bytes.")
    if any(row["comm_load_bytes"] for row in rows) and len(rows) > 1:
        notes.append("Bold: the best of those that communicate.")
    measures = dict.fromkeys(row["measured"] for row in rows)
    if any(measures):
        told = "; ".join(_MEASURES[name] for name in measures if name)
        alone = " Bold compares none of these with others." if len(measures) > 1 else ""
        notes.append(f"In brackets, {told}.{alone}")
    for code in dict.fromkeys(row["code"] for row in rows if row["code"]):
        notes.append(f"Runs of {code}'s code count no labels.")
    return notes


def _name(row: dict[str, Any]) -> str:
    return marked(method_style(row["method"]).label, ", ".join(filter(None, (row["setting"], row["measured"]))))


def _value(row: dict[str, Any], name: str) -> str:
    value, deviation = row[name], row[f"{name}_std"]
    if value is None:
        return "-"
    if not np.isfinite(value):
        return "not finite"
    seeds = row["at_budget_seeds"] if name == "at_budget" else row["seeds"]
    if is_share(row["metric"]):
        text, spread = f"{100 * value:.2f}", f"{100 * deviation:.2f}"
    else:
        text, spread = f"{value:.4g}", f"{deviation:.2g}"
    return (f"{text} ± {spread}" if seeds > 1 else text) + _some(seeds, row)


def _bytes(row: dict[str, Any], name: str) -> str:
    value, deviation = row[name], row[f"{name}_std"]
    if not value:
        return "none"
    size, unit = byte_unit(value)
    number = format_bytes(value).split(" ")[0]
    digits = len(number.partition(".")[2])
    return f"{number} ± {deviation / size:.{digits}f} {unit}" if deviation else f"{number} {unit}"


def _reached(row: dict[str, Any]) -> str:
    if not row["comm_load_bytes"]:
        return "none"
    if row["bytes_to_target"] is None:
        return "not reached"
    return _bytes(row, "bytes_to_target") + _some(row["target_seeds"], row)


def _some(count: int, row: dict[str, Any]) -> str:
    return f" ({count} of {row['seeds']} seeds)" if count < row["seeds"] else ""
