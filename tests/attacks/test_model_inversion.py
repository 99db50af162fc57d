"""Model inversion: what it finds against figures that are known, what it leaves, and what it refuses."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cutlayer import algorithms
from cutlayer import attack as command
from cutlayer.attacks import ATTACKS, AttackResult, Reported, register
from cutlayer.attacks.model_inversion import Inversion, InversionConfig, _picture
from cutlayer.attacks.running import attack
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from tests.conftest import play, same, weights

QUICK = InversionConfig(epochs=1, samples=40, width=8, blocks=1)
KEYS = ("attack.epochs=2", "attack.samples=60", "attack.width=8", "attack.blocks=1")
CUT = [name for name in algorithms.names() if "client" in algorithms.get(name).layout.whole]


def invert(federation: Federation, config: InversionConfig, run: Path) -> tuple[Inversion, Path]:
    found, folder = attack("model_inversion", federation, config, run)
    assert isinstance(found, Inversion)
    return found, folder


def finished(configure, tmp_path: Path, *overrides: str) -> Path:
    config = configure("rounds=1", "progress=none", "threads=1", *overrides)
    with RunFolder.claim(tmp_path / "run", config.identity()) as folder:
        run(config, folder)
    return tmp_path / "run"


def images_of(federation: Federation, client: int) -> np.ndarray:
    """A client's training images as scikit-learn has them, [n, 8, 8] in 0..1."""
    source, indices = federation.setup.dataset.train, federation.setup.partition.indices(client)
    ((x, _),) = source.batches(indices, batch_size=len(indices))
    return source.pixels(x)[:, 0].numpy()


# ---------------------------------------------------------------------- what it finds


def test_pixels_are_those_of_the_dataset(configure) -> None:
    federation = Federation(configure("num_clients=1"))
    found = {image.round(4).tobytes() for image in (images_of(federation, 0) * 16).round()}
    digits = {image.astype(np.float32).tobytes() for image in load_digits().images}
    assert found <= digits
    assert len(found) > 1400


