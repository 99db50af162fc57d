"""The comparison with other frameworks, as far as it goes without installing them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import __main__ as peers
from benchmarks.peers import by_cutlayer, places, side
from benchmarks.peers.work import Clock, Counted, Given, Told, Work

WORK = Work(clients=6, images=7, tests=40, cohort=3, batch=3, rounds=2)
STEPS, SAMPLES = 27, 63  # 3 rounds of 3 clients: batches of 3, 3 and 1 images, 7 in all


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return by_cutlayer.give(tmp_path_factory.mktemp("given"), WORK)


def by_hand(given: Given) -> dict[str, torch.Tensor]:
    """FedAvg as a plain loop, weights after the last round."""
    weights = given.model().state_dict()
    for cohort in given.tensors["cohorts"].tolist():
        reached: list[dict[str, torch.Tensor]] = []
        for client in cohort:
            model = given.model()
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(model.parameters(), lr=given.work.lr)
            for x, y in given.batches(client):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            reached.append(model.state_dict())
        weights = {name: torch.stack([one[name] for one in reached]).mean(0) for name in weights}
    return weights


@pytest.mark.parametrize("workers", [1, 2])
def test_cutlayer_does_the_stated_work(given: Given, workers: int) -> None:
    clock, name = Clock(), f"cutlayer-{workers}"
    done = by_cutlayer.run(given, workers, clock)
    assert (done.counted.steps, done.counted.samples) == (STEPS, SAMPLES) == (WORK.steps, WORK.samples)
    assert len(clock.ends) == 3
    given.tell(name, done.weights, done.counted, clock, {})
    loop = Clock()
    for _ in range(3):
        loop.on_round(lambda: clock.first)
    given.tell("loop", by_hand(given), done.counted, loop, {})
    assert given.apart(name, "loop")[1] < 1e-3
    told = given.told(name)
    assert told.rounds == 3
    assert told.parameters == 545_098  # torchvision would say so too: 896 + 18,496 + 524,416 + 1,290
    assert told.parameters == 3 * 32 * 9 + 32 + 32 * 64 * 9 + 64 + 4096 * 128 + 128 + 128 * 10 + 10


def test_a_side_leaves_what_it_tells(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    side.main(["cutlayer", str(given.folder), "1", "told"])
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    told = given.told("told")
    assert told.counted == {"steps": STEPS, "samples": SAMPLES}
    assert told.seconds > 0
    # The second of several processes tells nothing.
    monkeypatch.setattr(by_cutlayer, "run", lambda *_: None)
    side.main(["cutlayer", str(given.folder), "1", "silent"])
    torch.set_num_threads(before)
    with pytest.raises(FileNotFoundError):
        given.told("silent")


def test_only_passes_in_training_are_counted() -> None:
    module, counted = nn.Linear(2, 2), Counted()
    hook = counted.attach(module)
    module(torch.zeros(3, 2))
    with torch.no_grad():
        module(torch.zeros(5, 2))
    module.eval()(torch.zeros(7, 2))
    hook.remove()
    module.train()(torch.zeros(9, 2))
    assert counted == Counted(steps=1, samples=3)


def test_the_first_round_is_not_timed() -> None:
    clock, asked = Clock(), list[int]()

    def weights() -> dict[str, torch.Tensor]:
        asked.append(len(clock.ends))
        return {"w": torch.ones(1)}

    for _ in range(3):
        clock.on_round(weights)
    assert asked == [0], "the weights are fetched before the clock starts, and then no more"
    clock.ends = [5.0, 7.0, 11.0]
    assert clock.seconds == 6.0


def told(seconds: float = 1.0, **changes: object) -> Told:
    counted = {"steps": STEPS, "samples": SAMPLES}
    whole = Told(seconds, 3, counted, 10, (0.1, 2.3), (0.9, 0.4), {"torch": str(torch.__version__)}, 1)
    return dataclasses.replace(whole, **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "apart", "said"),
    [
        ({"counted": {"steps": STEPS - 1, "samples": SAMPLES}}, (0.0, 0.0), "steps 26 for 27"),
        ({"counted": {"steps": STEPS, "samples": SAMPLES - 1}}, (0.0, 0.0), "samples 62 for 63"),
        ({"rounds": 2}, (0.0, 0.0), "rounds 2 for 3"),
        ({"threads": 2}, (0.0, 0.0), "threads 2 for 1"),
        ({"versions": {"torch": "1.0"}}, (0.0, 0.0), "torch 1.0 for"),
        ({"after": (0.1, 2.3)}, (0.0, 0.0), "did not learn"),
        ({"after": (0.1, float("nan"))}, (0.0, 0.0), "did not learn"),
        ({}, (1e-3, 0.0), "other ones"),
        ({}, (0.0, 0.2), "other ones"),
        ({}, (0.0, float("nan")), "other ones"),
    ],
)
def test_other_work_is_not_compared(changes: dict[str, object], apart: tuple[float, float], said: str) -> None:
    peers.check(WORK, told(), (1e-5, 0.05))
    with pytest.raises(places.PeerError, match=re.escape(said)):
        peers.check(WORK, told(**changes), apart)


class Fixed(peers.Race):
    """Runs of fixed seconds; a side that has none fails."""

    def __init__(self, seconds: dict[str, Sequence[float]]) -> None:
        self.seconds, self.order = {name: list(values) for name, values in seconds.items()}, list[str]()

    def run(self, side: str, workers: int) -> peers.Ran:
        self.order.append(side)
        if not self.seconds[side]:
            raise places.PeerError("it failed (no more)")
        return peers.Ran(told(self.seconds[side].pop(0)), 9.0, (0.0, 0.0))


def test_ratios_are_those_of_each_repeat_and_sides_take_turns() -> None:
    race, lines = Fixed({"cutlayer": [1, 2, 4], "pfl": [2, 2, 2], "flower": [3, 8, 20]}), list[str]()
    assert peers.compare(race, ["pfl", "flower"], 1, 3, lines.append)
    assert race.order == [*("cutlayer", "pfl", "flower"), *("pfl", "flower", "cutlayer"), "flower", "cutlayer", "pfl"]
    shown = "\n".join(lines)
    assert "pfl      1.00 (1.00 .. 1.00) rounds a second, Cutlayer gives 1.00 (0.50 .. 2.00) times its rounds" in shown
    assert "flower   0.25 (0.10 .. 0.67) rounds a second, Cutlayer gives 4.00 (3.00 .. 5.00) times its rounds" in shown
    assert "27 steps on 63 images, 10 parameters, test accuracy 10.0% to 90.0%, loss 2.300 to 0.400" in shown


def test_a_peer_that_fails_is_one_line_and_the_other_is_compared() -> None:
    race, lines = Fixed({"cutlayer": [1, 1], "pfl": [1], "flower": [2, 2]}), list[str]()
    assert peers.compare(race, ["pfl", "flower"], 2, 2, lines.append)
    assert lines[:2] == [
        "2 workers, repeat 1, rounds a second: cutlayer 2.00, pfl 2.00, flower 1.00",
        "pfl, 2 workers: it failed (no more)",
    ]
    assert race.order.count("pfl") == 2
    assert not any("  pfl" in line for line in lines)
    assert "Cutlayer gives 2.00" in "\n".join(lines)
    assert not peers.compare(Fixed({"cutlayer": [1], "pfl": []}), ["pfl"], 1, 1, lines.append)
    assert not peers.compare(Fixed({"cutlayer": [], "pfl": [1]}), ["pfl"], 1, 1, lines.append)


@pytest.mark.parametrize("option", ["--workers 0", "--workers two", "--rounds 0", "--repeats 0", "--peer fedml"])
def test_wrong_options_are_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.parse(option.split())
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_workers_are_each_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "cores", lambda: 2)
    assert peers.parse([]).workers == [1, 2]
    assert peers.parse(["--workers", "auto", "2", "3"]).workers == [2, 3]


def test_a_peer_that_cannot_be_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is real; what it is to install is not there."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(places.PEERS, "pfl", "no-such-package-of-cutlayer>=1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    lines: list[str] = []
    assert peers.interpreters(["pfl"], tmp_path / "made", lines.append) == {"cutlayer": sys.executable}
    (line,) = lines
    assert line.startswith("pfl: no-such-package-of-cutlayer>=1 cannot be installed (ERROR: ")
    assert list((tmp_path / "made").iterdir()) == [], "nothing half made is left"


def test_an_environment_sees_this_torch_and_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(places.PEERS, "pfl", "safetensors")  # which is there already
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = places.environment("pfl", tmp_path)
    seen = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    assert seen.stdout.strip() == torch.__version__, seen.stderr
    made = tmp_path / "pfl" / "made.json"
    mark = made.stat().st_mtime_ns
    assert places.environment("pfl", tmp_path) == python
    assert made.stat().st_mtime_ns == mark
    made.write_text(json.dumps({**json.loads(made.read_text()), "torch": "1.0"}))
    places.environment("pfl", tmp_path)
    assert json.loads(made.read_text())["torch"] != "1.0", "made anew for another torch"


def test_sides_get_one_thread_a_token_and_send_no_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    found = places.variables(tmp_path, allocator=False)
    assert not {"RAY_ADDRESS", "MALLOC_ARENA_MAX"} & found.keys()
    assert (found["FLWR_TELEMETRY_ENABLED"], found["RAY_USAGE_STATS_ENABLED"], found["RAY_AUTH_MODE"]) == (
        "0",
        "0",
        "token",
    )
    token = Path(found["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert places.variables(tmp_path, allocator=True).items() > found.items()


def test_a_side_has_a_network_of_its_own_in_which_everything_ends_with_it() -> None:
    try:
        start = places.alone()
    except places.PeerError as error:
        pytest.skip(str(error))
    script = "ip -o link | wc -l; (exec -a left-behind sleep 600) > /dev/null 2>&1 & echo $!"
    done = subprocess.run([*start, "bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[0] == "1", "nothing but a loopback interface"
    names = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(name.startswith(b"left-behind") for name in names)


def test_a_side_that_fails_says_why(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no room')"])
    with pytest.raises(places.PeerError, match=re.escape("it failed (no room)")):
        peers.Race(given, {"cutlayer": sys.executable}, allocator=False)


def test_the_whole_command_without_a_peer_to_compare_with_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        peers, "command", lambda name, python, _, rest: [python, "-m", "benchmarks.peers.side", name, *rest]
    )

    def environment(*_: object) -> str:
        raise places.PeerError("it cannot be installed")

    monkeypatch.setattr(peers, "environment", environment)
    lines: list[str] = []
    options = ["--peer", "pfl", "--workers", "1", "--rounds", "1", "--repeats", "1", "--environments", str(tmp_path)]
    assert peers.main(options, lines.append, WORK) == 1
    assert "pfl: it cannot be installed" in lines
    assert any("cutlayer " in line and "rounds a second" in line for line in lines)
    assert lines[-1].startswith("whole command ")
