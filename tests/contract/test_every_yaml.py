"""Every file in hydra_config/ runs one round: composed, typed, instantiated, trained and tested."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from cutlayer import algorithms
from cutlayer.datasets import Dataset, DatasetConfig
from cutlayer.datasets import load as load_dataset
from cutlayer.runtime.experiment import run
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.records.loggers import LOGGERS
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.settings import RunConfig

GROUPS = ("algorithm", "model", "dataset", "optimizer", "scheduler", "transport", "experiment")
CHOICES = [
    f"{group}={file.relative_to(CONFIG_DIR / group).with_suffix('').as_posix()}"
    for group in GROUPS
    for file in sorted((CONFIG_DIR / group).rglob("*.yaml"))
    if not file.name.startswith("_")
]
# Deep networks are narrowed: the yaml is what is tested here, the arithmetic is in tests/models.
NARROW = {"resnet": "width", "mobilenet": "width", "vgg": "width"}
SMALL = (
    "rounds=1",
    "num_clients=2",
    "device=cpu",
    "batch_size=8",
    "local_epochs=1",
    "frac=1.0",
    "model.auxiliary=linear",
    "dataset.client_samples=null",
)


def tiny(
    config: DatasetConfig, *, seed: int, device: torch.device, dtype: torch.dtype, download: bool = True
) -> Dataset:
    """Noise in place of a dataset's files, in the shape that most of them have, with natural groups; text as it is."""
    if config.name == "shakespeare" or (config.root / "valid.txt").is_file():
        fraction = 0.2 if config.name == "shakespeare" else 1.0
        return load_dataset(replace(config, fraction=fraction), seed=seed, device=device, dtype=dtype)
    options = {"n_train": 24, "n_test": 8, "channels": 3, "height": 32, "width": 32, "groups": 3}
    if config.name == "digits":
        options |= {"channels": 1, "height": 8, "width": 8}
    small = replace(config, name="synthetic", options=options, normalize="dataset")
    return load_dataset(small, seed=seed, device=device, dtype=dtype)


def test_every_group_is_covered() -> None:
    groups = {file.relative_to(CONFIG_DIR).parts[0] for file in CONFIG_DIR.rglob("*.yaml") if file.parent != CONFIG_DIR}
    assert groups <= {*GROUPS, "logger", "hydra"}
    assert len(CHOICES) > 45


# Experiments that set keys of their method.
OWN = tuple(
    f"experiment={name}" for name in ("mocosfl", "fsmkd", "small/contrastive", "small/moco_sfl", "small/fl_moco")
)


def on_e2e(choice: str, folder: Path) -> list[str]:
    """What an experiment on E2E asks for: its files, of a few sentences, a tokenizer, and weights of their shape."""
    transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    names = {name for each in ("base", "small") for name in _restaurants(each)}
    for file, numbers in (("train", range(5)), ("valid", range(5)), ("test", range(5, 7))):
        lines = [f"name : {name} | near : {n}||{name} is near {n} ." for name in sorted(names) for n in numbers]
        (folder / f"{file}.txt").write_text("\n".join(lines))
    shape = {"n_layer": 5, "n_embd": 16, "n_head": 2, "n_positions": 512}
    overrides = [f"dataset.root={folder}", "dataset.options.tokenizer=bytes", "model.auxiliary=half"]
    if choice == "experiment=lm/e2e_base":
        overrides.append("algorithm=centralized")
        return [*overrides, *(f"model.options.{key}={value}" for key, value in shape.items())]
    config = transformers.AutoConfig.for_model("gpt2", **shape, vocab_size=300)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    if choice == "experiment=lm/e2e_gpt2_medium":
        overrides.append("scheduler.warmup=2")
    return [*overrides, f"model.base={folder / 'base'}"]


def _restaurants(name: str) -> list[str]:
    content = yaml.safe_load((CONFIG_DIR / "experiment" / "lm" / f"e2e_{name}.yaml").read_text())
    return content["dataset"]["options"]["restaurants"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("choice", CHOICES)
def test_one_round(choice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cutlayer.runtime.rounds.setup.load", tiny)
    overrides = [choice, *SMALL]
    if choice == "algorithm=fsl_sage" or choice.startswith("experiment=fsl_sage"):
        overrides.append("algorithm.align_epochs=1")
    elif choice == "transport=grpc":
        overrides.append("role=server")  # over a network it is tried in tests/network
    elif not choice.startswith(("algorithm", *OWN)):
        overrides.append("algorithm=cse_fsl")
    if choice in ("model=gpt", "dataset=shakespeare"):
        overrides = [*overrides, *({"model=gpt", "dataset=shakespeare"} - {choice})]
        overrides.append("model.options={hidden:8,heads:2,depth:3}")
    if choice.startswith("experiment=lm/e2e"):
        overrides += on_e2e(choice, tmp_path)
    config = load_config(overrides)
    group, _, name = choice.partition("=")
    if group in ("algorithm", "model", "dataset"):
        found = config.to_mapping()[group]["name"]
        assert name == found or name.startswith(f"{found}_"), "a method, or one with values of its own"
    assert RunConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config
    options = {option: 2 for prefix, option in NARROW.items() if config.model.name.startswith(prefix)}
    if config.model.options.get("classifier"):
        options["classifier"] = [8]
    config = replace(config, model=replace(config.model, options={**config.model.options, **options}))
    if getattr(config.algorithm, "local_steps", 2) > 2:  # a round of MocoSFL's experiments is as many steps
        config = replace(config, algorithm=replace(config.algorithm, local_steps=2))
    if config.dataset.distribution.endswith("shards"):  # the two clients hold the ten classes of the noise
        config = replace(config, dataset=replace(config.dataset, classes_per_client=5))
    record, traffic = Federation(config).step()
    assert record.clients == (1 if algorithms.get(config.algorithm_name).pooled else 2)
    assert record.train_loss is not None
    assert math.isfinite(record.train_loss)
    assert record.test_acc is not None
    assert 0 <= record.test_acc <= 1
    assert traffic


@pytest.mark.filterwarnings("default")  # trackers warn about their own dependencies
@pytest.mark.parametrize("logger", [file.stem for file in sorted((CONFIG_DIR / "logger").glob("*.yaml"))])
def test_every_logger_follows_a_run(logger: str, tmp_path: Path) -> None:
    for package in LOGGERS[logger].packages:
        pytest.importorskip(package, reason=f"{logger} is an optional extra")
    config = load_config(
        [
            "dataset=digits",
            "model=mlp",
            "algorithm=fed_avg",
            "rounds=2",
            "num_clients=2",
            f"logger={logger}",
            "device=cpu",
        ]
    )
    with RunFolder.claim(tmp_path / "run") as folder:
        summary = run(config, folder)
    assert summary.rounds == 2
    assert (tmp_path / "run" / "accuracy_communication.png").stat().st_size > 5000
    files = {path.name for path in (tmp_path / "run").iterdir()}
    expected = (
        "config.yaml results.json metrics.csv communication.csv env.json partition.csv partition.png model.safetensors"
    )
    assert set(expected.split()) <= files