def test_the_mean_image_against_numpy(configure, tmp_path: Path) -> None:
    federation = Federation(configure("algorithm=sl_single_server"))
    found, _ = invert(federation, replace(QUICK, samples=None, client=2), tmp_path)
    test = federation.setup.dataset.test
    ((x, _),) = test.batches(torch.arange(len(test)), batch_size=len(test))
    errors = ((images_of(federation, 2) - test.pixels(x)[:, 0].mean(0).numpy()) ** 2).mean((1, 2))
    assert found.mean_image["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert found.mean_image["psnr"] == pytest.approx((-10 * np.log10(errors)).mean(), rel=1e-5)
    assert (found.train_images, found.test_images) == (len(test), federation.setup.partition.sizes[2])
    assert found.shape == [[128]]


@pytest.mark.parametrize("blind", [False, True], ids=["everything crosses", "nothing crosses"])
def test_between_nothing_and_everything(configure, tmp_path: Path, blind: bool) -> None:
    """The first convolution, whose channels are the pixels at one place of the window; or nothing but zeros."""
    federation = Federation(configure("algorithm=sl_single_server", "model=cnn2", "model.cut=conv1"))
    client = federation.server.ctx.part("client")
    with torch.no_grad():
        client.conv1.weight.zero_()
        client.conv1.bias.zero_()
        if not blind:
            client.conv1.weight[:, :, 2, 2] = 1.0
    found, _ = invert(federation, InversionConfig(epochs=15, width=8, blocks=1, batch_size=32, lr=0.005), tmp_path)
    if blind:
        assert found.found["mse"] == pytest.approx(found.mean_image["mse"], rel=0.1)
        assert found.found["ssim"] == pytest.approx(found.mean_image["ssim"], abs=0.05)
    else:
        assert found.found["mse"] < 0.1 * found.mean_image["mse"]
        assert found.found["ssim"] > 0.9
        assert found.found["psnr"] > found.mean_image["psnr"] + 9


@pytest.mark.parametrize("name", CUT)
def test_every_method_that_cuts_can_be_attacked_and_is_left_as_it_was(configure, tmp_path: Path, name: str) -> None:
    more = {"ressfl": ("algorithm.attacker_width=4",), "fsl_sage": ("algorithm.align_epochs=1",)}.get(name, ())
    federation = play(Federation(configure(f"algorithm={name}", *more, "model=cnn2")), rounds=1)
    before, evaluation = weights(federation), federation.evaluate()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found, folder = invert(federation, QUICK, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, weights(federation))
    assert federation.evaluate() == evaluation
    assert found.shape == [[64, 2, 2]]
    again, _ = invert(federation, QUICK, tmp_path / "again")
    assert again == found
    other = Federation(replace(federation.setup.config, seed=7))
    assert invert(other, QUICK, tmp_path / "other")[0].found != found.found
    assert {path.name for path in folder.iterdir()} == {"summary.json", "reconstructions.png"}


@pytest.mark.parametrize("buffers", ["average", "keep_local", "reset"])
def test_several_values_that_cross_and_statistics_that_do_not_travel(configure, tmp_path: Path, buffers: str) -> None:
    setting = ("model=resnet20", "model.options.width=2", "model.cut=layer2.0.conv1", f"aggregate.buffers={buffers}")
    federation = Federation(configure("algorithm=sl_single_server", *setting))
    found, _ = invert(federation, QUICK, tmp_path)
    assert sorted(found.shape) == [[2, 8, 8], [4, 4, 4]]
    assert 0 < found.found["mse"] < 1


# ---------------------------------------------------------------------- what it leaves


def test_a_saved_run_from_the_command_line(configure, tmp_path: Path, capsys) -> None:
    path = finished(configure, tmp_path, "algorithm=sl_multi_server")
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert command.main(["attack=model_inversion", f"run={path}", *KEYS, "attack.client=1"]) == 0
    (folder,) = (path / "attacks" / "model_inversion").iterdir()
    assert folder.name == "epochs=2,lr=0.001,batch_size=128,client=1,samples=60,width=8,blocks=1"
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    summary = json.loads(first["summary.json"])
    assert summary["finished"]
    assert (summary["client"], summary["train_images"], summary["test_images"], summary["round"]) == (1, 60, 60, 1)
    assert f"{summary['ssim']:.4f}" in capsys.readouterr().out
    assert command.main([str(tmp_path), *KEYS, "attack.client=1"]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first, "the same bits again"
    assert all(file.read_bytes() == content for file, content in files.items()), "nothing else in the run changed"
    assert command.main([f"run={path}", *KEYS]) == 0
    assert len(list(folder.parent.iterdir())) == 2


def test_the_picture_has_originals_above_reconstructions() -> None:
    originals, guesses = torch.rand(10, 3, 32, 20), torch.rand(10, 3, 32, 20)
    picture = np.asarray(_picture(originals, guesses))
    assert picture.shape == (2 * 128 + 2, 10 * 82 - 2, 3)
    for column in range(10):
        for top, images in ((0, originals), (130, guesses)):
            shown = picture[top : top + 128 : 4, 82 * column : 82 * column + 80 : 4]
            assert np.abs(shown / 255 - images[column].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    grey = np.asarray(_picture(torch.rand(3, 2, 70, 80), torch.rand(3, 2, 70, 80)))
    assert grey.shape == (142, 3 * 82 - 2, 3)
    assert (grey[..., 0] == grey[..., 2]).all()


def test_the_pictures_first_row_is_the_clients_images(configure, tmp_path: Path) -> None:
    federation = Federation(configure("algorithm=sl_single_server"))
    _, folder = invert(federation, QUICK, tmp_path)
    picture = np.asarray(Image.open(folder / "reconstructions.png"))[..., 0]
    own = {(image * 255).round().astype(np.uint8).tobytes() for image in images_of(federation, 0)}
    shown = [picture[0:64:8, 66 * column : 66 * column + 64 : 8] for column in range(10)]
    assert {np.ascontiguousarray(image).tobytes() for image in shown} <= own


# ---------------------------------------------------------------------- what it refuses


@pytest.fixture(scope="module")
def saved(configure, tmp_path_factory) -> Path:
    return finished(configure, tmp_path_factory.mktemp("saves"), "algorithm=sl_single_server")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attack=gradient_leakage"], "attack=gradient_leakage: expected an attack (choices: model_inversion)"),
        (["attack.epoch=3"], "attack.epoch: no such key; did you mean attack.epochs?"),
        (["attack.epochs=0"], "attack.epochs=0: expected an integer >= 1"),
        (["attack.lr=-1"], "attack.lr=-1"),
        (["attack.samples=0"], "attack.samples=0"),
        (["attack.client=4"], "attack.client=4: expected a client of the run: 0 to 3"),
        (["lr=0.1"], "key=lr: expected one that may be set for a run that is over"),
        (["attack.lr=1e30", "attack.width=4"], "attack.lr=1e+30: expected a rate that converges"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(saved: Path, capsys, arguments: list[str], said: str) -> None:
    path = saved
    before = sorted(path.rglob("*"))
    capsys.readouterr()
    assert command.main([f"run={path}", "attack.samples=20", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(path.rglob("*")) == before


def test_runs_that_cannot_be_attacked(configure, tmp_path: Path, capsys) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert command.main([*arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert refused(f"run={tmp_path / 'none'}").startswith(f"run={tmp_path / 'none'}: expected the folder of a run")
    assert refused("attack=model_inversion").startswith("run: name the folder of a run")
    path = finished(configure, tmp_path, "algorithm=fed_avg")
    assert "a run of a method that cuts the model" in refused(f"run={path}")
    assert not (path / "attacks").exists()
    lock = FileLock.take(path / ".lock")
    assert lock is not None
    assert "a run that no other process is using" in refused(f"run={path}")
    lock.release()


def test_a_client_without_images_is_refused(configure, tmp_path: Path) -> None:
    setting = ("algorithm=sl_single_server", "dataset.distribution=dirichlet", "dataset.alpha=0.01", "num_clients=40")
    federation = Federation(configure(*setting, "dataset.min_samples=0"))
    empty = int(np.flatnonzero(federation.setup.partition.sizes == 0)[0])
    with pytest.raises(ConfigError, match="a client with training samples"):
        invert(federation, replace(QUICK, client=empty), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_table_shows_the_measures() -> None:
    found = Inversion(3, [[4]], 5, 6, 0.1, {"mse": 0.25, "ssim": 0.5, "psnr": 6.02}, {"mse": 1, "ssim": 0, "psnr": 0})
    assert "0.2500    0.5000   6.02 dB" in found.table()


# ---------------------------------------------------------------------- another attack


def test_an_attack_is_one_registration(configure, tmp_path: Path, capsys) -> None:
    @dataclass(frozen=True)
    class Keys:
        guesses: int = 3

    class Counted(AttackResult):
        def to_json(self) -> dict[str, Any]:
            return {"hits": 2}

        def table(self) -> str:
            return "2 hits"

    def count(federation: Federation, config: Keys, reported: Reported) -> AttackResult:
        reported(1, 1, f"{config.guesses} guesses")
        return Counted()

    path = finished(configure, tmp_path, "algorithm=fed_avg")
    try:
        register("counted", Keys, "nothing")(count)
        assert command.main(["attack=counted", str(path), "attack.guesses=5"]) == 0
        assert "2 hits" in capsys.readouterr().out
        (folder,) = (path / "attacks" / "counted").iterdir()
        assert folder.name == "guesses=5"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary == {"attack": "counted", "knows": "nothing", "guesses": 5, "hits": 2, "finished": True}
        assert command.main(["attack=count", str(path)]) == 1
        assert "did you mean counted?" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            command.main(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "attack=counted, attack.guesses=3" in shown
        assert "attack=model_inversion, attack.epochs=50" in shown
    finally:
        ATTACKS.pop("counted", None)
