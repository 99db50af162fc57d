"""A run killed with SIGKILL at any instant resumes to the bit-identical results and weights, but for times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT


@pytest.mark.parametrize("algorithm", ["fsl_sage", "scaffold"])
def test_killed_twice_and_resumed(algorithm: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.killing", algorithm, str(tmp_path), "8"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{algorithm}: killed at 8 moments")
