"""Strict construction of dataclasses, and the one line that a mistake gets."""

import math
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build, nearest, plain, show
from cutlayer.runtime.ground.text import printable
from tests.places import ROOT


@dataclass(frozen=True)
class Inner:
    alpha: float = 1.0
    kind: Literal["iid", "shards"] = "iid"

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ConfigError("alpha", self.alpha, "a number > 0")
        if self.alpha > 100:
            raise ValueError("alpha must be at most 100")
        if self.alpha == 99:
            raise ValueError("these do not go together")


@dataclass(frozen=True)
class Outer:
    rounds: int
    shuffle: bool = True
    name: str | None = None
    limit: float | None = None
    weights: Literal["samples", "uniform"] | tuple[float, ...] = "samples"
    pair: tuple[int, str] = (0, "")
    root: Path = Path("data")
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def test_builds_nested_dataclasses_and_converts_only_integers_to_numbers() -> None:
    built = build(Outer, {"rounds": 3, "limit": 2, "inner": {"alpha": 1}, "many": [{}, {"kind": "shards"}]})
    assert built == Outer(3, limit=2.0, inner=Inner(1.0), many=(Inner(), Inner(kind="shards")))
    assert type(built.limit) is float
    assert type(built.inner.alpha) is float


def test_a_built_instance_does_not_share_the_callers_containers() -> None:
    values: dict[str, Any] = {"rounds": 1, "options": {"milestones": [1, 2]}}
    built = build(Outer, values)
    values["options"]["milestones"].append(3)
    assert built.options == {"milestones": [1, 2]}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "rounds: missing; expected an integer"),
        ({"rounds": True}, "rounds=true: expected an integer"),
        ({"rounds": 3.0}, "rounds=3.0: expected an integer"),
        ({"rounds": "3"}, "rounds=3: expected an integer"),
        ({"rounds": None}, "rounds=null: expected an integer"),
        ({"rounds": 1, "shuffle": 1}, "shuffle=1: expected true or false"),
        ({"rounds": 1, "limit": "x"}, "limit=x: expected a number or null"),
        ({"rounds": 1, "limit": math.nan}, "limit=nan: expected a number or null"),
        ({"rounds": 1, "name": 3}, "name=3: expected text or null"),
        ({"rounds": 1, "root": ""}, "root='': expected a path"),
        ({"rounds": 1, "weights": [1, "x"]}, "weights.1=x: expected a number"),
        ({"rounds": 1, "pair": [1]}, "pair=[1]: expected a list of 2 values"),
        ({"rounds": 1, "inner": 3}, "inner=3: expected a mapping of keys to values"),
        ({"rounds": 1, "options": [1]}, "options=[1]: expected a mapping of keys to values"),
        ({"rounds": 1, "inner": {"alpha": -1}}, "inner.alpha=-1.0: expected a number > 0"),
        ({"rounds": 1, "inner": {"alpha": 101}}, "inner.alpha: must be at most 100"),
        ({"rounds": 1, "inner": {"alpha": 99}}, "inner: these do not go together"),
        ({"rounds": 1, "many": [{}, {"alpha": 0}]}, "many.1.alpha=0.0: expected a number > 0"),
        (
            {"rounds": 1, "inner": {"alhpa": 1}},
            "inner.alhpa: no such key; did you mean inner.alpha? (choices: alpha, kind)",
        ),
        (
            {"rounds": 1, "inner": {"kind": "shard"}},
            "inner.kind=shard: expected one of the choices; did you mean shards? (choices: iid, shards)",
        ),
        (
            {"rounds": 1, "weights": "sample"},
            "weights=sample: expected one of samples, uniform or a list of: a number; "
            "did you mean samples? (choices: samples, uniform)",
        ),
    ],
)
def test_says_what_is_wrong_with_the_full_key(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert str(caught.value) == line


def test_prefixes_where_the_values_stand() -> None:
    with pytest.raises(ConfigError, match=r"^model\.inner\.alpha=0\.0: "):
        build(Outer, {"rounds": 1, "inner": {"alpha": 0}}, where="model")
    with pytest.raises(ConfigError, match=r"^model\.round: no such key; did you mean model\.rounds\?"):
        build(Outer, {"round": 1}, where="model")


def test_the_error_is_a_value_error_in_one_line_and_survives_pickling() -> None:
    error = ConfigError("dataset.name", "a\nb" * 200, "a dataset\nof ours", ["digits", "mnist"])
    assert isinstance(error, ValueError)
    assert "\n" not in str(error)
    assert len(str(error)) < 250
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error)
    assert copied.choices == ("digits", "mnist")
    unset = pickle.loads(pickle.dumps(ConfigError("x", NO_VALUE, "missing")))
    assert unset.value is NO_VALUE


def test_nearest_ignores_case_and_gives_nothing_when_nothing_is_near() -> None:
    assert nearest("ADAMW", ["sgd", "AdamW"]) == "AdamW"
    assert nearest("resnt18", ["resnet18", "resnet50", "mlp"]) == "resnet18"
    assert nearest("zebra", ["mlp"]) is None
    assert nearest("x", []) is None


@given(
    rounds=st.integers(),
    shuffle=st.booleans(),
    limit=st.none() | st.floats(allow_nan=False),
    weights=st.sampled_from(["samples", "uniform"]) | st.lists(st.floats(allow_nan=False)).map(tuple),
    alphas=st.lists(st.floats(min_value=0.1, max_value=9)),
    options=st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())),
)
def test_plain_and_build_are_inverse(
    rounds: int, shuffle: bool, limit: float | None, weights: Any, alphas: list[float], options: dict[str, Any]
) -> None:
    config = Outer(
        rounds, shuffle, limit=limit, weights=weights, many=tuple(Inner(alpha) for alpha in alphas), options=options
    )
    assert build(Outer, plain(config)) == config


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=30))
def test_any_value_is_shown_in_one_short_line(value: object) -> None:
    text = show(value)
    assert text
    assert text.splitlines() == [text]
    assert len(text) <= 120


def test_needs_no_torch() -> None:
    code = "import sys; from cutlayer.runtime.ground import config; from cutlayer.runtime import run_folder; "
    code += "from cutlayer.runtime.launching import launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@given(st.text(st.characters(exclude_categories=())), st.binary())
def test_a_message_can_be_written_anywhere_whatever_is_in_it(text: str, name: bytes) -> None:
    for odd in (text, name.decode("utf-8", "surrogateescape")):
        for line in (printable(odd), str(ConfigError("dataset.root", odd, f"a file, not {odd}", [odd, odd]))):
            line.encode("utf-8")
            assert not any(ord(each) < 32 or 127 <= ord(each) < 160 or each in "\u2028\u2029" for each in line)
            assert len(line.splitlines()) <= 1


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"
    assert printable(b"a\xff\x1b\n".decode("utf-8", "surrogateescape")) == r"a\xff\x1b\n"
