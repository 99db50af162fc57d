"""What users see of a run: on a terminal, in a log, and at its end."""

import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.records import console
from cutlayer.runtime.records.console import Progress, RunFiles, format_seconds, show_summary
from cutlayer.runtime.records.results import RoundRecord, RunSummary


def record(number: int, accuracy: float | None = 0.9833) -> RoundRecord:
    return RoundRecord(number, accuracy, 0.1, 0.5, 12_000_000 * number, 1, 1, 1, 1.0, 0.5, 0.25, 0.125, 2)


SUMMARY = RunSummary(
    rounds=10,
    final_acc=0.97,
    final_loss=0.1,
    best_acc=0.98,
    best_round=7,
    comm_load=12_200_000_000,
    comm_up=10_000_000_000,
    comm_down=2_200_000_000,
    comm_framed=12_300_000_000,
    time_wall=200.0,
    time_client=100.0,
    time_server=50.0,
    time_eval=20.0,
    traffic={"up": {"smashed": (10_000_000_000, 10_100_000_000)}, "down": {"model": (2_200_000_000, 2_200_000_000)}},
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test turns by hand."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records]


def test_quick_rounds_give_a_line_every_few_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(100, "sl mlp", "lines") as progress:
        for number in range(1, 101):
            clock[0] += 0.5
            progress.update(record(number))
    rounds = [line.split("round ")[1].split("/")[0].strip() for line in lines(caplog)]
    assert rounds == ["1", *[str(number) for number in range(11, 100, 10)], "100"]


def test_slow_rounds_give_a_line_each(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(40, "sl mlp", "lines", done=10) as progress:
        for number in (11, 12):
            clock[0] += 60
            progress.update(record(number, 0.9833 if number == 11 else None))
    assert lines(caplog) == [
        "sl mlp: round 11/40, accuracy 98.33%, loss 0.5000, sent 132.0 MB, 1 min 0 s a round, 29 min 0 s left",
        "sl mlp: round 12/40, accuracy 98.33%, loss 0.5000, sent 144.0 MB, 1 min 0 s a round, 28 min 0 s left",
    ]


def test_no_progress_is_silent(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO)
    with Progress(2, "sl", "none") as progress:
        progress.update(record(1))
    show_summary(SUMMARY, mode="none")
    assert not caplog.records
    assert capsys.readouterr().out == ""


def test_a_captured_stream_gets_no_bar(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(1, "sl") as progress:
        progress.update(record(1))
    assert "\x1b" not in capsys.readouterr().out
    assert lines(caplog) == ["sl: round 1/1, accuracy 98.33%, loss 0.5000, sent 12.0 MB, 0.00 s a round"]


def test_an_unknown_mode_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"progress=bars: expected a way to show progress; did you mean bar\?"):
        Progress(1, "", "bars")


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_and_tells_all(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    terminal = Console(file=screen, width=width, force_terminal=True, color_system=None)
    with Progress(
        200, "fsl_sage resnet18 tinyimagenet-noniid_dirichlet", "bar", done=122, console=terminal
    ) as progress:
        progress.update(record(123))
    last = screen.getvalue().split("\r")[-1].split("\x1b[2K")[-1]
    shown = "".join(char for char in last if char.isprintable() and char != "\x1b").split("[?25h")[0].strip()
    for part in ("fsl_sage", "123/200", "98.33%", "1.48 GB", "left"):
        assert part in shown
    assert len(shown) <= width


def test_a_bar_keeps_lines_for_the_log_and_warnings_for_the_screen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    handlers: list[Any] = [logging.StreamHandler(screen), logging.FileHandler(tmp_path / "run.log")]
    root = logging.getLogger()
    caplog.set_level(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        with Progress(1, "sl", "bar", console=Console(file=screen, width=80, force_terminal=True)) as progress:
            progress.update(record(1))
            logging.getLogger("other").warning("client 3 has no data")
        assert handlers[0].stream is screen
        console.log.info("after")
        show_summary(SUMMARY, mode="bar", console=Console(file=screen, width=80))
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
    logged = (tmp_path / "run.log").read_text()
    assert "round 1/1" in logged
    assert "client 3 has no data" in logged
    assert "final accuracy" in logged
    assert "round 1/1" not in screen.getvalue()
    assert "client 3 has no data" in screen.getvalue()
    assert "after" in screen.getvalue()
    assert screen.getvalue().count("final accuracy") == 1


def test_the_summary_says_what_a_user_asks(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    show_summary(SUMMARY, RunFiles(tmp_path, tmp_path / "a picture.png"), "fsl_sage")
    (text,) = lines(caplog)
    rows = {line.strip("| ").split("|")[0].strip(): line for line in text.splitlines() if "|" in line}
    for name, words in {
        "final accuracy": "97.00%",
        "best accuracy": "in round 7",
        "communication": "12.2 GB",
        "up: smashed": "10.0 GB",
        "down: model": "220.0 MB a round",
        "time": "3 min 20 s",
        "clients": "50%",
        "server": "25%",
        "evaluation": "10%",
        "other": "15%",
    }.items():
        assert words in rows[name]
    assert f"results  {tmp_path}\n" in text
    assert text.endswith(f"picture  {tmp_path / 'a picture.png'}")


def test_a_run_without_evaluation_or_messages_has_a_summary(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    show_summary(RunSummary(0, None, None, None, None, *[0] * 4, *[0.0] * 4, {}))
    assert "final accuracy" in caplog.text


def test_parallel_jobs_draw_no_bars() -> None:
    code = (
        "import sys; sys.stdout.isatty = sys.stderr.isatty = lambda: True\n"
        "import os; os.environ['TERM'] = 'xterm'\n"
        "import multiprocessing; from cutlayer.runtime.records.console import on_terminal\n"
        "print(on_terminal()); multiprocessing.current_process().name = 'LokyProcess-1'; print(on_terminal())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.996, "1.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (18720, "5 h 12 min"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(0, 2e5))
def test_durations_never_show_sixty(seconds: float) -> None:
    assert "60" not in format_seconds(seconds).split()


# ---------------------------------------------------------------------- processes that run for days


def stamped(monkeypatch: pytest.MonkeyPatch, journal: Callable[[os.stat_result], str], path: Path) -> str:
    """What lines of the log look like in a file that is standard output, where JOURNAL_STREAM says what."""
    with path.open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("JOURNAL_STREAM", journal(os.fstat(stream.fileno())))
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(message)s"))
        monkeypatch.setattr(console.log, "handlers", [handler])
        console.stamp_lines()
        for text in ("client 0: round 1 of 3 took 0.05 s", "\ntitle\n| a table |"):
            handler.emit(logging.LogRecord("name", logging.INFO, "", 0, text, None, None))
    return path.read_text(encoding="utf-8")


def test_lines_of_a_server_or_client_have_their_time_but_where_the_journal_gives_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = "client 0: round 1 of 3 took 0.05 s\n\ntitle\n| a table |\n"
    text = stamped(monkeypatch, lambda stat: f"{stat.st_dev}:{stat.st_ino + 1}", tmp_path / "terminal")
    time.strptime(text[:19], "%Y-%m-%d %H:%M:%S")
    assert text[19:] == f" {plain}", "a table keeps its shape"
    assert stamped(monkeypatch, lambda stat: f"{stat.st_dev}:{stat.st_ino}", tmp_path / "journal") == plain
