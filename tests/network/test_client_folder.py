"""The folder of a client at its own machine goes again where the client keeps nothing in it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.agreement import shared
from tests.conftest import SMALL
from tests.network.serving import served

pytest.importorskip("grpc", reason="the extra grpc is not installed")

OWN = ("transport=grpc", "role=client", "server=127.0.0.1:1", "client_id=3")


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        (("num_clients=2",), "client_id=3: expected a client of the run, 0 to 1"),
        (("dataset=image_folder", "dataset.root=nowhere"), "dataset.root=nowhere: "),
    ],
)
def test_a_client_that_cannot_take_part_leaves_nothing(theirs: Sequence[str], line: str, tmp_path: Path) -> None:
    from cutlayer.runtime.network.client.program import _Client

    (tmp_path / "mine").mkdir()
    here = [key for key in theirs if key.startswith("dataset")]
    config = load_config([*OWN, *here, f"save_dir={tmp_path / 'mine' / 'saves'}"])
    server = load_config([*SMALL, *theirs, "algorithm=fed_per"])
    client = _Client(config, here)
    with pytest.raises(ConfigError) as error:
        client._settle({"run": "run", "rounds": 1, "config": shared(server)})
    assert str(error.value).startswith(line)
    assert any(tmp_path.rglob(".lock"))
    client.release()
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine"]


@pytest.mark.parametrize("name", ["fed_avg", "fed_per"])
def test_a_client_leaves_what_it_keeps_and_nothing_else(name: str, tmp_path: Path) -> None:
    with served(tmp_path, f"algorithm={name}", "num_clients=1") as federation:
        federation.step()
    places = [*tmp_path.rglob("client=0")]
    assert len(places) == (name == "fed_per")
    assert all(any(place.rglob("state-*.safetensors")) for place in places)
