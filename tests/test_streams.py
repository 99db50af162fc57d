"""Programs whose standard streams are closed, full or broken do what they were started for, and end well."""

import subprocess
import sys
from pathlib import Path

import pytest

from cutlayer.runtime.records.results import Results, RoundRecord
from tests.places import ROOT, program
from tests.test_main import command, environment

# Shell's words after the command; each is tried by a small program, and some of them by whole runs.
WAYS = {
    "closed": "<&- >&- 2>&-",
    "no output": ">&-",
    "no errors": "2>&-",
    "full": ">/dev/full 2>/dev/full",
    "broken pipe": "2>&1 | true",
}
ODD = {
    "no size": {"COLUMNS": "0", "LINES": "0"},
    "one column": {"COLUMNS": "1"},
    "wide": {"COLUMNS": "1000000000"},
    "dumb": {"TERM": "dumb"},
    "ascii": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
}
SMALL = """
import logging, os, sys
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_errors, print_lines
def main():
    logging.basicConfig(stream=sys.stdout, level=logging.INFO)
    for number in range(2000):
        print_lines(f"ünïcode {number}")
        logging.info("ünïcode")
        print_errors("ünïcode")
    print("x" * 100_000, flush=True)
    sys.stdin.read()
    with open(sys.argv[1], "w") as file:
        file.write(f"{file.fileno() > 2} {os.environ.get('COLUMNS')} {sys.stdout.isatty()}")
    return 0
run_program(main)
"""


def shell(words: list[str], way: str, **more: str) -> int:
    """The exit status of a command whose streams are redirected so; of a pipe that of its first part."""
    line = '"$@" ' + (way if "<&-" in way else f"</dev/null {way}")
    variables = environment(**more)
    for name in {"TERM", "COLUMNS", "LINES"} - more.keys():
        variables.pop(name, None)
    script = f"set -o pipefail; {line}"
    return subprocess.run(["bash", "-c", script, "bash", *words], cwd=ROOT, env=variables, check=False).returncode


@pytest.mark.parametrize("way", WAYS)
def test_a_program_comes_to_its_end_whatever_its_streams_are(way: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    assert shell([sys.executable, "-c", SMALL, str(done)], WAYS[way]) == 0
    assert done.read_text() == "True None False"


@pytest.mark.parametrize("odd", ODD)
def test_a_program_comes_to_its_end_whatever_its_terminal_is(odd: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    assert shell([sys.executable, "-c", SMALL, str(done)], ">/dev/null 2>&1", **ODD[odd]) == 0
    assert done.read_text() == "True None False"


def test_no_traceback_and_nothing_lost_where_the_encoding_lacks_a_letter() -> None:
    code = "from cutlayer.runtime.ground import streams, text; "
    code += "streams.run_program(lambda: text.print_lines('ü\\x1b') or 0)"
    variables = environment(PYTHONIOENCODING="ascii")
    reported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, check=True)
    assert (reported.stdout, reported.stderr) == (b"\\xfc\\x1b\n", b"")


def test_a_run_and_a_sweep_are_not_lost_for_their_streams(tmp_path: Path) -> None:
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    assert shell(command(run, "progress=lines"), "<&- 2>&1 | true", TERM="dumb") == 0
    both = command(sweep, "-m", "lr=0.1,0.01", "hydra.launcher.n_jobs=1", "progress=auto")
    assert shell(both, "<&- >&- 2>&-") == 0
    assert [len(list(folder.rglob("model.safetensors"))) for folder in (run, sweep)] == [1, 2]


def test_the_other_programs_do_their_work_too(tmp_path: Path) -> None:
    results = Results(tmp_path / "saves" / "a")
    results.start({"algorithm": {"name": "x"}, "model": {"name": "m"}, "dataset": {"name": "d", "distribution": "iid"}})
    results.record(RoundRecord(1, 0.5, 1.0, 1.0, 8, 8, 0, 8, *[1.0] * 4, clients=2), [])
    results.finish()
    config = tmp_path / "config.yaml"
    config.write_text("{figures: [], report: false}")
    plot = [*program("plot_results"), "--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "out")]
    assert shell([*plot, "--config", str(config)], "<&- >&- 2>/dev/full") == 0
    assert len(list((tmp_path / "out").rglob("table.csv"))) == 1
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "network.json").write_text('{"clients": [{}, {}]}')
    assert shell([*program("status"), str(tmp_path / "n")], ">/dev/full 2>&-") == 0
    # A mistake is one, whether or not anybody reads it.
    for name in ("probe", "attack", "personalize", "generate", "certificates", "status"):
        assert shell([*program(name), "nowhere=1"], ">&- 2>&-") == 1, name
