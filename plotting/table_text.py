"""Tables as text: csv, Markdown and LaTeX of any heads and cells, and which cells are bold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cutlayer.runtime.ground import text as plain

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "±": r"$\pm$",
}


def table_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as csv, unrounded; empty where a figure does not apply."""
    return plain.csv_text([columns, *([row[column] for column in columns] for row in rows)])


def markdown(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A Markdown table with its title above and its notes below.

    Args:
        cells: of each row the texts; bold ones as `markdown_bold` made them.
    """

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(map(_marked_down, texts)) + " |"

    table = [line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *(line(row) for row in cells)]
    return "\n".join([f"## {_marked_down(title)}", "", *table, "", _marked_down(" ".join(notes))]) + "\n"


def latex(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A LaTeX table for `booktabs`; title and notes are its caption.

    Args:
        cells: of each row the texts, which are escaped here; bold ones as `latex_bold` made them.
    """

    def line(texts: Sequence[str]) -> str:
        return "    " + " & ".join(map(_cell, texts)) + r" \\"

    caption = _escaped(". ".join(text for text in (title, " ".join(notes)) if text))
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{caption}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            *("    \\toprule", line(heads), "    \\midrule", *(line(row) for row in cells), "    \\bottomrule"),
            "  \\end{tabular}",
            "\\end{table}\n",
        ]
    )


def markdown_bold(text: str) -> str:
    """A text in bold for `markdown`."""
    return f"**{text}**"


def latex_bold(text: str) -> str:
    """A text in bold for `latex`: marked with characters that no text holds, because it is escaped afterwards."""
    return f"\x01{text}\x02"


def emphasized(
    values: Sequence[float | None], texts: Sequence[str], bold: Callable[[str], str], less: bool = False
) -> list[str]:
    """The texts of a column, bold where no other row that competes is better; none is where only one competes.

    Args:
        values: of each row; None where it does not compete.
        less: whether less is better.
    """
    competing = {at: value for at, value in enumerate(values) if value is not None}
    if len(competing) < 2:
        return list(texts)
    best = (min if less else max)(competing.values())
    # Rows that read the same are equally good: what distinguishes them is not in the table.
    winners = {texts[at] for at, value in competing.items() if value == best}
    if winners == {texts[at] for at in competing}:
        return list(texts)
    return [bold(text) if at in competing and text in winners else text for at, text in enumerate(texts)]


def _marked_down(text: str) -> str:
    """Text for Markdown: no cell ends in it, and neither HTML nor a link or a picture begins."""
    escaped = plain.printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return escaped.replace("](", "]\\(")


def _cell(text: str) -> str:
    """A cell for LaTeX, in bold if `latex_bold` marked all of it."""
    if len(text) > 1 and text[0] == "\x01" and text[-1] == "\x02":
        return rf"\textbf{{{_escaped(text[1:-1])}}}"
    return _escaped(text)


def _escaped(text: str) -> str:
    """Text for LaTeX, with a thin space between a number and its unit that no line breaks."""
    escaped = "".join(_LATEX.get(character, character) for character in plain.printable(text))
    return re.sub(r"(?<=\d) (?=[kMGTP]?B\b)", r"\\,", escaped)
