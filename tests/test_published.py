"""Values that a paper or its authors' code gives, in one table with their sources, against what is built here.

A row is: what is composed, a key of the configuration, the published value. What a paper does not give is not here.
"""

import dataclasses
import io
import re
import struct
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cutlayer import algorithms
from cutlayer.attacks.model_inversion import InversionConfig
from cutlayer.datasets import DatasetInfo, augment, boxes
from cutlayer.datasets.normalize import IMAGENET_MEAN, IMAGENET_STD
from cutlayer.datasets.registry import RawSplit, read
from cutlayer.models import ModelConfig, build_model
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.parties.schedules import learning_options
from cutlayer.runtime.settings import RunConfig
from tests.places import SHARED, checkout

# ---------------------------------------------------------------------- the table

SAGE = "Nair et al., ICML 2025: settings of its experiments on CIFAR; its authors' code where the paper leaves it open"
CSE = "Mu & Shen 2023"
BABU = "Oh et al., ICLR 2022 (FedBABU): settings of its experiments"
MHMD = "multi-head mutual distillation: its table on CIFAR-100, and its authors' code"
MOCO = "Li et al., ICLR 2023 (MocoSFL): settings of its experiments, and its authors' code"
FSMKD = "Luo & Zhang: settings of its experiments, and the public code of the method (kimsm0566/FSMKD)"
SPLITFED = "Thapa et al., AAAI 2022: its authors' scripts"
VIEWS = "Chen et al. 2020 (MoCo v2), as MocoSFL's code has it"
RESSFL = "target-aware ResSFL in Li et al., ICLR 2023"

SAGE_ALGORITHM = {
    "upload_interval": 5,
    "align_interval": 10,
    "buffer_size": 1000,
    "align_epochs": 100,
    "align_batch_size": 1000,
    "warm_start": False,
}
MHMD_TERMS = {
    "auxiliary_weight": 10.0,
    "distillation_weight": 1.0,
    "temperature": "per_sample",
    "distill": "both",
    "gate": True,
    "reduction": "mean",
    "teacher_gradient": True,
}
FSMKD_TERMS = {"temperature": 2.0, "distillation_weight": 1.0, "shared_gradient": "global"}
MOCO_TERMS = {"temperature": 0.1, "momentum": 0.99, "client_momentum": 0.99, "queue": 6000, "feature_sharing": True}

# Defaults: (algorithm, its own keys, source).
DEFAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("fsl_sage", SAGE_ALGORITHM, SAGE),
    ("cse_fsl", {"upload_interval": 5}, CSE),
    ("mhmd", MHMD_TERMS, MHMD),
    ("fsmkd", FSMKD_TERMS, FSMKD),
    ("moco_sfl", {**MOCO_TERMS, "symmetric": True}, MOCO),
    ("fl_moco", {"temperature": 0.1, "momentum": 0.99, "queue": 6000, "symmetric": True}, MOCO),
    ("ressfl", {"alpha": 2.0, "target_ssim": 0.6, "attacker_width": 64}, RESSFL),
]

