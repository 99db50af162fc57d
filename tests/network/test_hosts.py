"""Runs on several hosts by the command lines of a user, while links and processes fail.

`python -m tests.network.scenarios` has more of this: every scenario by itself, with more algorithms.
"""

from pathlib import Path

import pytest

from tests.network import scenarios
from tests.network.programs import Network

pytest.importorskip("grpc", reason="grpcio is not installed")


def test_links_and_processes_fail_and_the_bits_are_those_of_one_process(network: Network, tmp_path: Path) -> None:
    scenarios.one_after_another(network, tmp_path, "fsl_sage")


def test_those_who_are_left_go_on_where_no_hosts_can_be_made(loopback: Network, tmp_path: Path) -> None:
    scenarios.survivors_go_on(loopback, tmp_path, "sl_single_server")
