"""Simulated time against closed forms and an independent computation, round by round."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.plotting.timing import ROUND_PARTS, Link, format_in_unit, simulated_time, time_parts, time_unit
from cutlayer.runtime.ground.config import ConfigError


def recorded(**changes: Any) -> dict[str, Any]:
    """Four clients, two evaluations in five rounds; all figures are in proportion to the rounds."""
    rounds = [2, 5]
    results: dict[str, Any] = {"rounds": rounds, "in_turn": False}
    results |= {"comm_framed": [10_000_000 * number for number in rounds]}
    results |= {"time_client": [8.0 * number for number in rounds], "time_server": [0.5 * number for number in rounds]}
    results |= {"round_trips": [12 * number for number in rounds], "client_rounds": [4 * number for number in rounds]}
    return {name: value for name, value in (results | changes).items() if value is not None}


def test_a_round_of_equal_clients_in_parallel_by_hand() -> None:
    # A round: 8 s of computing, 10 MB and 12 round trips, by four clients at once, then 0.5 s of the server.
    link = Link(bandwidth_mbit=40.0, rtt_ms=100.0)
    transfer = 80_000_000 / 40_000_000 / 4
    expected = 8 / 4 + transfer + 12 * 0.1 / 4 + 0.5
    np.testing.assert_allclose(simulated_time(recorded(), link), [2 * expected, 5 * expected])
    assert time_parts(recorded(), link) == pytest.approx(
        {"client": 2.0, "server": 0.5, "transfer": transfer, "waiting": 0.3}
    )


def test_clients_that_work_in_turn_wait_for_each_other() -> None:
    link = Link(40.0, 100.0)
    expected = 8 + 2.0 + 1.2 + 0.5
    np.testing.assert_allclose(simulated_time(recorded(in_turn=True), link), [2 * expected, 5 * expected])


def test_one_party_that_sends_nothing_takes_its_own_time() -> None:
    alone = recorded(comm_framed=[0, 0], round_trips=[0, 0], client_rounds=[2, 5], time_server=[0.0, 0.0])
    np.testing.assert_allclose(simulated_time(alone, Link(1e-3, 1e6)), alone["time_client"])


def test_an_ideal_link_leaves_the_computing() -> None:
    np.testing.assert_allclose(simulated_time(recorded(), Link(1e15, 0.0)), [2 * 2.5, 5 * 2.5], rtol=1e-6)


def test_a_round_in_which_everybody_dropped_out_takes_its_time() -> None:
    times = simulated_time(recorded(client_rounds=[0, 12]), Link(40.0, 100.0))
    assert times is not None
    np.testing.assert_allclose(times[0], 2 * (8 + 2.0 + 1.2 + 0.5))


@given(
    st.lists(
        st.tuples(*(st.integers(0, 10**6) for _ in range(5)), st.integers(1, 4), st.integers(1, 9)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0.1, 1e4),
    st.floats(0, 1e3),
    st.booleans(),
)
def test_any_history_equals_a_plain_loop(
    history: list[tuple[int, ...]], bandwidth: float, rtt: float, in_turn: bool
) -> None:
    columns = [list(np.cumsum(column).tolist()) for column in zip(*history, strict=True)]
    names = ("comm_framed", "time_client", "time_server", "round_trips", "_", "rounds", "clients")
    results: dict[str, Any] = dict(zip(names, columns, strict=True)) | {"in_turn": in_turn}
    results["client_rounds"] = list(np.cumsum([rounds * clients for *_, rounds, clients in history]).tolist())
    seconds, expected = 0.0, []
    for framed, client, server, trips, _, _, clients in history:
        together = 1 if in_turn else clients
        seconds += (client + 8 * framed / (bandwidth * 1e6) + trips * rtt / 1000) / together + server
        expected.append(seconds)
    link = Link(bandwidth, rtt)
    np.testing.assert_allclose(simulated_time(results, link), expected, rtol=1e-9, atol=1e-9)
    parts = time_parts(results, link)
    assert parts is not None
    assert tuple(parts) == ROUND_PARTS
    assert math.isclose(sum(parts.values()) * results["rounds"][-1], seconds, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("round_trips", "client_rounds", "comm_framed", "time_client", "time_server")),
        {"round_trips": [1]},
        {"round_trips": [1, None]},
        {"round_trips": "many"},
        {"round_trips": [[1], [2]]},
        {"time_client": [1.0, math.nan]},
        {"time_client": [1.0, "much"]},
        {"rounds": [2, 2]},
        {"rounds": []},
    ],
    ids=str,
)
def test_what_was_not_recorded_gives_no_time(change: Mapping[str, Any]) -> None:
    assert simulated_time(recorded(**change), Link()) is None
    assert time_parts(recorded(**change), Link()) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bandwidth_mbit": 0.0}, "bandwidth_mbit=0.0: expected a number > 0"),
        ({"bandwidth_mbit": math.inf}, "bandwidth_mbit=inf: expected a number > 0"),
        ({"bandwidth_mbit": math.nan}, "bandwidth_mbit=nan: expected a number > 0"),
        ({"rtt_ms": -1.0}, "rtt_ms=-1.0: expected a number >= 0"),
        ({"rtt_ms": math.nan}, "rtt_ms=nan: expected a number >= 0"),
    ],
)
def test_links_that_cannot_be(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Link(**keys)
    assert str(caught.value) == message


def test_links_in_words() -> None:
    assert Link().label == "100 Mbit/s, 20 ms round trip"
    assert Link(2500.0, 0.5).label == "2.5 Gbit/s, 0.5 ms round trip"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.0, "0.00 µs"), (2e-5, "20.0 µs"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (1.0, "1.00 s"), (119.0, "119 s")),
        *((120.0, "2.00 min"), (7199.0, "120 min"), (7200.0, "2.00 h"), (172_800.0, "2.00 d"), (1e8, "1157 d")),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert format_in_unit(seconds) == text
    assert text.endswith(time_unit(seconds)[1])