SAGE_PAPER = {
    "model.name": "resnet18",
    "model.cut": None,  # layer2 is ResNet-18's own
    "num_clients": 10,
    "frac": 1.0,
    "cohort_order": "fixed",
    "rounds": 200,
    "comm_threshold_mb": 200 * 2**30 / 1e6,
    "batch_size": 256,
    "local_epochs": 1,
    "lr": 0.001,
    "optimizer.name": "adam",
    "optimizer.lr": 0.001,
    "optimizer.weight_decay": 0.0001,
    "optimizer.keep": "run",
    "scheduler": None,
    "model.auxiliary.size": "default",
    "dataset.augment": "crop_flip",
    "dataset.normalize": "imagenet",
    "seed": 200,
    "algorithm.name": "fsl_sage",
    **{f"algorithm.{key}": value for key, value in SAGE_ALGORITHM.items()},
}
BABU_PAPER = {
    "model.name": "mobilenet_cifar",
    "dataset.name": "cifar100",
    "dataset.distribution": "drawn_shards",
    "dataset.local_test": "only",
    "num_clients": 100,
    "batch_size": 50,
    "lr": 0.1,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0,
    "aggregate.weights": "uniform",
    "aggregate.buffers": "reset",
    "eval_interval": 1,
    "personalize.part": "full",
    "personalize.lr": 0.001,
    "personalize.start": "best",
    "personalize.loss": "cross_entropy",
}
# What MHMD's code has otherwise.
MHMD_PAPER = BABU_PAPER | {
    "model.options": {"head_bias": False},
    "aggregate.buffers": "average",
    "eval_interval": 8,
    "personalize.loss": "method",
}
MOCO_PAPER = {
    "model.name": "resnet18",
    "model.options": {"stem": "small"},
    "model.projector.hidden": 1024,
    "model.projector.width": 1024,
    "dataset.name": "cifar10",
    "dataset.distribution": "shards",
    "dataset.classes_per_client": 2,
    "dataset.augment": "moco",
    "dataset.moco_area": 0.08,
    "dataset.moco_blur": 0.5,
    "model.initialisation": "xavier",
    "model.client_norm": "group",
    "model.server_norm": "group",
    "model.group_channels": 4,
    "aggregate.weights": "uniform",
    "lr": 0.06,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.06,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0005,
    "scheduler.name": "cosineannealinglr",
    "monitor.k": 200,
    "monitor.temperature": 0.1,
    "monitor.train_samples": None,
    "monitor.features": "projector",
    "probe.hidden": 512,
    "probe.after": True,
    "probe.labels": [1.0, 0.1, 0.01],
}
CUT_MOCO = {
    "batch_size": 1,
    "rounds": 2000,
    "algorithm.local_steps": 50,
    "algorithm.client_gradient": "cohort",
    "algorithm.client_copy": "own",
    "algorithm.client_schedule": "step",
    "model.cut": "relu",  # cut layer 1
    "algorithm.name": "moco_sfl",
    **{f"algorithm.{key}": value for key, value in MOCO_TERMS.items()},
    "algorithm.symmetric": True,
}
FSMKD_VGG = {
    "model.name": "vgg",
    "model.cut": None,  # after the first convolution, and before the dense layers
    "model.options": {"stem": 1, "body": ["M", 2, 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"], "batch_norm": False,
                      "classifier": [4096, 4096]},
    "model.personal.variants": [{"body": ["M", 2, "M", 4, "M", 8, "M"]},
                                {"body": ["M", 2, "M", 4, 4, "M", 8, "M", 8, "M"]}],
}  # fmt: skip
FSMKD_PAPER = {
    "num_clients": 5,
    "frac": 1.0,
    "rounds": 200,
    "local_epochs": 1,
    "batch_size": 128,
    "lr": 0.001,
    "optimizer.name": "adam",
    "optimizer.lr": 0.001,
    "model.server.optimizer": {"keep": "round"},
    "aggregate.weights": "uniform",
    "dataset.distribution": "class_major",
    "dataset.major_share": 0.8,
    "dataset.client_samples": 1000,
    "dataset.drop_last": "always",
    "dataset.augment": "none",
    "algorithm.name": "fsmkd",
    **{f"algorithm.{key}": value for key, value in FSMKD_TERMS.items()},
    "algorithm.teacher_gradient": True,
    "algorithm.local_path": "epoch",
    "algorithm.aggregate_interval": 50,
}
SPLITFED_SCRIPTS = {
    "model.name": "resnet18",
    "model.cut": "layer1.0",
    "model.options": {},
    "model.server.optimizer": {"betas": [0.0, 0.0]},
    "num_clients": 5,
    "frac": 1.0,
    "rounds": 200,
    "local_epochs": 1,
    "batch_size": 256,
    "lr": 0.0001,
    "optimizer.name": "adam",
    "optimizer.lr": 0.0001,
    "aggregate.weights": "uniform",
    "dataset.name": "ham10000",
    "dataset.distribution": "iid",
    "dataset.normalize": "imagenet",
    "dataset.options": {},  # 64 pixels a side and a fifth to test on are the dataset's own
    "algorithm.name": "sl_single_server",
}
EPOCHS = [0, 1, 2, 3, 4, 5, 10, 15, 20]

# Experiments: (name, keys, source).
EXPERIMENTS: list[tuple[str, dict[str, Any], str]] = [
    *(
        (f"fsl_sage/{data}_{kind}", {**SAGE_PAPER, "dataset.name": data, **more}, SAGE)
        for data in ("cifar10", "cifar100")
        for kind, more in (("iid", {"dataset.distribution": "iid"}),
                           ("noniid", {"dataset.distribution": "noniid_dirichlet", "dataset.alpha": 10.0}))
    ),
    *((f"fsl_sage/{name}", {**SAGE_PAPER, "dataset.name": "cifar10"}, SAGE)
      for name in ("algorithms", "align_interval", "auxiliary_size")),
    # A cell of each value; that all are as their names say is another test.
    *((f"{group}/s{shards}_f{frac}_tau{tau}",
       {**paper, "algorithm.name": algorithm, "dataset.classes_per_client": shards, "frac": share,
        "local_epochs": tau, "rounds": 320 // tau, "personalize.epochs": [5]}, source)
      for group, algorithm, paper, source in (("fedbabu", "fed_babu", BABU_PAPER, BABU),
                                              ("mhmd", "mhmd", MHMD_PAPER, MHMD))
      for shards, frac, share, tau in ((100, "1", 1.0, 1), (50, "01", 0.1, 4), (10, "01", 0.1, 10))),
    ("mhmd/table", {**MHMD_PAPER, "algorithm.name": "mhmd"}, MHMD),
    *((f"{group}/fine_tuning", {**paper, "dataset.classes_per_client": 10, "frac": 0.1, "local_epochs": 10,
                                "rounds": 32, "personalize.epochs": EPOCHS}, source)
      for group, paper, source in (("fedbabu", BABU_PAPER, BABU), ("mhmd", MHMD_PAPER, MHMD))),
    ("fedbabu/cifar10", {**BABU_PAPER, "model.name": "cnn4", "dataset.name": "cifar10",
                         "dataset.normalize": "imagenet", "dataset.augment": "crop_flip"}, BABU),
    *(
        (f"mocosfl/clients_{clients}",
         {**MOCO_PAPER, **CUT_MOCO, "num_clients": clients, "frac": frac, "cohort_interval": same,
          "model.client.scheduler": {"T_max": epochs}}, MOCO)
        # Steps of an epoch, and epochs, by the authors' code: 500 and 200, 250 and 400, 50 and 2000.
        for clients, frac, same, epochs in ((100, 1.0, 1, 200), (200, 0.5, 5, 400), (1000, 0.1, 1, 2000))
    ),
    ("mocosfl/fl_moco", {**MOCO_PAPER, "num_clients": 100, "frac": 1.0, "rounds": 200, "local_epochs": 5,
                         "batch_size": 128, "algorithm.name": "fl_moco", "algorithm.queue": 6000}, MOCO),
    *((f"fsmkd/{data}", {**FSMKD_PAPER, **FSMKD_VGG, "dataset.name": data, "dataset.normalize": normalize}, FSMKD)
      for data, normalize in (("mnist", "none"), ("fashion_mnist", "none"), ("cifar10", "dataset"))),
    *((f"fsmkd/{data}_vit", {**FSMKD_PAPER, "model.name": "vit", "model.options": {}, "dataset.name": data,
                             "dataset.normalize": "none"}, FSMKD)
      for data in ("mnist", "fashion_mnist")),
    ("splitfed/ham10000", SPLITFED_SCRIPTS, SPLITFED),
]  # fmt: skip

SEVEN = "mhmd,fed_babu,fed_avg,fed_per,fed_rep_babu,per_fed_avg,ditto"
# What a published experiment sweeps over: (name, the sweeper's parameters).
SWEEPS: list[tuple[str, dict[str, str]]] = [
    ("fsl_sage/algorithms", {"algorithm": "fed_avg,sl_single_server,sl_multi_server,cse_fsl,fsl_sage"}),
    ("fsl_sage/align_interval", {"algorithm.align_interval": "2,3,5,10,20,30,40,50"}),
    ("fsl_sage/auxiliary_size", {"model.auxiliary.size": "linear,half,default,full"}),
    ("mhmd/_paper", {"algorithm": SEVEN}),
    ("mhmd/table", {"dataset.classes_per_client": "100,50,10", "frac": "1.0,0.1", "local_epochs": "1,4,10"}),
    ("mocosfl/_paper", {"dataset.classes_per_client": "2,10", "model.cut": "relu,layer1.0"}),
    (
        "fsmkd/_paper",
        {"algorithm.distillation_weight": "1,0", "dataset.client_samples": "1000,2000,3000,4000,5000", "seed": "0,1,2"},
    ),
    ("splitfed/ham10000", {"algorithm": "centralized,fed_avg,sl,sl_multi_server,sl_single_server"}),
]

# Mean and deviation of the training images by channel: red, green, blue.
CHANNELS: dict[str, tuple[tuple[float, ...], tuple[float, ...], str]] = {
    "mnist": ((0.1307,), (0.3081,), "torchvision's and PyTorch's examples; computed below"),
    "fashion_mnist": ((0.2860,), (0.3530,), "of all training pixels"),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "of all training pixels; computed below"),
    "cifar100": (
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "of all training pixels",
    ),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "of all pixels of train_32x32"),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), "of all training pixels"),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "torchvision's models"),
}


