"""What the tests of the network share: hosts, in the form that can be had here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network import hosts
from tests.network.programs import Network


def _made(folder: Path, form: str) -> Iterator[Network]:
    if reason := hosts.missing(form):
        pytest.skip(reason)
    folder.mkdir()
    with hosts.network(folder, form) as made:
        yield made


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """1 server and 3 clients."""
    yield from _made(tmp_path / "network", hosts.best_form())


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Network]:
    """1 server and 3 clients, as they are where no hosts can be made."""
    yield from _made(tmp_path / "network", "loopback")


@pytest.fixture(params=hosts.FORMS)
def each_network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Network]:
    """1 server and 3 clients, in each form that can be had here."""
    yield from _made(tmp_path / "network", request.param)
