"""A run killed with SIGKILL at any instant resumes to the bit-identical results and weights, but for times."""

from pathlib import Path

import pytest

from tests import killing
from tests.forked import Forks


@pytest.mark.parametrize("algorithm", ["fsl_sage", "scaffold"])
def test_killed_twice_and_resumed(algorithm: str, forks: Forks, tmp_path: Path) -> None:
    done = forks([algorithm, str(tmp_path), "8"], killing.__file__)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{algorithm}: killed at 8 moments")
