"""A run killed with SIGKILL at any instant resumes to the bit-identical results and weights, but for times."""

from pathlib import Path

import pytest

from tests import killing
from tests.forked import Forks


@pytest.mark.parametrize(("algorithm", "times"), [("fsl_sage", 8), ("scaffold", 8), ("flora", 3)])
def test_killed_twice_and_resumed(algorithm: str, times: int, forks: Forks, tmp_path: Path) -> None:
    done = forks([algorithm, str(tmp_path), str(times)], killing.__file__)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{algorithm}: killed at {times} moments" in done.stdout
