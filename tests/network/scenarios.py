"""What goes wrong between machines, one scenario after another, each on a network of its own.

`python -m tests.network.scenarios [SCENARIO ...] [algorithm=NAME ...] [form=namespaces|loopback]` runs all that are
named, or all, and prints a line for each. The tests run some of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tests.network import hosts
from tests.network.programs import Network
from tests.network.runs import SETTING, Federation, differing, undisturbed

ALGORITHMS = ("sl_single_server", "fsl_sage", "fed_rep", "fsmkd", "scaffold")
ROUNDS = 8

Scenario = Callable[[Network, Path, str], None]


def _settings(algorithm: str, *more: str, rounds: int = ROUNDS) -> tuple[str, ...]:
    # Computed as one, as in one process by default, clients differ by rounding from those that compute alone.
    alone = ("algorithm.together=never",) if algorithm == "moco_sfl" else ()
    return (*SETTING, f"algorithm={algorithm}", *alone, f"rounds={rounds}", *more)


def _run(network: Network, folder: Path, algorithm: str, *more: str) -> Federation:
    """Everything started, on links that are slow enough for a round to be met in its middle."""
    for host in network.clients:
        host.link.shape(delay_ms=5)
    federation = Federation(network, folder, _settings(algorithm, *more))
    federation.start()
    return federation


def _as_undisturbed(federation: Federation, folder: Path, algorithm: str) -> None:
    """The run ends, and with the bits of one in one process."""
    found = federation.finish()
    wrong = differing(undisturbed(folder / "whole", _settings(algorithm)), found)
    assert not wrong, f"{wrong} differ"


def bad_links(network: Network, folder: Path, algorithm: str) -> None:
    """Slow, lossy and narrow links, each another: the result is that of one process."""
    network.clients[0].link.shape(delay_ms=20, jitter_ms=10)
    network.clients[1].link.shape(delay_ms=5, loss_percent=2)
    network.clients[2].link.shape(rate_mbit=20)
    federation = Federation(network, folder, _settings(algorithm))
    federation.start()
    _as_undisturbed(federation, folder, algorithm)


def link_cut(network: Network, folder: Path, algorithm: str) -> None:
    """A client's link is cut in the middle of its round and healed: the round is repeated."""
    federation = _run(network, folder, algorithm)
    federation.after_round(2)
    federation.in_turn_of(1)
    with federation.losing(1):
        network.clients[1].link.cut()
    network.clients[1].link.heal()
    _as_undisturbed(federation, folder, algorithm)


def two_links_cut(network: Network, folder: Path, algorithm: str) -> None:
    """Two clients' links are cut at once."""
    federation = _run(network, folder, algorithm)
    federation.after_round(2)
    federation.in_turn_of(0)
    with federation.losing(0, 2):
        for client in (0, 2):
            network.clients[client].link.cut()
    for client in (2, 0):
        network.clients[client].link.heal()
    _as_undisturbed(federation, folder, algorithm)


def server_cut_off(network: Network, folder: Path, algorithm: str) -> None:
    """The server's own link is cut: it loses all clients, and all of them lose it."""
    federation = _run(network, folder, algorithm)
    federation.after_round(2)
    federation.in_turn_of(2)
    with federation.losing(0, 1, 2):
        network.server.link.cut()
    network.server.link.heal()
    _as_undisturbed(federation, folder, algorithm)


def client_killed(network: Network, folder: Path, algorithm: str) -> None:
    """A client's process is killed in the middle of its round and started again."""
    federation = _run(network, folder, algorithm)
    federation.after_round(2)
    federation.in_turn_of(0)
    federation.clients[0].kill()
    federation.start_client(0)
    _as_undisturbed(federation, folder, algorithm)


def client_hangs(network: Network, folder: Path, algorithm: str) -> None:
    """A client's process stops until the server has given it up, and goes on."""
    federation = _run(network, folder, algorithm)
    federation.after_round(2)
    federation.in_turn_of(2)
    with federation.losing(2):
        federation.clients[2].hang()
    federation.clients[2].go_on()
    _as_undisturbed(federation, folder, algorithm)


def server_killed(network: Network, folder: Path, algorithm: str) -> None:
    """The server is killed in the middle of a round and started again with the same command."""
    federation = _run(network, folder, algorithm)
    federation.after_round(3)
    federation.in_turn_of(1)
    federation.server.kill()
    federation.start_server()
    _as_undisturbed(federation, folder, algorithm)


