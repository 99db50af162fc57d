"""Text of any origin (files, peers, names of folders and classes, exceptions) as it may be shown or written.

A terminal obeys what it is sent, a log is read by lines, and a spreadsheet computes what looks like a formula: so text
is printed by `print_lines` and `print_errors`, logged as a `PlainRecord`, written into csv by `csv_text` and else goes
through `printable` or `one_line`.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 300
"""Characters of one text that somebody else has chosen: a few lines of a terminal."""
_ERROR = 20_000
# What spreadsheets take for the beginning of a formula. Tab and line ends are gone by then.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # plain ones and those of full width


def printable(text: object) -> str:
    r"""Any text on one line: control characters, line ends, signs that turn the direction of writing and bytes that are
    no UTF-8 as `\x1b`, `\n`, `\u202e`, `\xff`."""
    line = _text(text)
    return line if line.isprintable() else "".join(sign if sign.isprintable() else _escaped(sign) for sign in line)


def _text(value: object) -> str:
    try:
        return str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists
        return type(value).__name__


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # a byte of a path that is no UTF-8, as Python has it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def one_line(text: object, limit: int | None = LONGEST) -> str:
    """The same without needless space, and cut; for what is read and never copied, as the path of a file may be.

    Args:
        limit: characters, of which the last shows that there were more; None: all of it.
    """
    line = printable(" ".join(_text(text).split()))
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def lines(text: str) -> str:
    """Text of several lines, such as a table, without any other sign that a terminal obeys."""
    return "\n".join(map(printable, text.split("\n")))


def error_text(error: BaseException) -> str:
    """A traceback as it may be shown, its last part where it is long."""
    return lines("".join(traceback.format_exception(error)).rstrip("\n")[-_ERROR:])


def print_lines(*texts: object) -> None:
    """Print texts, each on a line of its own, now."""
    for text in texts:
        print(printable(text), flush=True)


def print_errors(*texts: object) -> None:
    """The same to standard error."""
    for text in texts:
        print(printable(text), file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- files


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as csv. A text that a spreadsheet would compute is quoted by an apostrophe; numbers stay as they are."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value if value is None or isinstance(value, int | float) else _cell(str(value))
    line = printable(value)
    return f"'{line}" if line.lstrip().startswith(_FORMULA) and not _is_number(line) else line


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------- logs


class PlainRecord(logging.LogRecord):
    """A record of a log in one line, whatever was logged; with `extra={"lines": True}` in several, as a table is."""

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        if self.exc_info and self.exc_info[1] is not None:
            # Indented: a line of the exception's own text must not look like one of the log.
            self.exc_text = error_text(self.exc_info[1]).replace("\n", "\n  ")

    def getMessage(self) -> str:
        """The message."""
        message = super().getMessage()
        return lines(message) if getattr(self, "lines", False) else one_line(message, _ERROR)


def plain_logs() -> None:
    """Let every record that this process logs from now on be a `PlainRecord`."""
    logging.setLogRecordFactory(PlainRecord)