# ---------------------------------------------------------------------- the configuration


composed = cache(lambda *overrides: load_config(overrides))


def value_of(config: RunConfig, key: str) -> Any:
    value: Any = config.to_mapping()
    for name in key.split("."):
        value = value[name]
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("name", "values", "source"), DEFAULTS, ids=[row[0] for row in DEFAULTS])
def test_defaults_of_a_method(name: str, values: dict[str, Any], source: str) -> None:
    """In its yaml, and in its own configuration."""
    config = composed(f"algorithm={name}")
    bare = algorithms.get(name).Config()
    for key, value in values.items():
        assert value_of(config, f"algorithm.{key}") == value, f"{key}: {source}"
        assert getattr(bare, key) == value, f"{key}: {source}"


@pytest.mark.parametrize(("name", "values", "source"), EXPERIMENTS, ids=[row[0] for row in EXPERIMENTS])
def test_values_of_an_experiment(name: str, values: dict[str, Any], source: str) -> None:
    config = composed(f"experiment={name}")
    found = {key: value_of(config, key) for key in values}
    found["personalize.epochs"] = np.atleast_1d(found.get("personalize.epochs", 0)).tolist()
    assert found == {"personalize.epochs": found["personalize.epochs"], **values}, source


def files() -> Iterator[tuple[str, Path]]:
    folder = CONFIG_DIR / "experiment"
    for path in folder.rglob("*.yaml"):
        yield path.relative_to(folder).with_suffix("").as_posix(), path