def one_after_another(network: Network, folder: Path, algorithm: str) -> None:
    """On bad links: a link cut, a client hangs, then the server is killed together with a client."""
    network.clients[0].link.shape(delay_ms=8, jitter_ms=4)
    network.clients[1].link.shape(delay_ms=4, loss_percent=2)
    network.clients[2].link.shape(delay_ms=1, rate_mbit=20)
    federation = Federation(network, folder, _settings(algorithm))
    federation.start()
    federation.after_round(1)
    federation.in_turn_of(1)
    with federation.losing(1):
        network.clients[1].link.cut()
    network.clients[1].link.heal()
    federation.after_round(3)
    federation.in_turn_of(0)
    with federation.losing(0):
        federation.clients[0].hang()
    federation.clients[0].go_on()
    federation.after_round(5)
    federation.in_turn_of(2)
    federation.clients[2].kill()
    federation.server.kill()
    federation.start_server()
    federation.start_client(2)
    _as_undisturbed(federation, folder, algorithm)


def survivors_go_on(network: Network, folder: Path, algorithm: str) -> None:
    """With a quorum of two of three a client that is cut off is left out of rounds, and is back in later ones."""
    federation = _own(network, folder, algorithm, "transport.quorum=0.6", rounds=10_000)
    federation.start()
    federation.after_round(2)
    federation.in_turn_of(1)
    with federation.losing(1):
        network.clients[1].link.cut()
    given_up = federation.rounds
    federation.after_round(given_up + 3)
    network.clients[1].link.heal()
    federation.wait(lambda: 1 in federation.clients_of(federation.rounds), "client 1 back")
    assert 1 in federation.clients_of(1) | federation.clients_of(2)
    assert all(federation.clients_of(number) == {0, 2} for number in range(given_up + 1, given_up + 4))
    assert {0, 2} <= federation.clients_of(federation.rounds)


def images(root: Path, part: int, parts: int) -> None:
    """An image folder with a part of the digits: other pictures in each, and others in number."""
    data, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    for place, number in enumerate(order[part :: parts * (part + 1)]):
        split = "test" if place % 4 == 3 else "train"
        file = root / split / str(labels[number]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data[number].reshape(8, 8) * 15).astype("uint8")).save(file)


def _own(network: Network, folder: Path, algorithm: str, *more: str, rounds: int = ROUNDS) -> Federation:
    """A run in which each client has a folder of its own, and the server one with which it tests."""
    roots = [folder / f"images-{part}" for part in range(4)]
    for part, root in enumerate(roots):
        images(root, part, 4)
    image_folder = ("dataset=image_folder", "dataset.options.channels=1")
    own = (*image_folder, f"dataset.root={roots[3]}", "dataset.distribution=own", "dataset.normalize=none")
    settings = [each for each in _settings(algorithm, *own, *more, rounds=rounds) if each != "dataset=digits"]
    return Federation(network, folder, settings, lambda client: (*image_folder, f"dataset.root={roots[client]}"))


def own_data(network: Network, folder: Path, algorithm: str) -> None:
    """Each client trains on all that lies in a folder of its own."""
    federation = _own(network, folder, algorithm)
    federation.start()
    left = federation.finish()
    assert json.loads((left / "results.json").read_text())["rounds"][-1] == ROUNDS
    samples = [len(list((folder / f"images-{client}" / "train").rglob("*.png"))) for client in range(3)]
    assert len(set(samples)) == 3
    for client, number in enumerate(samples):
        assert f", {number} training samples here" in federation.clients[client].text


SCENARIOS: tuple[Scenario, ...] = (
    *(bad_links, link_cut, two_links_cut, server_cut_off, client_killed, client_hangs, server_killed),
    *(one_after_another, survivors_go_on, own_data),
)


def main(arguments: list[str]) -> int:
    """Run what is named; the number of scenarios that failed."""
    given = [argument.partition("=")[::2] for argument in arguments]
    known = {"algorithm", "form", *(scenario.__name__ for scenario in SCENARIOS)}
    if unknown := sorted({name for name, _ in given} - known):
        raise SystemExit(f"{', '.join(unknown)}: expected algorithm=, form= or any of {', '.join(sorted(known))}")
    named = [scenario for scenario in SCENARIOS if (scenario.__name__, "") in given] or SCENARIOS
    algorithms = [value for key, value in given if key == "algorithm"] or ALGORITHMS
    forms = [value for key, value in given if key == "form"] or [hosts.best_form()]
    failed = 0
    for form, algorithm, scenario in ((f, a, s) for f in forms for a in algorithms for s in named):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="cutlayer-") as name:
            folder = Path(name)
            (folder / "network").mkdir()
            try:
                with hosts.network(folder / "network", form) as network:
                    scenario(network, folder, algorithm)
                outcome = "right"
            except Exception:
                failed += 1
                outcome = f"WRONG\n{traceback.format_exc()}"
        seconds = time.monotonic() - began
        print(f"{form} {algorithm} {scenario.__name__}, {seconds:.1f} s: {outcome}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
