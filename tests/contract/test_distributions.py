"""What holds for every registered distribution, whichever they are."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer import distributions
from cutlayer.datasets import DatasetConfig, Partition, partition
from cutlayer.distributions import DISTRIBUTIONS, NoOptions, Request
from cutlayer.plotting.runs import Run
from cutlayer.runtime.ground.config import ConfigError, build
from cutlayer.runtime.keys import identity_of
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.settings import RunConfig
from tests.places import checkout

DIVIDING = [name for name, each in DISTRIBUTIONS.items() if each.divide is not None]
every_distribution = pytest.mark.parametrize("name", DIVIDING)
# Ten classes of 100 samples, in 40 groups.
LABELS, GROUPS = np.arange(1000) % 10, np.arange(1000) // 25
KEYS = ("alpha", "classes_per_client", "major_share", "drop_unassigned")


def config(name: str, **values: Any) -> DatasetConfig:
    return DatasetConfig("synthetic", distribution=name, **values)


def divided(asked: DatasetConfig, seed: int = 0, clients: int = 10) -> Partition:
    return partition(LABELS, clients, asked, seed=seed, groups=GROUPS)


def same(one: Partition, other: Partition) -> bool:
    return np.array_equal(one.order, other.order) and np.array_equal(one.offsets, other.offsets)


def changed(asked: DatasetConfig, key: str) -> list[DatasetConfig]:
    """The configuration with other values of one key, as many as the distribution takes."""
    section, _, inner = key.rpartition(".")
    value = asked.distribution_options[inner] if section else getattr(asked, key)
    found: list[DatasetConfig] = []
    for other in (not value,) if isinstance(value, bool) else (value * 2, value + 1, value / 4, value // 2):
        values = {section: {**asked.distribution_options, inner: other}} if section else {key: other}
        try:
            found.append(build(DatasetConfig, {**vars(asked), **values}))
        except ConfigError:
            continue
    return found


@every_distribution
def test_every_client_gets_samples_and_the_seed_decides(name: str) -> None:
    first, second = divided(config(name)), divided(config(name), seed=1)
    assert sorted(first.order.tolist()) == list(range(len(LABELS)))
    assert first.sizes.min() >= 1
    assert same(first, divided(config(name)))
    assert not same(first, second)


@every_distribution
@settings(max_examples=30, deadline=None)
@given(data=st.data(), clients=st.integers(1, 30), seed=st.integers(0, 2**63))
def test_it_gives_every_sample_once_or_says_why_not(name: str, data: st.DataObject, clients: int, seed: int) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=200)))
    groups = np.array(data.draw(st.lists(st.integers(0, 40), min_size=len(labels), max_size=len(labels))))
    asked = config(name, min_samples=data.draw(st.integers(0, 3)))
    try:
        parts = partition(labels, clients, asked, seed=seed, groups=groups)
    except ConfigError:
        return
    assert len(parts) == clients
    assert sorted(parts.order.tolist()) == list(range(len(labels)))
    assert parts.sizes.min() >= asked.min_samples


@every_distribution
def test_it_reads_the_keys_that_it_says_and_no_others(name: str) -> None:
    asked, known = config(name, classes_per_client=3), DISTRIBUTIONS[name]
    before = divided(asked)
    for key in known.shaping:
        others = changed(asked, key)
        assert others, f"no other value of {key} is taken"
        assert any(not same(before, divided(other)) for other in others), f"{key} is without effect"
    for key in set(KEYS) - set(known.keys):
        assert all(same(before, divided(other)) for other in changed(asked, key)), f"{key} has an effect"


def test_what_a_distribution_gives_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(owner: np.ndarray) -> None:
        monkeypatch.setitem(DISTRIBUTIONS, "made", distributions.Distribution("made", lambda _: owner, "made"))

    made(LABELS)
    assert divided(config("made")).sizes.tolist() == [100] * 10
    for wrong in (LABELS[1:], LABELS.astype(np.int32), LABELS + 1, LABELS - 2, LABELS.astype(float)):
        made(wrong)
        with pytest.raises(ValueError, match="distribution made has to give"):
            divided(config("made"))


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="distribution 'iid' is registered twice"):
        distributions.register("iid")(lambda request: request.labels)


@every_distribution
def test_figures_tell_it_from_the_others_with_the_values_that_shape_it(name: str) -> None:
    def label(asked: str, values: DatasetConfig) -> str:
        shown = {key: getattr(values, key) for key in KEYS} | {"distribution_options": values.distribution_options}
        run = Run(Path(), {"dataset": {"distribution": asked, **shown}}, {})
        assert all(key.rpartition(".")[2] in run.distribution for key in DISTRIBUTIONS[asked].shaping)
        return run.distribution_label

    labels = [label(other, config(other)) for other in DIVIDING]
    assert labels.count(label(name, config(name))) == 1
    for key in DISTRIBUTIONS[name].shaping:
        assert len({label(name, other) for other in [config(name), *changed(config(name), key)]}) > 1


def test_the_document_has_each_with_the_keys_that_it_reads() -> None:
    rows = dict(
        re.findall(
            r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$",
            (checkout() / "docs" / "datasets.md").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    for name, known in DISTRIBUTIONS.items():
        assert name in rows, f"docs/datasets.md, the table of distributions: a row for {name}"
        assert sorted(re.findall(r"`([\w.]+)`", rows[name])) == sorted(known.keys), f"docs/datasets.md: keys of {name}"


def test_own_options_are_part_of_what_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Options:
        share: float = 0.5

    iid = DISTRIBUTIONS["iid"]
    monkeypatch.setitem(DISTRIBUTIONS, "made", replace(iid, name="made", options=Options))
    given = [load_config([f"dataset.distribution={name}"]) for name in ("iid", "made")]
    given += [load_config(["dataset.distribution=made", f"dataset.distribution_options.share={x}"]) for x in (0.5, 0.7)]
    assert [each.dataset.distribution_options for each in given] == [{}, {"share": 0.5}, {"share": 0.5}, {"share": 0.7}]
    assert len({each.identity() for each in given}) == 3
    with pytest.raises(ConfigError, match=r"^dataset\.distribution_options\.shade: no such key; did you mean .*share"):
        load_config(["dataset.distribution=made", "dataset.distribution_options.shade=1"])
    assert iid.options is NoOptions
    request = Request(LABELS, 10, given[3].dataset, np.random.default_rng(0), None)
    assert request.options == Options(0.7)


def test_a_run_of_before_there_were_options_has_the_identity_that_it_has_now() -> None:
    """By it a run that was interrupted is found again."""
    config = load_config(["algorithm=fed_avg", "dataset.distribution=shards"])
    before = config.to_mapping()
    del before["dataset"]["distribution_options"], before["evaluations"]
    assert identity_of(RunConfig, before) == config.identity()
