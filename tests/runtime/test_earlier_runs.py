"""A run that an earlier version began, by whose rule each key made another run, is the same run by today's.

`killed_run` is what was left of one that was killed after the checkpoint of its second round of six. Of its folder only
what is needed to continue it is kept.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cutlayer.runtime.after.saved import read_config, restore
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import MODEL_FILE
from cutlayer.runtime.job import choose_folder, claim
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder, find_unfinished
from cutlayer.runtime.settings import RunConfig
from tests.places import ROOT

KILLED = ROOT / "tests" / "runtime" / "killed_run"
COMMAND = (
    *(
        "algorithm=scaffold",
        "optimizer=sgd",
        "lr=0.05",
        "model=mlp",
        "model.options.hidden=[8,8]",
        "num_clients=2",
        "rounds=6",
    ),
    *("checkpoint_interval=2", "batch_size=200", "eval_interval=2", "device=cpu", "progress=none", "dataset.workers=2"),
)
BEFORE_REVISION = ROOT / "tests" / "runtime" / "killed_before_revision"
REVISED = (
    *COMMAND, "algorithm=fsl_sage", "optimizer=adam", "lr=0.001",
    "model.cut=relu1", "algorithm.align_epochs=1", "algorithm.buffer_size=200",
)  # fmt: skip
# Of another machine, of what is kept, of what comes after training, and what the run does not read.
ALIKE = ("threads=1", "dataset.workers=0", "checkpoint_interval=3", "probe.k=9", "dataset.alpha=5", "monitor.k=9")


def configured(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config([*COMMAND, *overrides, f"save_dir={tmp_path / 'saves'}"])


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    path = tmp_path / "saves" / "scaffold" / "mlp" / "digits-iid" / "lr=0.05,seed=0,as=then" / "2026-11-27_07-19-00"
    return shutil.copytree(KILLED, path)


def test_it_is_found_and_ends_as_a_run_that_was_not_killed(tmp_path: Path, killed: Path) -> None:
    config = configured(tmp_path, *ALIKE)
    with claim(config, []) as folder:
        assert (folder.path, folder.resumed) == (killed, True)
        run(config, folder)
    assert (killed / "identity").read_text().split() == [config.identity(), (KILLED / "identity").read_text().strip()]
    whole = configured(tmp_path, "resume=never", "threads=1")
    with claim(whole, []) as folder:
        assert not folder.resumed
        run(whole, folder)
    assert (killed / "communication.csv").read_bytes() == (folder.path / "communication.csv").read_bytes()
    # On the processor that computed the first two rounds to the bit; on another they are not the same to begin with.
    ours, theirs = (load_file(path / MODEL_FILE) for path in (killed, folder.path))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert choose_folder(config, []) != killed  # it is over


def test_its_checkpoint_is_read_again_and_again(tmp_path: Path, killed: Path) -> None:
    """Also one that was written before it was found by today's rule, and by a program that measures it."""
    config = configured(tmp_path, *ALIKE)
    for _ in range(2):
        folder = RunFolder.claim(choose_folder(config, []), config.identity())
        assert (folder.path, folder.resumed) == (killed, True)
        folder.release()
    assert restore(killed, read_config(killed, {})).round == 2
    folder = RunFolder.continue_at(killed, config.identity())
    folder.release()


@pytest.mark.parametrize("other", ["lr=0.01", "rounds=7", "device=auto", "batch_size=100", "model.options.hidden=[8]"])
def test_another_run_does_not_take_it(tmp_path: Path, killed: Path, other: str) -> None:
    config = configured(tmp_path, other)
    assert choose_folder(config, []) != killed
    with pytest.raises(ConfigError, match="the folder of a run of the same configuration"):
        RunFolder.continue_at(killed, config.identity())


def test_one_whose_method_has_been_revised_is_refused_in_one_line(tmp_path: Path) -> None:
    """The auxiliary models of FSL-SAGE are others today, under the same configuration."""
    place = tmp_path / "saves" / "fsl_sage" / "mlp" / "digits-iid" / "as=then" / "2026-11-27_07-19-00"
    path = shutil.copytree(BEFORE_REVISION, place)
    config = load_config([*REVISED, f"save_dir={tmp_path / 'saves'}"])
    with claim(config, []) as folder:
        assert (folder.path, folder.resumed) == (path, True)
        with pytest.raises(ConfigError, match=r"was begun when fsl_sage was computed in another way; .*resume=never"):
            run(config, folder)
    anew = load_config([*REVISED, f"save_dir={tmp_path / 'saves'}", "resume=never", "rounds=1"])
    with claim(anew, []) as folder:
        assert not folder.resumed
        run(anew, folder)


@pytest.mark.parametrize("name", ["fed_avg", "cse_fsl"])
def test_a_model_that_has_been_revised_is_another_too(configure, tmp_path: Path, name: str) -> None:
    """Whichever of method and model changed, a checkpoint of before has another number."""
    setting = (f"algorithm={name}", "model=cnn2", "model.client_norm=group", "rounds=2")
    federation = Federation(configure(*setting), tmp_path)
    federation.step()
    federation.checkpoint({})
    again = Federation(configure(*setting), tmp_path)
    assert again.resume(lambda _: None) == {}
    again.setup.algorithm, method = type(name, (again.setup.algorithm,), {}), again.setup.algorithm
    again.setup.algorithm.revision = method.revision - 1
    with pytest.raises(ConfigError, match="computed in another way"):
        again.resume(lambda _: None)
    plain = Federation(configure(f"algorithm={name}", "model=cnn2"))
    assert federation.setup.revision == plain.setup.revision + 1


@pytest.mark.parametrize("text", [None, "", "[", "algorithm: 3", "model: {name: [x]}\nalgorithm: {name: scaffold}"])
def test_one_whose_configuration_cannot_be_read_is_left_alone(tmp_path: Path, killed: Path, text: str | None) -> None:
    (killed / "config.yaml").unlink() if text is None else (killed / "config.yaml").write_text(text)
    config = configured(tmp_path)
    assert find_unfinished(tmp_path / "saves" / "scaffold" / "mlp" / "digits-iid", config.identity()) is None