CELL = re.compile(r"(fedbabu|mhmd)/s(100|50|10)_f(1|01)_tau(1|4|10)")


def test_every_experiment_of_a_paper_is_in_the_table() -> None:
    published = {name for name, _ in files() if not name.startswith(("small/", "lm/")) and "/_" not in name}
    in_table = {name for name, _, _ in EXPERIMENTS}
    assert in_table <= published
    assert all(CELL.fullmatch(name) for name in published - in_table)


def test_cells_are_what_their_names_say() -> None:
    """And nothing beside."""
    found = 0
    for name, path in files():
        if cell := CELL.fullmatch(name):
            group, shards, frac, tau = cell.groups()
            assert yaml.safe_load(path.read_text()) == {
                "defaults": [f"/experiment/{group}/_paper"],
                "frac": {"1": 1.0, "01": 0.1}[frac],
                "local_epochs": int(tau),
                "dataset": {"classes_per_client": int(shards)},
            }, name
            found += 1
    assert found == 2 * 3 * 2 * 3


@pytest.mark.parametrize(("name", "values"), SWEEPS, ids=[row[0] for row in SWEEPS])
def test_what_an_experiment_sweeps_over(name: str, values: dict[str, str]) -> None:
    found = yaml.safe_load((CONFIG_DIR / "experiment" / f"{name}.yaml").read_text())
    assert {key: str(value) for key, value in found["hydra"]["sweeper"]["params"].items()} == values


