"""`status.py` on a file that somebody has changed by hand, or that a run of any size wrote."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cutlayer import status as program
from cutlayer.runtime.network.server.status import NETWORK, Seen, Status

_ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([10**400, -1, 2**63, 1e300, -0.0, float("nan"), float("inf"), 1e11, 2**62]),
    st.text(max_size=20),
    st.sampled_from(["\x1b[2J\n\r\u202e" * 2, "[red]", "x" * 10_000, "working", "finished"]),
    st.lists(st.integers(), max_size=2),
)
_KEYS = sorted(set(asdict(Status())) - {"clients"})
_CLIENT = st.dictionaries(st.sampled_from(sorted(asdict(Seen()))), _ANY, max_size=3)


def show(folder: Path, reported: Any, capsys: Any) -> tuple[int, list[str], list[str]]:
    """Exit status, output and errors of `status.py` on a file."""
    (folder / NETWORK).write_text(json.dumps(reported), encoding="utf-8", errors="surrogatepass")
    capsys.readouterr()
    code = program.main([str(folder), "once=true"])
    shown = capsys.readouterr()
    return code, shown.out.splitlines(), shown.err.splitlines()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(_KEYS), _ANY, max_size=3), st.lists(_CLIENT, max_size=2))
@example({"began": 1e300}, [])
@example({"time": 1e11, "waiting": "x", "seconds": 1e11, "rounds": 2**62, "round": 1}, [{"since": 1e11, "last": 1.0}])
@example({"accuracy": float("inf")}, [])
@example(
    {"title": "T" * 3000, "pid": 2**62}, [{"peer": "ipv4:" + "p" * 3000 + "%1B[2J", "joined": 1, "error": "\x1b\n"}]
)
def test_any_content_is_shown_or_refused_in_one_line(
    tmp_path: Path, capsys: Any, values: dict[str, Any], clients: list[dict[str, Any]]
) -> None:
    code, out, err = show(tmp_path, {**values, "clients": clients}, capsys)
    assert (code, len(err)) in ((0, 0), (1, 1))
    assert bool(out) == (code == 0)
    for line in out + err:
        assert line.isprintable()
        assert len(line) <= 700


@pytest.mark.parametrize("count", [10, 5000])
def test_the_lines_are_bounded_whatever_the_number_of_clients(tmp_path: Path, capsys: Any, count: int) -> None:
    clients = [{"state": "absent", "joined": int(number % 2 == 0)} for number in range(count)]
    code, out, _ = show(tmp_path, {"clients": clients}, capsys)
    assert code == 0
    assert len(out) == 7 + min(count, 1999) + (count > 2000)
    if count > 2000:
        assert out[-1] == f"... and {count - 1999} more: {count - 1999} unknown"
