"""ResSFL's pre-training, and client parts that are frozen."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cutlayer import algorithms
from cutlayer.models.similarity import ssim
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from tests.algorithms.drawing import Drawn
from tests.conftest import play, same

NARROW = ("algorithm.attacker_width=8", "optimizer=sgd", "lr=0.05")
CUT_IN_TWO = [name for name in algorithms.names() if {"client", "server"} <= {*algorithms.get(name).layout.whole}]


def state(federation: Federation) -> dict[str, torch.Tensor]:
    found = federation.full_model()
    assert found is not None
    return found


def likeness(federation: Federation) -> list[float]:
    """SSIM of the simulated attacker in each round."""
    found: list[float] = []
    while not federation.done:
        found.append(federation.step()[0].metrics["ssim"])
    return found


# ---------------------------------------------------------------------- pre-training


@pytest.mark.parametrize("keys", [("alpha=0",), ("alpha=50", "target_ssim=1")], ids=" ".join)
def test_where_likeness_is_not_punished_it_is_centralized_training(configure, keys: tuple[str, ...]) -> None:
    setting = ("optimizer=sgd", "lr=0.05", "precision=fp64", "batch_size=300")
    plain = play(Federation(configure("algorithm=centralized", *setting)))
    own = [f"algorithm.{key}" for key in ("attacker_width=8", *keys)]
    federation = play(Federation(configure("algorithm=ressfl", *setting, *own)))
    for name, tensor in state(plain).items():
        assert torch.allclose(state(federation)[name], tensor, rtol=1e-9, atol=1e-12), name


def padded_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2004 with one window around every pixel, of maps that are zero beyond their edges; of a batch."""
    side = min(11, x.shape[-1] - 1 + x.shape[-1] % 2)
    places = torch.arange(side, dtype=x.dtype) - side // 2
    profile = torch.exp(-(places**2) / 4.5)
    window = torch.outer(profile, profile)
    window = (window / window.sum()).expand(x.shape[1], 1, side, side)

    def mean(z: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(z, window, padding=side // 2, groups=x.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()


@pytest.mark.parametrize(
    ("border", "target", "kept"), [("within", 0.49, True), ("zeros", 0.52, True), ("within", 0.49, False)]
)
def test_all_three_parts_are_their_equations(configure, border: str, target: float, kept: bool) -> None:
    """The decoder's step is before the likeness that is punished; optimizers go on over the rounds, or begin anew."""
    momentum, alpha, rate = 0.9, 3.0, 0.01
    setting = ("lr=0.05", f"optimizer.momentum={momentum}", "optimizer=sgd", "precision=fp64", "rounds=3")
    own = (
        f"alpha={alpha}",
        f"target_ssim={target}",
        f"attacker_lr={rate}",
        "attacker_width=4",
        f"ssim_border={border}",
    )
    more = (f"algorithm.{key}" for key in own)
    federation = Federation(
        configure(
            "algorithm=ressfl",
            *setting,
            *more,
            "batch_size=150",
            "num_clients=2",
            f"optimizer.keep={'run' if kept else 'round'}",
        )
    )
    names = ("client", "server", "attacker")
    parts = federation.setup.blueprint.parts(list(names))
    client, server, attacker = (parts[name] for name in names)
    trained = [*client.parameters(), *server.parameters()]
    descent = torch.optim.SGD(trained, lr=0.05, momentum=momentum)
    attack = torch.optim.Adam(attacker.parameters(), lr=rate)
    source, drawn, punished = federation.setup.dataset.train, Drawn(federation), set[bool]()
    mean, deviation = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (source.mean, source.std))

    def alike(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ssim(x, y).mean() if border == "within" else padded_ssim(x, y)

    for number in range(3):
        if not kept:
            descent.state.clear()
            attack.state.clear()
        losses: list[float] = []
        likenesses: list[float] = []
        for x, y in drawn.batches(number, 0):
            images, z = (x * deviation + mean).clamp(0, 1), client(x)
            attack.zero_grad()
            (1 - alike(attacker(z.detach()), images)).backward()
            attack.step()
            likeness, loss = alike(attacker(z), images), nn.functional.cross_entropy(server(z), y)
            likenesses.append(likeness.item())
            losses.append(loss.item())
            punished.add(likeness.item() > target)
            slopes = torch.autograd.grad(loss + (alpha * (likeness - target) if likeness > target else 0), trained)
            for parameter, slope in zip(trained, slopes, strict=True):
                parameter.grad = slope
            descent.step()
        metrics = federation.step()[0]
        assert metrics.train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-8)
        assert metrics.metrics["ssim"] == pytest.approx(sum(likenesses) / len(likenesses), rel=1e-8)
    assert punished == {True, False}, "some batches are above the target, some below"
    for name in names:
        kept = federation.stores["clients"].get(0, name)
        assert kept is not None
        for key, value in parts[name].state_dict().items():
            assert torch.allclose(kept[key], value, rtol=1e-8, atol=1e-10), f"{name}/{key}"


def test_the_attacker_learns_and_the_client_part_learns_to_resist(configure) -> None:
    setting = ("algorithm=ressfl", *NARROW, "rounds=3", "batch_size=50", "algorithm.attacker_lr=0.01")
    free = likeness(Federation(configure(*setting, "algorithm.alpha=0")))
    assert free[-1] > free[0] + 0.1
    resisting = Federation(configure(*setting, "algorithm.alpha=20", "algorithm.target_ssim=0"))
    assert likeness(resisting)[-1] < free[-1] - 0.1


def test_the_attacker_does_not_follow_the_clients_loss(configure) -> None:
    """Its first step is on the initial client part: of the first batch it is the same whatever alpha is."""
    weights: list[dict[str, torch.Tensor]] = []
    for alpha in (0, 1000):
        keys = ("batch_size=2000", "rounds=1", f"algorithm.alpha={alpha}", "algorithm.target_ssim=-1")
        federation = play(Federation(configure("algorithm=ressfl", *NARROW, *keys)))
        weights.append(dict(federation.stores["clients"].get(0, "attacker") or {}))
        assert not same(weights[-1], federation.setup.blueprint.initial["attacker"])
    assert same(*weights)


@pytest.mark.parametrize("key", ["alpha=-1.0", "target_ssim=2.0", "attacker_lr=0.0", "attacker_width=0"])
def test_mistakes_are_one_line(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["algorithm=ressfl", f"algorithm.{key}"])
    assert str(error.value).startswith(f"algorithm.{key}")


# ---------------------------------------------------------------------- frozen client parts


@pytest.mark.parametrize("name", CUT_IN_TWO)
def test_a_frozen_client_part_does_not_move(configure, name: str) -> None:
    more = {"fsl_sage": ("algorithm.align_epochs=1",), "ressfl": ("algorithm.attacker_width=4",)}.get(name, ())
    model = ("model=cnn4", "model.options.width=4", "optimizer.weight_decay=0.1", "eval_interval=1", "batch_size=200")
    federation = Federation(configure(f"algorithm={name}", *more, *model, "model.client.freeze=true"))
    start = {
        part: {k: v.clone() for k, v in federation.setup.blueprint.initial[part].items()}
        for part in ("client", "server")
    }
    assert any(key.endswith("running_mean") for key in start["client"])
    play(federation)
    whole = {part: dict(values) for part, values in federation.learnt.client_states(0).items()}
    assert same(whole["client"], start["client"]), "neither weights nor running statistics"
    moved = [key for key, tensor in start["server"].items() if not torch.equal(whole["server"][key], tensor)]
    left = (
        {"fc.weight"} if federation.setup.algorithm.evaluates_features else set[str]()
    )  # the classifier does not learn
    assert {key for key in moved if key.endswith("weight")} == {
        key for key in start["server"] if key.endswith("weight") and key not in left
    }


def test_freezing_changes_no_traffic(configure) -> None:
    setting = ("algorithm=sl_single_server", "model=cnn2", "rounds=1")
    frozen = play(Federation(configure(*setting, "model.client.freeze=true")))
    free = play(Federation(configure(*setting)))
    assert frozen.ledger.training() == free.ledger.training()
    assert expected_bytes(frozen.setup, range(1)) == expected_bytes(free.setup, range(1))


def test_a_pre_trained_client_part_is_restored_and_kept(configure, tmp_path: Path) -> None:
    config = configure("algorithm=ressfl", *NARROW, "progress=none", "rounds=1")
    with RunFolder.claim(tmp_path / "run", config.identity()) as folder:
        run(config, folder)
    given = (f"model.init={tmp_path / 'run'}", "model.client.freeze=true", "rounds=1")
    federation = play(Federation(configure("algorithm=sl_single_server", *given)))
    saved, client = load_file(tmp_path / "run" / "model.safetensors"), federation.setup.blueprint.initial["client"]
    assert {name for name, tensor in state(federation).items() if torch.equal(saved[name], tensor)} == {*client}
    fresh = Federation(config).setup.blueprint.initial["client"]
    assert not any(torch.equal(saved[name], tensor) for name, tensor in fresh.items()), "it was trained"


def test_only_a_client_part_can_be_frozen(configure) -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.client\.freeze=true: expected false, or a method with a client part"
    ):
        Federation(configure("algorithm=fed_avg", "model.client.freeze=true"))
    with pytest.raises(ConfigError, match=r"model\.server\.freeze"):
        load_config(["+model.server.freeze=true"])