@pytest.mark.parametrize("name", SEVEN.split(","))
def test_methods_of_the_table_of_mhmd_differ_as_in_its_code(name: str) -> None:
    config, own = composed("experiment=mhmd/s50_f01_tau4", f"algorithm={name}"), name == "mhmd"
    assert config.aggregate.buffers == ("average" if own else "reset")
    assert config.personalize.loss == ("method" if own else "cross_entropy")
    assert config.model.typed_options() == dataclasses.replace(ModelConfig("mobilenet_cifar").typed_options(),
                                                               head_bias=not own)  # fmt: skip
    assert (config.personalize.start == "best") == (not algorithms.get(config.algorithm_name).personal)
    assert (config.lr, config.rounds, getattr(config.algorithm, "one_optimizer", True)) == (0.1, 80, True)


@pytest.mark.parametrize("tau", [1, 4, 10])
def test_lg_fed_avg_of_the_table_takes_a_quarter_of_the_rounds_at_a_constant_rate(tau: int) -> None:
    config = composed(f"experiment=mhmd/s10_f1_tau{tau}", "algorithm=lg_fed_avg")
    assert config.rounds == 80 // tau
    rates = {learning_options(config.optimizer_for("body"), config.scheduler_for("body"), round)["lr"]
             for round in range(config.rounds)}  # fmt: skip
    assert rates == {0.001}


@pytest.mark.parametrize("tau", [1, 4, 10])
def test_rates_of_fedbabu_are_divided_by_ten_at_one_half_and_three_quarters(tau: int) -> None:
    config = composed(f"experiment=mhmd/s10_f01_tau{tau}")
    rates = [learning_options(config.optimizer_for("body"), config.scheduler_for("body"), round)["lr"]
             for round in range(config.rounds)]  # fmt: skip
    half, quarter = config.rounds // 2, config.rounds // 4
    assert rates == pytest.approx([0.1] * half + [0.01] * quarter + [0.001] * quarter, rel=1e-9)


def test_rates_of_mocosfl_follow_half_a_cosine_to_zero() -> None:
    config = composed("experiment=mocosfl/fl_moco")
    for round in (0, 1, 50, 100, 199):
        options = learning_options(config.optimizer_for("model"), config.scheduler_for("model"), round)
        assert options["lr"] == pytest.approx(0.03 * (1 + np.cos(np.pi * round / 200)), rel=1e-6)
    for clients in (100, 200, 1000):
        config = composed(f"experiment=mocosfl/clients_{clients}")
        assert config.scheduler is not None
        assert config.scheduler.options["T_max"] == config.rounds


@pytest.mark.parametrize("algorithm", ["fsl_sage", "cse_fsl"])
def test_the_auxiliary_model_of_fsl_sage_has_an_adam_without_weight_decay(algorithm: str) -> None:
    config = composed("experiment=fsl_sage/cifar10_iid", f"algorithm={algorithm}")
    for part, decay in (("client", 0.0001), ("server", 0.0001), ("auxiliary", 0)):
        optimizer = config.optimizer_for(part)
        assert optimizer.name == "adam"
        assert (optimizer.options["lr"], optimizer.options["weight_decay"]) == (0.001, decay), part
        assert config.keeps_optimizer(part)


