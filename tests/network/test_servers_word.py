"""What a server may set at its clients: for every key of the configuration, whatever it says there."""

import contextlib
import copy
import dataclasses
import json
import math
import resource
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cutlayer import algorithms
from cutlayer.models.part_registry import config_class, refinable
from cutlayer.models.registry import entry
from cutlayer.models.registry import names as model_names
from cutlayer.runtime import trust
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.keys import scope_of
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.agreement import client_config, shared
from cutlayer.runtime.network.client.site import Site
from cutlayer.runtime.settings import RunConfig
from tests.audited import HOSTILE, MARK, watched
from tests.conftest import SMALL

SERVER = shared(load_config(["transport=grpc", "role=server", *SMALL, "algorithm=sl_single_server"]))
OWN = ["transport=grpc", "role=client", "server=127.0.0.1:1", "client_id=0", "transport.max_message_mb=1"]
MINE = load_config(OWN)
MB = 1e6


def keys(kind: type, prefix: str = "") -> list[str]:
    """Every key of a configuration's dataclasses; below an open mapping stands one for all."""
    found: list[str] = []
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    if hints.pop("parts", None) is not None:
        hints |= {name: config_class(name) for name in refinable()}
    for field, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            found += keys(typing.cast(type, hint), f"{prefix}{field}.")
        else:
            open_ = "dict[" in str(hint) or field in ("algorithm", "scheduler")
            found += [f"{prefix}{field}.x" if open_ else f"{prefix}{field}"]
    return found


SPELLED = {"algorithm_name": "algorithm.name", "optimizer.options.x": "optimizer.x", "model.personal.variants.x": ""}
KEYS = [SPELLED.get(key, key) or "model.personal.variants.0.x" for key in keys(RunConfig)]
VALUES = st.sampled_from(HOSTILE) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30).map(MARK.__add__)


def said(changes: dict[str, Any]) -> dict[str, Any]:
    """What the server says, with some keys changed."""
    theirs = copy.deepcopy(SERVER)
    for key, value in changes.items():
        *above, last = key.split(".")
        section = theirs
        for name in above:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    return json.loads(json.dumps(theirs))


def take(theirs: dict[str, Any], *overrides: str) -> RunConfig | None:
    """The configuration that a client works with; None if it refuses, in one line."""
    given = [*OWN, *overrides]
    try:
        return client_config(MINE if not overrides else load_config(given), theirs, given)
    except ConfigError as error:
        line = str(error)
    assert line.isprintable()
    assert len(line) < 5000
    return None


def test_what_decides_the_result_is_the_servers_to_say_and_nothing_else_is() -> None:
    """A key of the configuration that decides the result and has no rule would be refused of every server."""
    tree, folder = trust._tree({**trust.RULES, **trust.part_rules()}), trust._tree(trust.FOLDER_RULES)
    for key in KEYS:
        decides = scope_of(RunConfig, key) == "result"
        assert decides == (trust._rule(tree, key.split("."), 1) is not None), key
        assert not decides or trust._rule(folder, key.split("."), 1) is None, key
    assert {scope_of(RunConfig, key) for key in KEYS} == {"result", "machine", "record", "after"}
    assert {scope_of(RunConfig, key) for key in trust.FOLDER_RULES} == {"machine", "record", "after"}


def test_what_the_projects_own_settings_say_is_within_the_bounds() -> None:
    """Of every method and every model, with what they are by default."""
    for name in algorithms.names():
        own = dataclasses.asdict(algorithms.get(name).Config())
        trust.check({**SERVER, "algorithm": {"name": name, **own}}, lambda *_: False, "the server")
    for name in model_names():
        kind = entry(name).options
        assert kind is not None
        model = {**SERVER["model"], "name": name, "options": dataclasses.asdict(kind())}
        trust.check({**SERVER, "model": model}, lambda *_: False, "the server")


def test_a_hostile_value_is_refused_or_harmless_whatever_its_key() -> None:
    """Every key meets a third of the hostile values, and every value a third of the keys."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched():
        for at, key in enumerate(KEYS):
            for value in HOSTILE[at % 3 :: 3]:
                take(said({key: value}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KB"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), VALUES, min_size=1, max_size=4))
@example(changes={"model.name": "import/subprocess.getoutput", "model.options.cmd": "touch h0stile"})
@example(changes={"dataset.name": "synthetic", "dataset.options.n_train": 10**6, "dataset.options.height": 1024})
@example(changes={"model.options.hidden": [4096] * 64, "model.name": "mlp"})
@example(changes={"model.name": "vit", "model.options.depth": 128})
@example(changes={"algorithm.name": "fl_moco", "algorithm.queue": 65_536, "model.projector.width": 4096})
@example(changes={"num_clients": 100_000, "dataset.distribution": "noniid_dirichlet", "dataset.min_samples": 0})
@example(changes={"dataset.name": "mnist"})
def test_what_a_client_makes_of_a_servers_word(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Up to its data and parts: what it opens is its own, and it takes no more memory than it said."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched(tmp_path, Path("data")):
        config = take(said(changes))
        if config is not None:
            with contextlib.suppress(ConfigError):
                Site(config, tmp_path, download=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_300_000, "KB"


def test_what_the_command_line_names_may_be_more() -> None:
    for key, value in (("num_clients", 200_000), ("batch_size", 70_000), ("local_epochs", 20_000)):
        assert take(said({key: value})) is None
        assert getattr(take(said({key: value}), f"{key}={value}"), key) == value
    large = said({"dataset.name": "synthetic", "dataset.options": {"n_train": 10**6, "height": 1024, "width": 1024}})
    sizes = ("dataset.options.n_train=1000000", "dataset.options.height=1024", "dataset.options.width=1024")
    assert take(large) is None
    assert take(large, *sizes) is None, "the name of the data set is not said"
    assert take(large, "dataset=synthetic", *sizes) is not None


def test_a_model_larger_than_a_message_is_refused_before_there_is_memory_for_it(tmp_path: Path) -> None:
    config = take(said({"model.options.hidden": [4096] * 64}))
    assert config is not None
    with pytest.raises(ConfigError) as caught:
        Site(config, tmp_path)
    found = sum(4 * (a * b + b) for a, b in zip([64, *[4096] * 64], [*[4096] * 64, 10], strict=True))
    assert str(caught.value) == (
        f"model.name=mlp: expected one of at most 1 MB, and not {found / MB:,.0f} MB; "
        f"if you trust it, add: transport.max_message_mb={math.ceil(found / MB)}"
    )
