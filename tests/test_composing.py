"""What Hydra composes in these tests, where it remembers what it has read, is what it composes otherwise."""

import pickle
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR
from cutlayer.runtime.launching.hydra_support import preprocess
from cutlayer.runtime.launching.sweeps.composing import compose_quickly
from tests import conftest

COMMANDS = (
    "algorithm=fed_avg",
    "algorithm=fed_avg seed=1",
    "algorithm=fsmkd model.personal.optimizer.lr=0.1",
    "experiment=fsl_sage/cifar10_iid seed=3",
    "experiment=mhmd/s10_f01_tau1 dataset=synthetic dataset.options.n_train=9",
    "optimizer=sgd optimizer.momentum=0.9 scheduler=cosine ~logger.csv",
    "dataset=cifar10 dataset.distribution=shards transport=grpc model.options={a:[1,2]}",
    "logger={csv:{},tensorboard:{}} hydra.launcher.n_jobs=3",
    "logger=[csv,tensorboard]",
    "~scheduler",
    # Mistakes, each with Hydra's own words.
    "algorithm=nope",
    "lr=1,2",
    "a=b",
    "rounds='x",
    "~scheduler=cosine",
)


def composed(command: str) -> str:
    """With Hydra's own part, or what is wrong with it."""
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            found = compose("config", overrides=preprocess(command.split()), return_hydra_config=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return OmegaConf.to_yaml(found)


@pytest.fixture(scope="module")
def remembered() -> dict[str, str]:
    """Each command twice, in another order: what the first has been composed of is remembered, and not its values."""
    first = {command: composed(command) for command in COMMANDS}
    again = {command: composed(command) for command in reversed(COMMANDS)}
    assert first == again
    return first


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_is_hydra_s_own(command: str, remembered: dict[str, str]) -> None:
    conftest.forget()
    try:
        assert composed(command) == remembered[command]
    finally:
        conftest.forget = conftest.quick_composition()


SWEPT = (
    "algorithm=fed_avg seed=1",
    "algorithm=fed_avg seed=2 dataset.alpha=0.5",
    "seed=1 algorithm=fsmkd model.personal.optimizer.lr=0.1 rounds=3",
    "seed=3",
    "experiment=fsl_sage/cifar10_iid seed=3 lr=0.2",
    "optimizer=sgd optimizer.momentum=0.9 seed=1 optimizer.name=adam",
    "dataset.options={a:[1,2]} seed=1 dataset.options.b=x save_dir='a b'",
    "~scheduler seed=1",
    "+seed=2",
    "seed=1 a=b",
    "seed=1 rounds.a=b",
    "model=nope seed=1",
    "seed=1,2",
    "seed='x",
    "hydra.launcher.n_jobs=2 seed=1",
)


def of_jobs(loader: Any, master: DictConfig) -> list[str]:
    found: list[str] = []
    for command in (*SWEPT, *SWEPT[::-1]):
        try:
            config = loader.load_sweep_config(master, preprocess(command.split(" ")))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            assert config.hydra.sweep.dir == master.hydra.sweep.dir
            found.append(OmegaConf.to_yaml(config, resolve=False))
    return found


def test_a_job_of_a_sweep_has_the_configuration_that_hydra_gives_it() -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["algorithm=fed_avg", "seed=1,2"], RunMode.MULTIRUN)
        context = HydraContext(loader, Callbacks(master))
        compose_quickly(context)
        assert context.config_loader is not loader
        sent = pickle.loads(pickle.dumps(context.config_loader))
        assert of_jobs(loader, master) == of_jobs(sent, master)
        assert sent.list_groups("") == loader.list_groups("")


def test_nothing_of_a_copy_of_the_configuration_is_remembered(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        assert compose("config") == {"a": 1}
        (tmp_path / "config.yaml").write_text("a: 2\n")
        assert compose("config") == {"a": 2}
