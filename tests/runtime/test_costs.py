"""What a step costs a client: closed forms of a perceptron, torch's own counter, and the arrows of every method."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cutlayer import algorithms
from cutlayer.models import build_model
from cutlayer.runtime.costs.metering import Costs, Meter, _a_batch_each, measure_costs
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.launching import launch
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.settings import RunConfig

Configure = Callable[..., RunConfig]
B = 20  # samples in a batch
LAYERS = [(64, 128), (128, 64), (64, 10)]  # of mlp on 8x8 digits


def _measured(configure: Configure, *given: str) -> Costs:
    return measure_costs(configure(f"batch_size={B}", *given))


def _parameters(*layers: tuple[int, int]) -> int:
    return sum(m * n + n for m, n in layers)


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (["adam"], lambda count, tensors: 2 * 4 * count + 4 * tensors),  # two moments, and a count for each tensor
        (["sgd"], lambda count, tensors: 0),
        (["sgd", "optimizer.momentum=0.9"], lambda count, tensors: 4 * count),
    ],
)
def test_a_perceptron_by_hand(configure: Configure, optimizer: list[str], kept: Callable[[int, int], int]) -> None:
    """FedAvg: the backward pass has two products a layer, and one in the first, whose input needs no gradient."""
    name, *more = optimizer
    found = _measured(configure, "algorithm=fed_avg", "local_epochs=3", f"optimizer={name}", *more)
    count = _parameters(*LAYERS)
    assert found.samples == B
    assert found.parameters == {"model": count}
    assert found.weights == found.gradients == 4 * count
    assert found.optimizer == kept(count, 2 * len(LAYERS))
    forward = sum(2 * B * m * n for m, n in LAYERS)
    assert found.forward_flops == forward
    assert found.backward_flops == 2 * forward - 2 * B * 64 * 128
    # Images, what both rectifiers give, log-probabilities; labels, and the number of samples that the mean is over.
    assert found.activations == 4 * B * (64 + 128 + 64 + 10) + 8 * B + 4
    assert found.memory == found.weights + found.gradients + found.optimizer + found.activations
    assert found.step == {"up": 0, "down": 0}
    assert found.round == {"up": 4 * count, "down": 4 * count}


def test_a_part_of_a_perceptron_by_hand(configure: Configure) -> None:
    """Split learning, cut after the first layer: the server's work is not the client's."""
    found = _measured(configure, "algorithm=sl_single_server")
    count = _parameters(LAYERS[0])
    assert found.parameters == {"client": count}
    assert found.weights == found.gradients == 4 * count
    assert found.forward_flops == found.backward_flops == 2 * B * 64 * 128
    assert found.activations == 4 * B * (64 + 128)
    assert found.step == {"up": 4 * B * 128 + 8 * B, "down": 4 * B * 128}
    assert found.round == {"up": 4 * count, "down": 4 * count}


def test_a_convolution_by_hand(configure: Configure) -> None:
    """cnn2 cut after its first pool: 32 kernels of 3x3 on 8x8 pixels, and the gradient of the weights alone."""
    found = _measured(configure, "algorithm=sl", "model=cnn2", "model.cut=pool1", "model.bottleneck=C2S2")
    conv, down = 2 * B * 64 * 9 * 32, 2 * B * 4 * 32 * 9 * 2
    assert found.parameters == {"client": 9 * 32 + 32 + 32 * 9 * 2 + 2}
    assert (found.forward_flops, found.backward_flops) == (conv + down, conv + 2 * down)
    assert found.step == {"up": 4 * B * 2 * 4 + 8 * B, "down": 4 * B * 2 * 4}


def test_operations_are_those_of_torchs_counter(configure: Configure) -> None:
    config = configure(f"batch_size={B}", "algorithm=fed_avg", "model=resnet20", "model.options.width=4")
    found, trial = measure_costs(config), Setup(config, None, _a_batch_each)
    model, x = build_model(config.model, trial.dataset.info), torch.zeros(B, *trial.dataset.info.shape)
    with FlopCounterMode(display=False) as forward:
        loss = model(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert (found.forward_flops, found.backward_flops) == (forward.get_total_flops(), backward.get_total_flops())


def test_batches_of_one_sample(configure: Configure) -> None:
    """Activations follow the batch, operations too; the model is not counted twice."""
    given = ("algorithm=sl_single_server", "model=resnet20", "model.options.width=4", "model.client_norm=group")
    one, two = (measure_costs(configure(*given, f"batch_size={size}")) for size in (1, 2))
    assert (one.samples, two.samples) == (1, 2)
    assert two.forward_flops == 2 * one.forward_flops
    assert one.weights == two.weights
    standardised = 4 * one.parameters["client"]  # what is kept of the weights does not grow with the batch
    assert 2 * one.activations - 8 * standardised < two.activations < 2 * one.activations


@pytest.mark.parametrize("name", algorithms.names())
def test_every_method_is_measured(configure: Configure, name: str) -> None:
    """What crosses is what its arrows say; of several clients the one with most data has the batch."""
    config = configure(f"batch_size={B}", f"algorithm={name}", "num_clients=2", "dataset.min_samples=0")
    found = measure_costs(config)
    trial = Setup(config, None, _a_batch_each)
    assert found.samples == trial.partition.sizes.max() == B
    alone = Setup(configure(f"batch_size={B}", f"algorithm={name}", "num_clients=1"), None, _a_batch_each)
    expected = expected_bytes(alone, range(1))
    for way in ("up", "down"):
        total = sum(size for (direction, _), size in expected.items() if direction == way)
        assert found.step[way] + found.round[way] == total
    assert sum(found.parameters.values()) > 0
    assert min(found.forward_flops, found.backward_flops) > 0
    assert 0 < found.gradients <= found.weights


def test_in_lockstep_one_of_two_clients_is_metered(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("algorithm=sl_multi_server", "num_clients=3")
    alone = _measured(configure, *given)
    monkeypatch.setattr(algorithms.get("sl_multi_server"), "schedule", "lockstep")
    assert _measured(configure, *given) == alone


def test_a_meter_sees_what_is_alive() -> None:
    """Two steps in turn keep what one keeps; a tensor and its view are one; without gradients nothing is kept."""
    layer = nn.Linear(5, 3)
    meter, x = Meter({"model": layer}), torch.randn(4, 5)
    with meter.working(), torch.no_grad():
        layer(x).exp()
    assert meter.activations == 0
    for _ in range(2):
        with meter.working():
            loss = F.relu(layer(x)).mul(x.view(-1)[0]).sum()
        with meter.working():
            loss.backward()
        # The input, which its view is a part of, and what the rectifier gives.
        assert meter.activations == 4 * (4 * 5 + 4 * 3)
        del loss
    assert meter.gradients == 4 * (5 * 3 + 3)
    assert (meter.operations.forward, meter.operations.backward) == (3 * 2 * 4 * 5 * 3, 2 * 2 * 4 * 5 * 3)
    with meter.working():
        kept = [layer(x).exp() for _ in range(2)]
    assert meter.activations == 4 * (4 * 5 + 2 * 4 * 3)
    assert len(kept) == 2


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def main() -> None:
        raise AssertionError("nothing is to run")

    saves = tmp_path / "saves"
    command = ["main.py", "model=mlp", "--costs", "algorithm=cse_fsl", f"save_dir={saves}"]
    for name in (launch.TRACEBACKS, launch.LAUNCHER, "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # to be put back afterwards
    for given, status in ((command, 0), ([*command, "model.cut=fc9"], 1)):
        monkeypatch.setattr("sys.argv", given)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        if status:
            with pytest.raises(SystemExit) as left:
                launch.launch(main)
            assert left.value.code == status
        else:
            launch.launch(main)
    shown = capsys.readouterr()
    assert shown.out.startswith("cse_fsl, mlp, digits: a client's step, 32 samples\n")
    assert "|   client          |    8,320 |" in shown.out
    assert len(shown.err.splitlines()) == 1
    assert not saves.exists()
