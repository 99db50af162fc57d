"""Text that somebody else has chosen: wherever it is shown or written it is text and nothing else."""

import ast
import csv
import io
import logging
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from cutlayer.plotting.runs import short
from cutlayer.plotting.style import method_style
from cutlayer.plotting.table_text import latex, markdown
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.screen import Screen
from cutlayer.runtime.ground.text import (
    LONGEST,
    PlainRecord,
    csv_text,
    error_text,
    lines,
    one_line,
    print_errors,
    print_lines,
    printable,
)
from cutlayer.runtime.job import _log_to  # pyright: ignore[reportPrivateUsage]
from cutlayer.runtime.launching.sweeps.display import distinct, outcome, show_table
from cutlayer.runtime.launching.sweeps.sweep import Job, JobFolder, Sweep
from cutlayer.runtime.records.console import summary_table
from cutlayer.runtime.records.results import RunSummary
from tests.places import checkout

# Weighted towards what terminals, spreadsheets and readers of logs obey.
SIGNS = "\x1b\x07\x08\r\n\t\x00\x7f\x9b\x85\u2028\u202e\u2066\u200f\u200b\ud800=+-@|$%&#_{}\\[]<>\"'`~^,; a9é"
ANY = st.text(st.one_of(st.sampled_from(SIGNS), st.characters()), max_size=60)
ESCAPE = "\x1b[31m\x1b]8;;http://e\x07x\u202e\x9b2J\r\b\nforged"


def is_plain(text: str) -> bool:
    """No sign that is a control, turns the direction of writing, has no shape, or is no character at all."""
    return not any(unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for sign in text)


@given(ANY)
@example(ESCAPE)
@example("x" * 10_000)
def test_any_text_is_one_plain_line(text: str) -> None:
    assert is_plain(printable(text))
    assert is_plain(one_line(text))
    assert len(one_line(text)) <= LONGEST
    assert all(is_plain(line) for line in lines(text).split("\n"))
    assert lines(text).count("\n") == text.count("\n")
    assert is_plain(str(ConfigError("key", text, "a value", [text])))


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=50))
def test_text_without_such_signs_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_has_no_text_is_reported_by_its_kind() -> None:
    assert printable(10**5000) == "int"


@given(st.lists(st.one_of(ANY, st.integers(), st.floats(), st.none()), min_size=1, max_size=4))
@example(["=cmd|' /C calc'!A0", "-1.5e3", " \t=1", "-x"])
@example(["\uff1d1", "+1", "-inf", "@x"])
def test_no_cell_of_csv_is_a_formula_and_numbers_stay_numbers(row: list[object]) -> None:
    text = csv_text([row])
    assert text.count("\n") == 1
    assert is_plain(text[:-1])
    (cells,) = csv.reader(io.StringIO(text))
    for cell, value in zip(cells, row, strict=True):
        if isinstance(value, str):
            begins = cell.lstrip()[:1]
            assert begins not in set("=+-@\uff1d\uff0b\uff0d\uff20") or float(cell) is not None
        else:
            assert cell == ("" if value is None else str(value))


@given(ANY)
@example(ESCAPE)
def test_a_record_of_the_log_is_one_line_and_its_traceback_is_indented(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        record = PlainRecord("x", logging.INFO, __file__, 1, "from %s", (text,), sys.exc_info())
    reported, *more = logging.Formatter("[INFO] %(message)s").format(record).split("\n")
    assert is_plain(reported)
    assert all(is_plain(line) for line in more)
    assert more[0] == "Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in more[1:])


def test_a_runs_log_cannot_be_forged(tmp_path: Path) -> None:
    def fail() -> None:
        with _log_to(tmp_path / "run.log"):
            logging.getLogger("x").warning("peer says %s", ESCAPE)
            raise RuntimeError(ESCAPE)

    with pytest.raises(RuntimeError, match="forged"):
        fail()
    reported = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("[20") for line in reported) == 1
    assert not any(line.startswith("forged") for line in reported)
    assert all(map(is_plain, reported))


def test_a_table_in_the_log_keeps_its_lines() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "a\nb", (), None)
    plain = PlainRecord("x", logging.INFO, __file__, 1, "a\nb", (), None)
    plain.lines = True
    assert (record.getMessage(), plain.getMessage()) == ("a\nb", "a\nb")


@settings(max_examples=25)
@given(ANY)
@example(ESCAPE)
@example("[red]x[/red] :smile: [link=http://e]y[/link]")
def test_the_screen_shows_text_as_text(text: str) -> None:
    for shown in (text, Text(text)):
        table = Table(title=shown)
        table.add_column(shown)
        table.add_row(shown, shown)
        file = io.StringIO()
        # As a terminal in colours: not even there may anything but the program's own styles be sent.
        screen = Screen(file=file, force_terminal=True, color_system="truecolor", width=200, highlight=False)
        for part in (text, Text(text), table):
            screen.print(part)
        reported = file.getvalue().replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")
        assert all(map(is_plain, reported.split("\n")))
    if "[" in text and is_plain(text):
        assert text.split()[0] in file.getvalue()


