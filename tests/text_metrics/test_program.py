"""`python -m cutlayer.text_metrics`: the figures of two files, or one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from cutlayer.text_metrics import USUAL
from cutlayer.text_metrics.__main__ import main
from tests.places import checkout
from tests.text_metrics.samples import FIGURES, FOLDER

HUMAN = [str(FOLDER / f"human_{name}.txt") for name in ("hypotheses", "references")]


def test_figures_are_the_official_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu", reason="the extra text is not installed")
    assert main(HUMAN) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "50 texts, 287 references"
    assert dict(line.split() for line in lines) == {name: f"{FIGURES['human'][name]:.4f}" for name in USUAL}


def test_all_lines_are_the_references_of_one_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("a b c d\n")
    (tmp_path / "several.txt").write_text("x y\na b c d\n")
    assert main([str(tmp_path / "one.txt"), str(tmp_path / "several.txt"), "--metrics", "rouge_l"]) == 0
    assert capsys.readouterr().out == "1 text, 2 references\nrouge_l  1.0000\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([HUMAN[0], "nowhere.txt"], "file=nowhere.txt: expected a file that can be read (No such file or directory)"),
        ([*HUMAN, "--metrics", "blue"], "metrics=blue: expected a registered text metric; did you mean bleu?"),
        ([HUMAN[1], HUMAN[1], "--metrics", "cider"], "hypotheses: 336 texts for 50 groups of references; expected"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert len(error.splitlines()) == 1


def test_it_is_a_program_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "cutlayer.text_metrics", *HUMAN, "--metrics", "rouge_l"]
    done = subprocess.run(command, cwd=checkout(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rouge_l" in done.stdout
