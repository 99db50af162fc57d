"""The table beside the figures: final and best accuracy, and bytes to reach a target, by method."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from plotting.curves import Curve, best_accuracies, bytes_to_reach, final_accuracies
from plotting.style import method_style
from runtime.results import format_bytes

COLUMNS = (
    *("method", "setting", "seeds", "rounds", "final_acc", "final_acc_std", "best_acc", "best_acc_std"),
    *("comm_load_bytes", "target_acc", "target_reached", "bytes_to_target"),
)


def table_rows(
    curves: Sequence[Curve], target: float | None, without_fields: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """One row a curve with the columns `COLUMNS`, figures unrounded.

    Accuracies are fractions, mean and population standard deviation over seeds. `target_reached` counts the seeds that
    reached the target, `bytes_to_target` is their mean, or None if none did.
    """
    rows: list[dict[str, Any]] = []
    for curve in curves:
        final, best = final_accuracies(curve), best_accuracies(curve)
        needed = [] if target is None else bytes_to_reach(curve, target, without_fields)
        reached = [count for count in needed if count is not None]
        values = (
            *(curve.method, curve.label, len(curve.runs), int(curve.rounds[-1])),
            *(float(np.mean(final)), float(np.std(final)), float(np.mean(best)), float(np.std(best))),
            *(int(curve.bytes[-1]), target, len(reached), float(np.mean(reached)) if reached else None),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as csv, unrounded."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[dict[str, Any]], title: str, target: float | None) -> str:
    """The rows as a Markdown table for people."""
    reach = [] if target is None else [f"bytes to {100 * target:.4g}%"]
    lines = [
        f"## {title}",
        "",
        _row("method", "seeds", "rounds", "final accuracy", "best accuracy", "communication", *reach),
    ]
    lines.append(_row("---", *["---:"] * (5 + len(reach))))
    for row in rows:
        name = method_style(row["method"]).label + (f" ({row['setting']})" if row["setting"] else "")
        cells = [name, str(row["seeds"]), str(row["rounds"]), _accuracy(row, "final_acc"), _accuracy(row, "best_acc")]
        cells.append(format_bytes(row["comm_load_bytes"]) if row["comm_load_bytes"] else "none")
        lines.append(_row(*cells, *([_reached(row)] if reach else [])))
    return "\n".join(lines) + "\n"


def _accuracy(row: dict[str, Any], name: str) -> str:
    if not np.isfinite(row[name]):
        return "not finite"
    spread = f" ± {100 * row[f'{name}_std']:.2f}" if row["seeds"] > 1 else ""
    return f"{100 * row[name]:.2f}{spread} %"


def _reached(row: dict[str, Any]) -> str:
    if not row["comm_load_bytes"]:
        return "none"
    if row["bytes_to_target"] is None:
        return "not reached"
    some = f" ({row['target_reached']} of {row['seeds']} seeds)" if row["target_reached"] < row["seeds"] else ""
    return format_bytes(row["bytes_to_target"]) + some


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
