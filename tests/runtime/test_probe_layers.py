"""The monitor on what the projector gives, and networks of two layers on frozen features."""

from pathlib import Path

import pytest
import torch

from cutlayer.runtime.after.probe import earlier_probe, probe, probed_folder
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.scoring.classifiers import ProbeConfig, knn_accuracy, linear_accuracy, two_layer_accuracy
from tests.conftest import play

LEARNER = ("model.projector.hidden=8", "model.projector.width=6", "algorithm.queue=64", "rounds=1", "monitor.k=20")


@pytest.mark.parametrize("name", ["moco_sfl", "fl_moco"])
def test_the_monitor_compares_what_the_projector_gives(configure, name: str) -> None:
    accuracies = []
    for where in ("backbone", "projector"):
        keys = (f"algorithm={name}", *LEARNER, f"monitor.features={where}", "monitor.train_samples=null")
        federation = Federation(configure(*keys))
        record, _ = federation.step()
        parts, setup = federation.server.ctx.parts, federation.setup
        names = (*setup.algorithm.layout.whole, "projector")[: None if where == "projector" else -1]

        def given(x: torch.Tensor, names: tuple[str, ...] = names, parts: dict = parts) -> torch.Tensor:
            for each in names:
                x = parts[each].eval()(x)
            return x

        with torch.no_grad():
            found = []
            for source in (setup.dataset.train, setup.dataset.test):
                ((x, y),) = source.batches(torch.arange(len(source)), batch_size=len(source))
                found += [given(x), y]
        assert found[0].shape[1] == {"backbone": 64, "projector": 6}[where]
        assert record.test_acc == pytest.approx(knn_accuracy(*found, 10, k=20), abs=1e-9)
        accuracies.append(record.test_acc)
    assert accuracies[0] != accuracies[1]


def test_a_method_without_a_projector_ignores_the_key(configure) -> None:
    assert not configure("algorithm=fed_avg", "monitor.features=projector").decides("monitor.features")


def circles(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points within a circle and around it, which no line divides."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 2, generator=generator)
    return points, (points.norm(dim=1) > 1.18).long()


def test_two_layers_find_what_a_line_does_not() -> None:
    train, test = circles(400, 0), circles(2000, 1)
    found = two_layer_accuracy(*train, *test, 2, hidden=32, seed=0)
    assert found > 0.85
    assert linear_accuracy(*train, *test, 2) < 0.65
    state = torch.random.get_rng_state()
    assert two_layer_accuracy(*train, *test, 2, hidden=32, seed=0) == found
    assert torch.equal(torch.random.get_rng_state(), state)
    assert two_layer_accuracy(*circles(129, 0), *test, 2, hidden=4, seed=1) > 0.5, "a last batch of one sample"


def test_a_probe_has_two_layers_for_shares_below_one(configure, tmp_path: Path) -> None:
    config = ProbeConfig(knn=False, labels=(1.0, 0.1), hidden=16, train_samples=300)
    federation = play(Federation(configure("algorithm=fed_avg", "rounds=2")))
    found = probe(federation, config, tmp_path)
    assert {*found.two_layer} == {"0.1"}
    assert 0.3 < found.two_layer["0.1"] <= 1
    assert found == earlier_probe(tmp_path, config) == probe(federation, config, tmp_path)
    assert "two layers, 10% of labels" in str(found.section())
    plain = ProbeConfig(knn=False, labels=(1.0, 0.1), train_samples=300)
    assert probed_folder(tmp_path, plain) != probed_folder(tmp_path, config)
    assert probe(federation, plain, tmp_path).linear == found.linear
    with pytest.raises(ConfigError, match=r"^hidden=0: expected an integer >= 1"):
        ProbeConfig(hidden=0)
