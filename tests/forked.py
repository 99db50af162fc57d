"""Runs the programs again and again, each time in a process forked from one that has loaded everything.

`server` starts this module as a process of its own, which forks before torch has computed anything.
"""

import contextlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cutlayer import main
from cutlayer.runtime.ground.importing import quick_imports
from tests.places import program

with quick_imports():
    import cutlayer.runtime.experiment
    import cutlayer.runtime.job  # noqa: F401


def run(file: str, arguments: Sequence[str], environment: dict[str, str], out: str, err: str) -> NoReturn:
    """`python <file> <arguments>`, a program of the project or another file, with its output in two files."""
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent does with it
    os.environ.update(environment)
    path = Path(main.__file__).parent / file
    sys.argv, sys.orig_argv = [str(path), *arguments], [*program(path.stem), *arguments]
    status = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
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
    """Read lines of JSON: what to run, answered with the process's number, or one to wait for, with its status."""
    for line in sys.stdin:
        task = json.loads(line)
        if isinstance(task, int):
            print(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(**task)
        print(child, flush=True)


@dataclass(frozen=True)
class Started:
    """A run that has been started, and where it prints."""

    arguments: tuple[str, ...]
    pid: int
    out: Path
    err: Path
    _ask: Callable[[Any], int]

    def wait(self) -> subprocess.CompletedProcess[str]:
        """To be called once."""
        status = self._ask(self.pid)
        return subprocess.CompletedProcess([*self.arguments], status, self.out.read_text(), self.err.read_text())

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Forks:
    """Starts `main.py` or another program, or runs it to its end when called."""

    def __init__(self, ask: Callable[[Any], int], outputs: Path) -> None:
        self._ask, self._outputs, self._numbers = ask, outputs, itertools.count()

    def start(self, arguments: Sequence[str], file: str = "main.py", **more: str) -> Started:
        out, err = (self._outputs / f"{next(self._numbers)}" for _ in range(2))
        pid = self._ask(
            {"file": file, "arguments": [*arguments], "environment": more, "out": str(out), "err": str(err)}
        )
        return Started((*arguments,), pid, out, err, self._ask)

    def __call__(
        self, arguments: Sequence[str], file: str = "main.py", **more: str
    ) -> subprocess.CompletedProcess[str]:
        return self.start(arguments, file, **more).wait()


@contextlib.contextmanager
def server(checkout: Path, outputs: Path, environment: Mapping[str, str]) -> Generator[Forks]:
    """Gives what runs `main.py` of a checkout: `forks(arguments, **more variables)`; not for sweeps.

    Args:
        outputs: a folder for what the runs print.
    """
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "tests.forked"]
    with subprocess.Popen(command, cwd=checkout, env={**environment}, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(task: Any) -> int:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield Forks(ask, outputs)
        process.stdin.close()


if __name__ == "__main__":
    serve()
    os._exit(0)  # what the libraries tidy up takes seconds
