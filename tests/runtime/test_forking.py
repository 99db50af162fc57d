"""The server that processes are forked from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.places import ROOT

SLOW = """
import pathlib, time
pathlib.Path({mark!r}).touch()
time.sleep(1.5)
"""
# The process itself, as a worker of a launcher, has its own way with the signal.
PARENT = """
import signal, sys
from cutlayer.runtime.ground.forking import server
context = server("slow_to_load")
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("started", flush=True)
process = context.Process(target=print, args=("in the process",))
process.start()
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_reach_a_server_that_is_still_loading(
    tmp_path: Path, number: signal.Signals
) -> None:
    mark = tmp_path / "loading"
    (tmp_path / "slow_to_load.py").write_text(SLOW.format(mark=str(mark)))
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    end = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "in the process\n", "")