def test_synchronisations_of_mocosfl_follow_the_authors_rule() -> None:
    """1000 / (batch * clients) of them in an epoch, a pass of a client over its data; a hundred images a step."""
    for clients in (100, 200, 1000):
        config = composed(f"experiment=mocosfl/clients_{clients}")
        epoch = 50_000 // (clients * config.batch_size)
        assert config.algorithm.local_steps == epoch // (1000 // (config.batch_size * clients)), MOCO
        assert config.cohort_interval * config.algorithm.local_steps == epoch or config.frac == 1, MOCO
        assert config.rounds * config.algorithm.local_steps == 100_000, MOCO
        assert round(config.frac * clients) * config.batch_size == 100, MOCO


# ---------------------------------------------------------------------- models, views, attacks


def options_of(name: str) -> dict[str, Any]:
    return dataclasses.asdict(ModelConfig(name).typed_options())


def test_models_of_the_papers() -> None:
    assert options_of("vit") == {"patch": 4, "hidden": 64, "heads": 4, "mlp": 256, "depth": 12, "dropout": 0.0}, FSMKD
    assert options_of("cnn4") == {"width": 64}, "Vinyals et al. 2016"
    assert options_of("mobilenet_cifar") == {"width": 32, "head_bias": True}, "Howard et al. 2017, table 1"
    assert options_of("resnet18") == {"width": 64, "stem": "imagenet"}, "He et al. 2016, table 1; FSL-SAGE"
    # Parameters of the published networks for 1,000 classes (torchvision's documentation).
    info = DatasetInfo("imagenet", channels=3, height=224, width=224, classes=1000, class_names=())
    for name, count in (("resnet18", 11_689_512), ("resnet50", 25_557_032), ("mobilenet_cifar", 4_231_976)):
        with torch.device("meta"):
            model = build_model(ModelConfig(name), info)
        assert sum(weight.numel() for weight in model.parameters()) == count, name


def test_where_mhmd_attaches_its_heads() -> None:
    """MobileNet's blocks 4, 7 and 10 of 13: what the authors' code keeps of each block, at 3, 6 and 9 from 0."""
    from cutlayer.models.registry import entry

    config = ModelConfig("mobilenet_cifar")
    assert entry(config.name).blocks_for(config.typed_options()) == ("block4", "block7", "block10"), MHMD


def test_views_of_moco() -> None:
    assert augment._MOCO_AREA == 0.2, VIEWS
    assert boxes.RATIO == (3 / 4, 4 / 3), VIEWS
    assert augment._MOCO_STRENGTHS == (0.4, 0.4, 0.4, 0.1), VIEWS
    assert (augment._MOCO_JITTERED, augment._MOCO_GREY) == (0.8, 0.2), VIEWS
    assert augment.PADDING == 4, SAGE


def test_the_attacks_of_mocosfl() -> None:
    attack = InversionConfig()
    assert (attack.epochs, attack.lr) == (50, 0.001), MOCO