def test_markup_in_a_title_is_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunSummary(*[0] * len(RunSummary.__dataclass_fields__))
    object.__setattr__(summary, "traffic", {"up": {"[red]k[/]" + ESCAPE: (1, 1)}})
    file = io.StringIO()
    Screen(file=file, width=120).print(summary_table(summary, "[bold]t[/]" + ESCAPE))
    assert "[bold]t[/]" in file.getvalue()
    assert "[red]k[/]" in file.getvalue()
    assert all(map(is_plain, file.getvalue().split("\n")))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    job = Job(0, (f"++x={ESCAPE}", "=cmd"), "failed", folder=str(tmp_path / "a\x1b[2Jb"), error=f"@x {ESCAPE}")
    folder = JobFolder(tmp_path / "jobs" / "0")
    folder.path.mkdir(parents=True)
    folder.update(**job.__dict__)
    return Sweep(tmp_path)


def test_a_sweep_tells_of_its_jobs_in_plain_text(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    show_table(sweep.jobs(), sweep.path, f"again: {ESCAPE}")
    ((job, done),) = sweep.jobs()
    print_lines(outcome(job, done), distinct(job, ()))
    reported = capsys.readouterr()
    assert all(map(is_plain, (reported.out + reported.err).split("\n")))
    assert not any(line.startswith("forged") for line in (reported.out + reported.err).split("\n"))
    head, row = csv.reader(io.StringIO(sweep.write_table().read_text(encoding="utf-8")))
    cells = dict(zip(head, row, strict=True))
    assert cells["overrides"].startswith("'++x=")
    assert cells["error"].startswith("'@x")
    assert all(map(is_plain, row))


@given(ANY)
@example("=cmd|x" + ESCAPE)
@example("![x](http://e) <b> \\| `c`")
def test_tables_hold_text_and_no_marks_of_their_own(text: str) -> None:
    reported = markdown(text, ["method", "x"], [[text, "1"]], [text])
    assert all(map(is_plain, reported.split("\n")))
    assert reported.count("\n") == 7
    assert "<" not in reported
    assert "](" not in reported
    (row,) = [line for line in reported.split("\n") if line.endswith("| 1 |")]
    # A bar that ends a cell has an even number of backslashes before it.
    bars = [at for at, sign in enumerate(row) if sign == "|"]
    ends = [at for at in bars if (len(row[:at]) - len(row[:at].rstrip("\\"))) % 2 == 0]
    assert len(ends) == 3
    reported = latex(text, ["method"], [[text]], [text])
    assert all(map(is_plain, reported.split("\n")))
    (row,) = [line for line in reported.split("\n")[6:] if line.endswith("\\\\") and not line.startswith("    method")]
    body = row.removesuffix(r" \\").replace(r"\textbackslash{}", "").replace(r"\textasciitilde{}", "")
    body = body.replace(r"\textasciicircum{}", "")
    for sign in "&%$#_{}":
        body = body.replace(f"\\{sign}", "")
    for word in ("textless", "textgreater", "textbar"):
        body = body.replace(f"\\{word}{{}}", "")
    body = body.replace(r"$\alpha$", "").replace(r"$\pm$", "").replace(r"\\,", "").replace(r"\,", "")
    assert not set(body) & set("\\&%$#_{}^~")


@pytest.mark.parametrize("made", [lambda text: method_style(text).label, short])
def test_long_names_are_cut_and_stay_apart(made: object) -> None:
    name = made("N" * 10_000)  # type: ignore[operator]
    assert len(name) < 140
    assert name != made("N" * 10_000 + "x")  # type: ignore[operator]
    assert made("fed_new") == "fed_new"  # type: ignore[operator]


def test_both_streams_get_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(ESCAPE, Path(ESCAPE))
    print_errors(ValueError(ESCAPE), error_text(ValueError("x\n" + ESCAPE)))
    reported = capsys.readouterr()
    assert (reported.out.count("\n"), reported.err.count("\n")) == (2, 2)
    assert all(map(is_plain, (reported.out + reported.err).split("\n")))


# ---------------------------------------------------------------------- nothing goes another way

# Where each may be called: everything else takes what these make.
ONLY = {
    "print": {"runtime/ground/text.py"},
    "Console": set[str](),
    "writer": {"runtime/ground/text.py"},
    "DictWriter": set[str](),
    "to_csv": set[str](),
    "print_exc": set[str](),
    "print_exception": set[str](),
    "from_markup": set[str](),
}


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names of the functions that are called, with their lines; a screen's own `print` is none of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr != "print":
            yield node.func.attr, node.lineno


def test_text_is_printed_and_written_in_one_place() -> None:
    root = checkout()
    from tests.test_house import SOURCES  # late: it needs a checkout

    found: list[tuple[str, str, int]] = []
    for path in SOURCES:
        name = path.relative_to(root).as_posix()
        if not name.startswith("benchmarks/"):  # they print what they measured themselves
            called = calls(ast.parse(path.read_text()))
            found += [(name, *each) for each in called if name not in ONLY.get(each[0], name)]
    assert found == []


def test_the_check_itself_finds_a_print() -> None:
    tree = ast.parse("print(1)\nrich.console.Console()\ncsv.writer(file)")
    assert [name for name, _ in calls(tree)] == ["print", "Console", "writer"]
