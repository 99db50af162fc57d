"""Tables of personalisation: what fine-tuning gains, and how fast: methods by epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.tuned import Tuned, make_tuned
from cutlayer.plotting.personalized import Point
from cutlayer.plotting.style import method_style
from cutlayer.plotting.table_text import emphasized, latex, latex_bold, markdown, markdown_bold, table_csv

_WHO: tuple[str, ...] = ("method", "setting", "code", "part", "lr", "seeds", "seeds_evaluated")
GAIN_COLUMNS: tuple[str, ...] = (
    *(*_WHO, "clients", "round", "epochs"),
    *("before", "before_std", "after", "after_std", "worst_decile", "gain"),
)
SPEED_COLUMNS: tuple[str, ...] = (*_WHO, "epochs", "mean", "std", "worst_decile")


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: above it. texts: of each row. values: what the rows are sorted by; None where there is nothing.
        competing: of each row the value of which more is better, None where it does not compete; empty where nothing
            is to be bold.
    """

    head: str
    texts: list[str]
    values: list[float | str | None]
    competing: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table beside the one of the metric.

    Attributes:
        name: stem of its files. heading: what it shows. columns: as they are read. notes: below it.
        csv_columns, csv_rows: the same unrounded; accuracies are fractions.
    """

    name: str
    heading: str
    columns: list[Column]
    notes: list[str]
    csv_columns: tuple[str, ...]
    csv_rows: Sequence[Mapping[str, Any]]

    def cells(self, bold: Callable[[str], str]) -> list[list[str]]:
        """Of each row the texts, the best ones of each column bold."""
        columns = [emphasized(each.competing, each.texts, bold) for each in self.columns]
        return [list(row) for row in zip(*columns, strict=True)]

    def text(self, ending: str, title: str) -> str:
        """The content of its file; `ending` is one of "md", "tex" and "csv"."""
        if ending == "csv":
            return table_csv(self.csv_columns, self.csv_rows)
        heads, above = [each.head for each in self.columns], ": ".join(filter(None, (title, self.heading)))
        if ending == "tex":
            return latex(above, heads, self.cells(latex_bold), self.notes)
        return markdown(above, heads, self.cells(markdown_bold), self.notes)


def tuning_tables(curves: Sequence[Curve]) -> list[Table]:
    """What fine-tuning gains, and where there are several numbers of epochs how fast; none without an evaluation."""
    tuned = make_tuned(curves)
    tables = [_gain_table(tuned, curves)] if tuned else []
    return tables + ([_speed_table(tuned, curves)] if any(len(each.points) > 1 for each in tuned) else [])


def _gain_table(tuned: Sequence[Tuned], curves: Sequence[Curve]) -> Table:
    before, after = [each.before for each in tuned], [each.after for each in tuned]
    ends = {each.epochs for each in after if each is not None}
    names = [_named(each, each.curve.label) for each in tuned]
    columns = [
        Column("method", names, list(names)),
        Column("part", [each.part for each in tuned], [each.part for each in tuned]),
        Column("lr", [f"{each.lr:g}" for each in tuned], [each.lr for each in tuned]),
        Column("seeds", [_seeds(each) for each in tuned], [len(each.runs) for each in tuned]),
    ]
    if len(ends) > 1:
        epochs = [None if each is None else each.epochs for each in after]
        columns.append(Column("epochs", ["-" if count is None else str(count) for count in epochs], list(epochs)))
    head = f"after {_epochs(next(iter(ends)))}" if len(ends) == 1 else "after"
    columns.append(_accuracies("before (%)", before, tuned, curves))
    columns.append(_accuracies(f"{head} (%)", after, tuned, curves))
    worst = [each.points[-1].worst for each in tuned]
    texts = [f"{100 * value:.2f}" for value in worst]
    columns.append(Column("worst tenth (%)", texts, list(worst), _competing(worst, tuned, curves)))
    gains = [_gain(each) for each in tuned]
    texts = ["-" if gain is None else f"{100 * gain:+.2f}" for gain in gains]
    columns.append(Column("gain (points)", texts, list(gains)))
    notes = [
        f"Accuracy of clients' models on their own test sets before and after fine-tuning; trained {_rounds(tuned)}.",
        f"Mean ± population standard deviation over clients{_over_seeds(tuned, 'both')}.",
        "Worst tenth: mean over the tenth of the clients with the lowest accuracy, at the end.",
    ]
    rows = [dict(zip(GAIN_COLUMNS, (*_who(each), *_gain_values(each)), strict=True)) for each in tuned]
    return Table("table_personalization", "Personalisation", columns, notes + _best(tuned), GAIN_COLUMNS, rows)


def _speed_table(tuned: Sequence[Tuned], curves: Sequence[Curve]) -> Table:
    names = [_named(each, each.label) + _some(each) for each in tuned]
    columns = [Column("method", names, list(names))]
    for count in sorted({point.epochs for each in tuned for point in each.points}):
        means = [None if (point := each.at(count)) is None else point.mean for each in tuned]
        texts = ["-" if mean is None else f"{100 * mean:.2f}" for mean in means]
        columns.append(Column(_epochs(count), texts, list(means), _competing(means, tuned, curves)))
    notes = ["Accuracy of clients' models on their own test sets in percent, by epochs of fine-tuning."]
    notes.append(f"Mean over clients{_over_seeds(tuned)}.")
    ways = {(each.part, each.lr) for each in tuned}
    if len(ways) == 1:
        notes.append("Fine-tuned: {}, lr {:g}.".format(*ways.pop()))
    rows = [
        dict(zip(SPEED_COLUMNS, (*_who(each), point.epochs, point.mean, point.std, point.worst), strict=True))
        for each in tuned
        for point in each.points
    ]
    return Table("table_fine_tuning", "Speed of fine-tuning", columns, notes + _best(tuned), SPEED_COLUMNS, rows)


def _who(tuned: Tuned) -> tuple[Any, ...]:
    curve = tuned.curve
    code, seeds = curve.runs[0].code, (len(curve.runs), len(tuned.runs))
    return (curve.method, curve.label, code, tuned.part, tuned.lr, *seeds)


def _gain_values(tuned: Tuned) -> tuple[float | None, ...]:
    before, after = tuned.before, tuned.after
    clients = sum(each.clients for each in tuned.runs) / len(tuned.runs)
    return (
        *(clients, min(each.round for each in tuned.runs), tuned.points[-1].epochs),
        *((None, None) if before is None else (before.mean, before.std)),
        *((None, None) if after is None else (after.mean, after.std)),
        *(tuned.points[-1].worst, _gain(tuned)),
    )


def _gain(tuned: Tuned) -> float | None:
    return None if tuned.before is None or tuned.after is None else tuned.after.mean - tuned.before.mean


def _accuracies(head: str, points: Sequence[Point | None], tuned: Sequence[Tuned], curves: Sequence[Curve]) -> Column:
    texts = ["-" if each is None else f"{100 * each.mean:.2f} ± {100 * each.std:.2f}" for each in points]
    means = [None if each is None else each.mean for each in points]
    return Column(head, texts, list(means), _competing(means, tuned, curves))


def _competing(
    values: Sequence[float | None], tuned: Sequence[Tuned], curves: Sequence[Curve]
) -> tuple[float | None, ...]:
    """The values of those that may be the best: not a reference that sends nothing, nor a part of the seeds."""
    sends = any(curve.sends for curve in curves)
    fit = [(each.curve.sends or not sends) and len(each.runs) == len(each.curve.runs) for each in tuned]
    return tuple(value if fits else None for value, fits in zip(values, fit, strict=True))


def _named(tuned: Tuned, label: str) -> str:
    return method_style(tuned.curve.method).label + (f" ({label})" if label else "")


def _seeds(tuned: Tuned) -> str:
    count, of = len(tuned.runs), len(tuned.curve.runs)
    return str(count) if count == of else f"{count} of {of}"


def _some(tuned: Tuned) -> str:
    return f" ({_seeds(tuned)} seeds)" if len(tuned.runs) < len(tuned.curve.runs) else ""


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _rounds(tuned: Sequence[Tuned]) -> str:
    rounds = sorted({run.round for each in tuned for run in each.runs})
    count = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
    return f"for {count} round{'' if count == '1' else 's'}"


def _over_seeds(tuned: Sequence[Tuned], what: str = "") -> str:
    text = f", {what} averaged over seeds" if what else ", averaged over seeds"
    return text if any(len(each.runs) > 1 for each in tuned) else ""


def _best(tuned: Sequence[Tuned]) -> list[str]:
    if len(tuned) < 2:
        return []
    return [
        "Bold: the best of those that communicate." if any(each.curve.sends for each in tuned) else "Bold: the best."
    ]
