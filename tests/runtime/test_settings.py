"""The typed configuration: every yaml builds one, it round-trips, and its identity says what decides a result."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer import algorithms, datasets, models
from cutlayer.models import refinable
from cutlayer.runtime.ground.config import ConfigError, build, plain
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR, groups, options
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.records.loggers import LOGGERS
from cutlayer.runtime.settings import RunConfig, resolve_device
from tests.places import ROOT

BASE = load_config(["algorithm=fed_avg"]).to_mapping()


def changed(**values: Any) -> dict[str, Any]:
    """The default mapping with some values replaced; `a__b=1` is a.b=1."""
    mapping = json.loads(json.dumps(BASE))
    for key, value in values.items():
        node = mapping
        *above, last = key.split("__")
        for part in above:
            node = node[part]
        node[last] = value
    return mapping


def test_every_yaml_is_listed_as_a_choice() -> None:
    files = {path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob("*.yaml")}
    choices = {f"{group}/{option}.yaml" for group in groups() for option in options(group)}
    rest = {file for file in files - choices if not Path(file).name.startswith("_") and not file.startswith("hydra/")}
    assert rest == {"config.yaml"}


def test_every_registered_component_has_a_yaml() -> None:
    """A method may have further ones, with values of its own."""
    assert set(options("algorithm")) >= set(algorithms.names())
    chosen = {choice: load_config([f"algorithm={choice}"]).algorithm_name for choice in options("algorithm")}
    assert set(chosen.values()) == set(algorithms.names())
    assert all(choice == name or choice.startswith(f"{name}_") for choice, name in chosen.items())
    assert set(options("model")) == set(models.names())
    assert set(options("dataset")) == set(datasets.names())


def test_the_values_of_an_algorithms_yaml_are_its_defaults() -> None:
    for name in algorithms.names():
        kind = algorithms.get(name).Config
        assert load_config([f"algorithm={name}"]).algorithm == build(kind, {}), name


def other_defaults(config: Any, where: str = "") -> Iterator[str]:
    """Keys of nested configurations whose value is not the default of their dataclass."""
    for field in fields(config):
        value, found = getattr(config, field.name), f"{where}.{field.name}"
        if is_dataclass(value):
            yield from other_defaults(value, found)
        elif field.default_factory is not MISSING:
            yield from [found] if value != field.default_factory() else []
        elif field.default is not MISSING and value != field.default:
            yield found


@pytest.mark.parametrize("choice", ["dataset=digits", "transport=grpc", *(f"logger={name}" for name in LOGGERS)])
def test_a_key_has_one_default(choice: str) -> None:
    """What a dataclass has by itself is what its yaml says."""
    config = load_config(["algorithm=fed_avg", choice, *(["role=server"] if choice == "transport=grpc" else [])])
    sections = {name: getattr(config, name) for name in ("model", "dataset", "aggregate", "personalize", "monitor")}
    sections |= {"probe": config.probe, "generate": config.generate}
    sections |= {"transport": config.transport, "logger": config.logger[0]}
    assert [key for name, section in sections.items() for key in other_defaults(section, name)] == []


def test_the_papers_setting() -> None:
    config = load_config(["experiment=fsl_sage/cifar10_iid"])
    values = config.to_mapping()
    assert values["algorithm"] == {
        "name": "fsl_sage",
        "upload_interval": 5,
        "align_interval": 10,
        "buffer_size": 1000,
        "align_epochs": 100,
        "align_batch_size": 1000,
        "warm_start": False,
    }
    assert values["optimizer"] == {"name": "adam", "lr": 1e-3, "weight_decay": 1e-4, "keep": "run"}
    assert (values["model"]["name"], values["model"]["cut"], values["model"]["auxiliary"]["size"]) == (
        "resnet18",
        None,
        "default",
    )
    dataset = values["dataset"]
    assert (dataset["name"], dataset["distribution"], dataset["augment"], dataset["normalize"]) == (
        "cifar10",
        "iid",
        "crop_flip",
        "imagenet",
    )
    assert (config.batch_size, config.local_epochs, config.num_clients, config.rounds, config.seed, config.frac) == (
        256,
        1,
        10,
        200,
        200,
        1.0,
    )


def test_scaffold_brings_plain_gradient_steps_unless_told_otherwise() -> None:
    assert load_config(["algorithm=scaffold"]).optimizer.name == "sgd"
    assert load_config(["experiment=fsl_sage/cifar10_iid", "algorithm=fed_avg"]).optimizer.name == "adam"
    assert load_config(["algorithm=scaffold", "optimizer=adamw"]).optimizer.name == "adamw"


# ---------------------------------------------------------------------- round trip and identity

mappings = st.fixed_dictionaries(
    {
        "rounds": st.integers(1, 10**6),
        "frac": st.floats(0, 1, exclude_min=True),
        "lr": st.floats(1e-9, 10),
        "seed": st.integers(0, 2**62),
        "comm_threshold_mb": st.none() | st.floats(1e-3, 1e9),
        "resume": st.sampled_from(["auto", "never", "saves/x"]),
        "model__client__optimizer": st.sampled_from([{}, {"lr": 0.5}, {"name": "sgd", "momentum": 0.9}]),
        "optimizer": st.sampled_from([{"name": "adamw", "lr": 0.1, "betas": [0.5, 0.9]}, {"name": "SGD", "lr": 1}]),
        "scheduler": st.sampled_from([None, {"name": None}, {"name": "MultiStepLR", "milestones": [3, 5]}]),
        "aggregate__weights": st.sampled_from(["uniform", [float(client) for client in range(1, 11)]]),
        "logger": st.sampled_from([{}, {"csv": {}}, {"csv": None, "tensorboard": {"flush_seconds": 5}}]),
    }
)


@given(mappings)
def test_from_mapping_and_to_mapping_are_inverse(values: dict[str, Any]) -> None:
    config = RunConfig.from_mapping(changed(**values))
    mapping = json.loads(json.dumps(config.to_mapping()))
    again = RunConfig.from_mapping(mapping)
    assert again == config
    assert again.to_mapping() == mapping
    assert again.identity() == config.identity()


def reverse(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reverse(value[key]) for key in reversed(value)}
    return value


@given(mappings)
@settings(max_examples=20)
def test_identity_does_not_depend_on_the_order_of_keys(values: dict[str, Any]) -> None:
    mapping = changed(**values)
    assert RunConfig.from_mapping(reverse(mapping)).identity() == RunConfig.from_mapping(mapping).identity()


def test_identity_is_the_same_in_another_process() -> None:
    of = "from cutlayer.runtime.launching.hydra_support import load_config"
    code = f"{of}; print(load_config(['algorithm=fed_avg']).identity())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert result.stdout.strip() == RunConfig.from_mapping(BASE).identity()


# ---------------------------------------------------------------------- optimizers of the parts


def test_parts_inherit_and_refine_the_top_level_optimizer() -> None:
    config = load_config(
        [
            "algorithm=fed_avg",
            "optimizer=sgd",
            "lr=0.1",
            "optimizer.momentum=0.9",
            "model.client.optimizer.lr=0.01",
            "model.auxiliary.optimizer=adam",
            "model.server.optimizer.momentum=null",
        ]
    )
    options_of = {part: config.optimizer_for(part).options for part in ("model", *refinable())}
    assert options_of == {
        "model": {"lr": 0.1, "momentum": 0.9},
        "client": {"lr": 0.01, "momentum": 0.9},
        "server": {"lr": 0.1},
        "auxiliary": {"lr": 0.1, "weight_decay": 0},  # another optimizer: nothing but the learning rate is inherited
        "body": {"lr": 0.1, "momentum": 0.9},
        "head": {"lr": 0.1, "momentum": 0.9},
        "tail": {"lr": 0.1, "momentum": 0.9},
        "personal": {"lr": 0.1, "momentum": 0.9},
        "projector": {"lr": 0.1, "momentum": 0.9},
        "auxiliary_heads": {"lr": 0.1, "momentum": 0.9},
        "attacker": {"lr": 0.1, "momentum": 0.9},
    }
    assert {part for part in options_of if config.optimizer_for(part).name != "sgd"} == {"auxiliary"}


def test_parts_inherit_and_refine_the_top_level_scheduler() -> None:
    config = load_config(
        [
            "algorithm=fed_avg",
            "scheduler=cosine",
            "rounds=7",
            "model.client.scheduler.eta_min=0.5",
            "model.server.scheduler=StepLR",
            "model.server.scheduler.step_size=3",
        ]
    )
    found = {part: config.scheduler_for(part) for part in ("model", *refinable())}
    assert {part: (value.name, value.options) for part, value in found.items() if value} == {
        "model": ("cosineannealinglr", {"T_max": 7}),
        "client": ("cosineannealinglr", {"T_max": 7, "eta_min": 0.5}),
        "server": ("steplr", {"step_size": 3}),
        **{part: ("cosineannealinglr", {"T_max": 7}) for part in {*refinable()} - {"client", "server"}},
    }
    assert load_config(["algorithm=fed_avg"]).scheduler_for("client") is None


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rounds=0"], r"rounds=0: expected an integer >= 1"),
        (["rounds=x"], r"rounds=x: expected an integer$"),
        (["rounds=2.5"], r"rounds=2.5: expected an integer$"),
        (["rounds=null"], r"rounds=null: expected an integer"),
        (["frac=0"], r"frac=0.0: expected a number > 0 and <= 1"),
        (["frac=1.5"], r"frac=1.5: expected"),
        (["lr=-1"], r"lr=-1"),
        (["seed=-1"], r"seed=-1: expected an integer >= 0"),
        (["num_clients=0"], r"num_clients=0: expected an integer >= 1"),
        (["batch_size=0"], r"batch_size=0"),
        (["eval_interval=0"], r"eval_interval=0"),
        (["checkpoint_interval=0"], r"checkpoint_interval=0"),
        (["comm_threshold_mb=0"], r"comm_threshold_mb=0.0"),
        (["device=gpu"], r"device=gpu: expected auto, cpu, cuda or cuda:<index>"),
        (["precision=fp16"], r"precision=fp16: .*choices: fp32, tf32, bf16, fp64"),
        (["progress=loud"], r"progress=loud: .*choices: auto"),
        (["aggregate.weights=[1,2]"], r"aggregate\.weights=\[1\.0,2\.0\]: expected"),
        (["aggregate.weights=sample"], r"aggregate\.weights=sample: .*did you mean samples\?"),
        (["aggregate=mean"], r"aggregate=mean: expected a mapping"),
        (["model=resnt18"], r"model=resnt18: .*did you mean resnet18\?.*choices: .*mlp"),
        (["model=null"], r"model=null: expected one of the choices"),
        (["algorithm=fsl_sag"], r"algorithm=fsl_sag: .*did you mean fsl_sage\?"),
        (["experiment=fsl_sage/cifar"], r"experiment=fsl_sage/cifar: .*did you mean fsl_sage/cifar10_iid\?"),
        (["logger=[csv,tensorbord]"], r"logger=tensorbord: .*did you mean tensorboard\?"),
        (["optimizer.name=adm"], r"optimizer\.name=adm: .*did you mean adam\?"),
        (
            ["optimizer.momentm=0.9", "optimizer=sgd"],
            r"optimizer\.momentm: no such key; did you mean optimizer\.momentum",
        ),
        (["model.client.optimizer.lrr=0.9"], r"model\.client\.optimizer\.lrr: no such key; did you mean .*\.lr\?"),
        (["model.options.nothing=1"], r"model\.options\.nothing: no such key"),
        (["dataset.options.nothing=1"], r"dataset\.options\.nothing: no such key"),
        (["dataset.alpha=-1"], r"dataset\.alpha=-1.*: expected"),
        (["dataset.nam=x"], r"dataset\.nam: no such key; did you mean dataset\.name\?"),
        (["alpha=0.1"], r"alpha: no such key; did you mean dataset\.alpha\?"),
        (["datset=mnist"], r"datset: no such key; did you mean dataset\?"),
        (["num_client=3"], r"num_client: no such key; did you mean num_clients\?"),
        (["algorithm.mu=3", "algorithm=fed_avg"], r"algorithm\.mu: no such key"),
        (["scheduler.T_max=3"], r"scheduler\.T_max=3: expected a scheduler to go with it"),
        (["~foo"], r"foo: no such key"),
        (["~rounds"], r"rounds: missing; expected an integer"),
        (["+lr=1"], r"lr: exists already; write it without the \+"),
        (["rounds"], r"rounds: no value; expected key=value"),
        (["lr=[1"], r"lr=\[1: cannot be read"),
        (["lr=1,2"], r"lr=1,2: several values: add -m"),
        (["lr=${nothing}"], r"nothing: missing"),
        (["hydra.launcher.foo=1"], r"hydra\.launcher\.foo: no such key"),
    ],
)
def test_a_mistake_is_reported_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}") as caught:
        load_config(["algorithm=fed_avg", *overrides] if not overrides[0].startswith("algorithm") else overrides)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["rounds", "model", "algorithm", "optimizer", "logger", "seed"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: missing"):
        RunConfig.from_mapping({name: value for name, value in BASE.items() if name != key})


def test_the_name_of_the_algorithm_is_no_key_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"^algorithm_name: no such key"):
        RunConfig.from_mapping({**BASE, "algorithm_name": "fed_avg"})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"^device={device}: .*choices: auto, cpu\\)"):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    config = replace(RunConfig.from_mapping(BASE), device="cuda:2")
    with pytest.raises(ConfigError, match=r"^device=cuda:2: .*choices: auto, cpu, cuda, cuda:0, cuda:1\)"):
        config.torch_device()


def test_plain_values_only() -> None:
    def check(value: Any) -> None:
        assert value is None or type(value) in (dict, list, str, int, float, bool), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    check(RunConfig.from_mapping(BASE).to_mapping())
    assert plain(RunConfig.from_mapping(BASE))["save_dir"] == "saves"