# ---------------------------------------------------------------------- channel statistics


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Published sets whose files are a few black pictures."""
    import cutlayer.datasets.published as published

    def split(channels: int) -> RawSplit:
        return RawSplit(torch.zeros(4, channels, 32, 32, dtype=torch.uint8), torch.arange(4) % 2)

    class Svhn:
        data, labels = np.zeros((4, 3, 32, 32), dtype=np.uint8), np.arange(4) % 2

    monkeypatch.setattr(published, "_mnist_like", lambda *_: (split(1), split(1)))
    monkeypatch.setattr(published, "_cifar", lambda *_: (split(3), split(3), ("a", "b")))
    monkeypatch.setattr(published, "fetch", lambda *_: Svhn)
    for path in ("train/n1/images/a.png", "val/images/b.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / path)
    for path, text in (("wnids.txt", "n1\n"), ("words.txt", "n1\ta\n"), ("val/val_annotations.txt", "b.png\tn1\n")):
        (tmp_path / path).write_text(text)


@pytest.mark.parametrize("name", [name for name in CHANNELS if name != "imagenet"])
def test_published_means_and_deviations(name: str, small_files: None, tmp_path: Path) -> None:
    raw = read(name, tmp_path, {}, 0)
    assert (tuple(raw.mean), tuple(raw.std)) == CHANNELS[name][:2], CHANNELS[name][2]


def test_those_of_imagenet() -> None:
    assert CHANNELS["imagenet"][:2] == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="the shared MNIST files are not beside this checkout")
def test_those_of_mnist_are_its_own() -> None:
    (path,) = (SHARED / "mnist").rglob("train-images-idx3-ubyte")
    raw = path.read_bytes()
    _, count, height, width = struct.unpack(">4i", raw[:16])
    counts = np.bincount(np.frombuffer(raw, np.uint8, offset=16), minlength=256)
    assert counts.sum() == count * height * width == 60_000 * 28 * 28
    levels = np.arange(256) / 255
    mean = (counts * levels).sum() / counts.sum()
    deviation = np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum())
    assert (round(mean, 4), round(deviation, 4)) == (CHANNELS["mnist"][0][0], CHANNELS["mnist"][1][0])


@pytest.mark.skipif(
    not (SHARED / "cifar10_jpeg.zip").is_file(), reason="the shared CIFAR-10 zip is not beside this checkout"
)
def test_those_of_cifar10_are_its_own_by_channel() -> None:
    """Of each tenth training image as JPEG, to 0.003; green's and red's deviations differ by 0.0035."""
    with zipfile.ZipFile(SHARED / "cifar10_jpeg.zip") as file:
        names = sorted(name for name in file.namelist() if name.startswith("train/") and name.endswith(".jpg"))
        assert len(names) == 50_000
        images = np.stack([np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in names[::10]])
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
    levels = np.arange(256) / 255
    means = [(count * levels).sum() / count.sum() for count in counts]
    deviations = [np.sqrt((c * (levels - m) ** 2).sum() / c.sum()) for c, m in zip(counts, means, strict=True)]
    mean, deviation, _ = CHANNELS["cifar10"]
    assert means == pytest.approx(mean, abs=0.003)
    assert deviations == pytest.approx(deviation, abs=0.003)


# ---------------------------------------------------------------------- figures in the documentation

# Communication for 81% test accuracy, in GiB: the paper's GB are 2^30 bytes.
NEEDED = {"fsl_sage": 12.2, "cse_fsl": 26.0, "sl_multi_server": 60.2, "fed_avg": 70.0, "sl_single_server": 109.1}
ACCURACY = {
    "s=100, f=1.0, tau=1": (66.70, 55.79, 51.93, 51.95, 53.01, 18.29, 47.09, 39.36),
    "s=10, f=0.1, tau=10": (68.13, 66.32, 62.67, 59.50),
}


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each line of a table in markdown."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip(" `") for cell in line.strip("|").split("|")]


def test_published_figures_in_the_documentation() -> None:
    text = (checkout() / "docs" / "reproducing.md").read_text()
    found = list(rows(text))
    for name, gib in NEEDED.items():
        assert any(row[1:] == [name, f"{gib} GiB"] for row in found), f"{name}: {SAGE}"
        (each,) = [row for row in found if row[0] == name]
        # By what a round costs here (benchmarks/traffic.py).
        assert each[2] == f"{round(gib * 2**30 / (float(each[1]) * 1e6))} rounds"
    for cell, values in ACCURACY.items():
        (row,) = [row for row in found if row[0] == cell]
        assert [float(value) for value in row[1:] if value] == list(values), MHMD
    assert "200 GiB is published as about 0.85" in text, SAGE
