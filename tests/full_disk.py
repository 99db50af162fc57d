"""Runs a small experiment on a disk that fills up at another moment each time, makes room, and compares what is left.

    python -m tests.full_disk [tries]

The disk is a file system in memory of so many pages, which takes root. Prints which files the disk was full at.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import torch

from cutlayer.runtime.launching.hydra_errors import explain
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.settings import RunConfig
from tests.damage import METHODS, SETTING, play
from tests.killing import left

PAGE = 4096
TEXT = "cannot be written: No space left on device; once there is room, the same command resumes"


@contextlib.contextmanager
def disk(folder: Path, pages: int) -> Generator[None]:
    """A file system of so many pages; CalledProcessError where this process may not mount one."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield
    finally:
        # At once gone from here, and for good when the last file that an error's frames still hold is closed.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(folder: Path, pages: int) -> None:
    """Give the file system so many pages."""
    subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", str(folder)], check=True)


def fill(config: RunConfig, folder: Path, pages: int, enough: int) -> str | None:
    """Run on a disk of so many pages, then on one of enough; the file at which it was full, None where it was not.

    Raises:
        AssertionError: the error is not the one line, or the run ends in other bits.
    """
    with disk(folder, pages):
        line = _line(config, folder)
        if line is None:
            return None
        assert line.endswith(TEXT), line
        assert "\n" not in line
        grow(folder, enough)
        path = play(config, folder)
        keep = folder.with_name("kept")
        shutil.rmtree(keep, ignore_errors=True)
        shutil.copytree(path, keep)
    return Path(line.split(":")[0]).name


def _line(config: RunConfig, folder: Path) -> str | None:
    """What the command line says of a run that fails; None where it does not."""
    try:
        play(config, folder)
    except OSError as error:
        return explain(error) or f"a traceback: {error!r}"
    return None


def main(tries: int) -> int:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    config = load_config(["algorithm=scaffold", *SETTING, *METHODS["scaffold"]])
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        expected = left(play(config, home / "whole"))
        enough = 2 * sum(path.stat().st_size // PAGE + 2 for path in (home / "whole").rglob("*"))
        found: Counter[str] = Counter()
        for at in range(tries):
            pages = 4 + at * (enough - 4) // (2 * tries)
            full = fill(config, home / "disk", pages, enough)
            if full is None:
                continue
            found[full] += 1
            ended = left(home / "kept")
            wrong = [key for key in expected if expected[key] != ended[key]]
            assert not wrong, f"full at {full} with {pages} pages: {wrong} differ"
    print(f"full {found.total()} times, at {len(found)} files: {', '.join(sorted(found))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
