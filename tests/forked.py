"""Runs main.py again and again, each time in a process forked from one that has loaded everything.

`server` starts this module as a process of its own, which forks before torch has computed anything.
"""

import contextlib
import itertools
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import cutlayer.runtime.experiment
import cutlayer.runtime.job  # noqa: F401
from cutlayer import main
from tests.places import program


def run(arguments: Sequence[str], environment: dict[str, str], out: str, err: str) -> NoReturn:
    """`python main.py <arguments>`, with its output in two files."""
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    start = program("main")
    sys.argv, sys.orig_argv = [main.__file__, *arguments], [*start, *arguments]
    status = 0
    try:
        runpy.run_path(main.__file__, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Read what to run, a line of JSON each, and answer each with the exit status."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


Call = Callable[..., subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def server(checkout: Path, outputs: Path, environment: Mapping[str, str]) -> Generator[Call]:
    """Gives what runs `main.py` of a checkout: `call(arguments, **more variables)`; not for sweeps.

    Args:
        outputs: a folder for what the runs print.
    """
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "tests.forked"]
    with subprocess.Popen(command, cwd=checkout, env={**environment}, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        numbers = itertools.count()

        def call(arguments: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
            out, err = (outputs / f"{next(numbers)}" for _ in range(2))
            task = {"arguments": [*arguments], "environment": more, "out": str(out), "err": str(err)}
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            return subprocess.CompletedProcess([*arguments], status, out.read_text(), err.read_text())

        yield call
        process.stdin.close()


if __name__ == "__main__":
    serve()
    os._exit(0)  # what the libraries tidy up takes seconds
