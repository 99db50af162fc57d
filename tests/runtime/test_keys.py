"""Each key of the configuration has one scope, and what is derived from the scopes agrees."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer import algorithms
from cutlayer.plotting.runs import Run
from cutlayer.runtime.job import choose_folder
from cutlayer.runtime.keys import ScopedKey, identity_of, keys_of, scope_of, setting_of, uses_of
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.agreement import fingerprint, shared
from cutlayer.runtime.records.loggers import LOGGERS
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from tests.conftest import SMALL, play, same, weights

MACHINE = {
    *(
        "device",
        "deterministic",
        "memory_format",
        "compile",
        "threads",
        "workers",
        "engine",
        "jobs_per_gpu",
        "state_memory_mb",
        "role",
        "server",
        "client_id",
        "transport.name",
    ),
    *("dataset.root", "dataset.storage", "dataset.workers", "model.base"),
}
RECORD = {"save_dir", "resume", "data_changed", "checkpoint_interval", "communication_by", "progress", "logger.csv"}
AFTER = ("personalize.", "probe.", "generate.")
# Where the next value of a key's type is none that it may have.
OTHERS: dict[str, Any] = {
    "algorithm.client_copy": "shared",
    "algorithm.client_gradient": "own",
    "algorithm.client_schedule": "step",
    "algorithm.distill": "none",
    "algorithm.local_path": "epoch",
    "algorithm.reduction": "sum",
    "algorithm.shared_gradient": "both",
    "algorithm.ssim_border": "zeros",
    "algorithm.temperature": 0.25,
    "algorithm.together": "never",
    "aggregate.buffers": "reset",
    "aggregate.weights": "uniform",
    "comm_threshold_mb": 3.0,
    "communication_by": "round",
    "cohort_order": "fixed",
    "cohort.together": 4,
    "data_changed": "accept",
    "dataset.augment": "flip",
    "dataset.distribution": "dirichlet",
    "dataset.drop_last": "always",
    "dataset.major_share": 0.25,
    "dataset.name": "synthetic",
    "dataset.normalize": "none",
    "dataset.options": {"n_train": 50},
    "dataset.resize": 16,
    "dataset.root": "elsewhere",
    "dataset.storage": "stream",
    "dataset.validation": 0.25,
    "dataset.client_samples": 20,
    "dataset.fraction": 0.5,
    "device": "cuda:3",
    "evaluations": ["class_acc"],
    "frac": 0.5,
    "generate.metrics": ["rouge_l"],
    "generate.no_repeat": 3,
    "generate.prompt": "To be",
    "generate.start": "best",
    "generate.tokens": 20,
    "logger.csv": None,
    "model.auxiliary.size": "half",
    "model.auxiliary_heads.blocks": ["relu1"],
    "model.bottleneck": "C4S2",
    "model.client_norm": "group",
    "model.cut": "relu2",
    "model.lora.targets": ["c_attn"],
    "model.lora.train": "B",
    "model.init": "weights.safetensors",
    "model.initialisation": "xavier",
    "model.name": "simple_conv",
    "model.options": {"hidden": [32]},
    "model.personal.variants": [{}],
    "model.server_norm": "group",
    "memory_format": "channels_last",
    "monitor.features": "projector",
    "optimizer.name": "adamw",
    "personalize.part": "head",
    "personalize.start": "best",
    "personalize.loss": "method",
    "precision": "fp64",
    "probe.labels": [0.5],
    "probe.test_samples": 100,
    "probe.train_samples": 100,
    "progress": "none",
    "resume": "never",
    "save_dir": "elsewhere",
    "scheduler": {"name": "ExponentialLR", "gamma": 0.5},
    "threads": 2,
    "workers": 2,
    "engine": "ray",
}
# They depend on each other.
APART = {"role", "server", "client_id", "transport.name", "dataset.name", "dataset.options", "model.name", "model.base"}
APART |= {"dataset.distribution_options"}
APART |= {"algorithm.name", "algorithm.rich_share"}


@cache
def composed(name: str, *overrides: str) -> dict[str, Any]:
    return load_config([*SMALL, f"algorithm={name}", *overrides]).to_mapping()


def other(name: str, value: Any) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if name.endswith((".optimizer", ".scheduler")):
        return {"lr": 0.5} if name.endswith("optimizer") else {"name": "ExponentialLR", "gamma": 0.5}
    if isinstance(value, bool | None):
        return not value if isinstance(value, bool) else 2
    return value + 1 if isinstance(value, int) else value / 2 + 0.01


def changed(mapping: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(mapping))
    *above, last = key.split(".")
    section = made
    for name in above:
        section = section.setdefault(name, {})
    section[last] = value
    return made


def each_changed(mapping: dict[str, Any]) -> Iterator[tuple[str, ScopedKey, RunConfig]]:
    """Every key by itself with another value that it may have."""
    for name, key in keys_of(RunConfig, mapping).items():
        if name not in APART:
            yield name, key, RunConfig.from_mapping(changed(mapping, name, other(name, key.value)))


@pytest.mark.parametrize("name", algorithms.names())
def test_every_key_has_one_scope_and_nothing_else_is_a_key(name: str) -> None:
    mapping = composed(name)
    found = {key: each.scope for key, each in keys_of(RunConfig, mapping).items()}
    assert {key for key, scope in found.items() if scope == "machine"} == MACHINE
    assert {key for key, scope in found.items() if scope == "record"} == RECORD
    assert {key for key, scope in found.items() if scope == "after"} == {key for key in found if key.startswith(AFTER)}
    assert all(scope_of(RunConfig, key) == scope for key, scope in found.items())
    values: dict[str, Any] = {}
    for key, each in keys_of(RunConfig, mapping).items():
        section = values
        *above, last = key.split(".")
        for level in above:
            section = section.setdefault(level, {})
        section[last] = each.value
    assert (
        RunConfig.from_mapping(values).to_mapping() == mapping
    )  # a part whose section is as by default has none there


def test_sections_by_other_choices_have_scopes_too() -> None:
    config = load_config(
        ["algorithm=fed_avg", "transport=grpc", "role=server", "logger=[csv,tensorboard,mlflow,wandb]"]
    )
    found = keys_of(RunConfig, config.to_mapping())
    assert {each.scope for key, each in found.items() if key.startswith("transport.")} == {"machine"}
    assert {each.scope for key, each in found.items() if key.startswith("logger.")} == {"record"}
    assert len({key.split(".")[1] for key in found if key.startswith("logger.")}) == len(LOGGERS)
    assert {key for key, use in uses_of(RunConfig).items() if use.identifies} == {
        *("device", "deterministic", "memory_format", "compile", "model.base"),
        "transport.name",
    }


@pytest.mark.parametrize("name", ["centralized", "fed_avg", "fsl_sage", "fsmkd", "mhmd", "moco_sfl"])
def test_what_is_derived_from_a_keys_scope_agrees(name: str, tmp_path: Path) -> None:
    """What a run is, where it is kept, what its parties agree on and what figures name follow one and the same keys."""
    mapping = composed(name, f"save_dir={tmp_path}")
    base, setting = identity_of(RunConfig, mapping), setting_of(RunConfig, mapping)
    agreed, drawn = fingerprint(shared(RunConfig.from_mapping(mapping))), Run(tmp_path, mapping, {}).setting
    tried = 0
    for key, each, config in each_changed(mapping):
        decides = each.read and each.scope == "result"
        assert (config.identity() != base) == (decides or each.identifies), key
        assert (setting_of(RunConfig, config.to_mapping()) != setting) == decides, key
        assert (fingerprint(shared(config)) != agreed) == decides, key
        reported = {"setting": sorted(config.setting())}
        for results in ({}, reported):  # of an earlier version, and of this one
            assert (Run(tmp_path, config.to_mapping(), results).setting != drawn) == (decides and key != "seed"), key
        named = key in choose_folder(config, [f"{key}=x"]).parent.name
        assert named == (decides or key == "seed") or key in ("lr", "dataset.distribution"), key
        tried += 1
    assert tried > 60


ALWAYS_READ = {"model.name", "dataset.distribution", "rounds", "seed", "batch_size", "precision"}


@pytest.mark.parametrize(
    ("setting", "reads", "ignores"),
    [
        ("algorithm=fed_avg", "frac num_clients", "model.cut model.client.optimizer dataset.alpha lr monitor.k"),
        ("algorithm=fed_avg model.client_norm=group", "model.cut", "model.client.optimizer model.auxiliary.size"),
        ("algorithm=fed_avg model.bottleneck=C4S2", "model.cut", "model.server.scheduler"),
        ("algorithm=sl", "model.cut model.client.optimizer model.client.freeze", "model.tail aggregate.weights"),
        ("algorithm=cse_fsl", "model.auxiliary.size model.auxiliary.optimizer", "model.body model.projector"),
        ("algorithm=fed_rep", "model.body model.head", "model.cut model.client model.auxiliary_heads.blocks"),
        (
            "algorithm=mhmd",
            "model.auxiliary_heads.blocks algorithm.gate algorithm.reduction",
            "model.auxiliary model.head",
        ),
        ("algorithm=mhmd algorithm.distill=none", "algorithm.temperature", "algorithm.gate algorithm.reduction"),
        ("algorithm=fsmkd", "model.cut model.tail model.personal.variants", "model.body model.projector.width"),
        ("algorithm=moco_sfl", "monitor.k model.projector.width", "algorithm.rich_batch_size algorithm.loss_interval"),
        ("algorithm=moco_sfl algorithm.rich_share=0.5 algorithm.rich_batch_size=9", "algorithm.rich_batch_size", ""),
        ("algorithm=moco_sfl algorithm.loss_threshold=0.1", "algorithm.stored_steps algorithm.loss_interval", ""),
        ("algorithm=centralized", "dataset.distribution", "num_clients frac cohort_order dataset.min_samples"),
        ("algorithm=fed_avg dataset.distribution=dirichlet", "dataset.alpha", "dataset.classes_per_client"),
        ("algorithm=fed_avg dataset.distribution=noniid_dirichlet", "dataset.alpha", "dataset.major_share"),
        ("algorithm=fed_avg dataset.distribution=quantity_skew", "dataset.alpha", "dataset.drop_unassigned"),
        ("algorithm=fed_avg dataset.distribution=shards", "dataset.classes_per_client", "dataset.alpha"),
        ("algorithm=fed_avg dataset.distribution=class_major", "dataset.major_share", "dataset.alpha"),
        ("algorithm=fed_avg dataset.distribution=natural", "dataset.drop_unassigned", "dataset.alpha"),
        ("algorithm=fed_avg ~optimizer.lr", "lr", ""),
    ],
)
def test_a_key_is_read_where_something_depends_on_it(setting: str, reads: str, ignores: str) -> None:
    found = keys_of(RunConfig, load_config([*SMALL, *setting.split()]).to_mapping())

    def below(section: str) -> set[bool]:
        return {each.read for key, each in found.items() if f"{key}.".startswith(f"{section}.")}

    assert [key for key in {*reads.split(), *ALWAYS_READ} if below(key) != {True}] == []
    assert [key for key in ignores.split() if below(key) != {False}] == []


BITS = ["algorithm=fsl_sage", "num_clients=2", "batch_size=64", "dataset.augment=flip", "dataset.local_test=true"]


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(play(Federation(load_config([*SMALL, *BITS]), tmp_path_factory.mktemp("run"))))


@pytest.mark.parametrize(
    "change",
    [
        *("dataset.workers=0", "dataset.storage=stream", "dataset.root=elsewhere", "state_memory_mb=0.01"),
        *("checkpoint_interval=1", "communication_by=round", "jobs_per_gpu=2", "personalize.part=full", "probe.k=3"),
        *("model.body.optimizer.lr=0.5", "dataset.alpha=5", "monitor.k=3", "dataset.min_samples=3", "lr=0.5"),
    ],
)
def test_the_result_depends_on_no_key_that_is_said_not_to_decide_it(
    change: str, bits: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """To the bit. Of the machine's keys only `threads` and `device` change that of sums, as the documents say."""
    plain, config = load_config([*SMALL, *BITS]), load_config([*SMALL, *BITS, "optimizer.lr=0.001", change])
    assert config != plain
    assert config.identity() == plain.identity()
    assert same(weights(play(Federation(config, tmp_path))), bits)


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage", "sl_u_shape"])
def test_adapters_tell_one_run_from_another(algorithm: str) -> None:
    """Whatever the method, though they are a section of the model's as its parts are; without any none is read."""
    given = [f"algorithm={algorithm}", "dataset=shakespeare", "model=huggingface/gpt2"]
    changes = ("r=3", "alpha=3", "dropout=0.1", "targets=[c_proj]", "train=B")
    adapted = [*given, "model.lora.r=2"]
    settings = [given, adapted, *([*adapted, f"model.lora.{each}"] for each in changes)]
    found = [load_config(each).identity() for each in settings]
    assert len({*found}) == len(changes) + 2
    assert load_config([*given, "model.lora.alpha=3"]).identity() == found[0]
    assert [key for key in load_config(given).setting() if "lora" in key] == ["model.lora.r"]
