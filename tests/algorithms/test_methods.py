"""What is particular to a method: its equations against worked cases, finite differences and invariants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutlayer.algorithms.alignment import frozen, input_gradient
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same, weights

SAGE = ("algorithm=fsl_sage", "algorithm.align_epochs=3")


def model(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7) if norm else nn.Identity(), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def test_input_gradient_against_finite_differences() -> None:
    net, z, y = model(), torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    gradient, h = input_gradient(net, z, y), 1e-6
    for i in range(4):
        for j in range(5):
            step = torch.zeros_like(z)
            step[i, j] = h
            slope = (F.cross_entropy(net(z + step), y) - F.cross_entropy(net(z - step), y)) / (2 * h)
            assert gradient[i, j].item() == pytest.approx(slope.item(), abs=1e-8)


def test_alignment_loss_is_differentiated_through_the_gradient() -> None:
    """The derivative of ||estimate - target||^2 by the auxiliary weights, against finite differences."""
    net, z, y = model(), torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    target = torch.randn(4, 5, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (input_gradient(net, z, y, differentiable=True) - target).square().sum()

    parameters = list(net.parameters())
    exact = torch.autograd.grad(loss(), parameters)
    for parameter, derivative in zip(parameters, exact, strict=True):
        index = (0,) * parameter.dim()
        values = []
        for step in (1e-6, -2e-6):
            parameter.data[index] += step
            values.append(loss().item())
        parameter.data[index] += 1e-6
        above, below = values
        assert derivative[index].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-8)


def test_frozen_computes_in_training_mode_and_writes_nothing() -> None:
    net, z = model(norm=True), torch.randn(6, 5, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    output = frozen(net)(z)
    assert same(before, dict(net.state_dict()))
    assert torch.equal(output, net(z)), "the batch's own statistics, as in training"
    assert not same(before, dict(net.state_dict())), "the model itself does count them"


def test_every_alignment_lowers_its_error(configure) -> None:
    federation = Federation(configure(*SAGE, "rounds=6", "algorithm.align_interval=2", "algorithm.align_epochs=30"))
    while not federation.done:
        record, _ = federation.step()
        aligned = "align/error_before" in record.metrics
        assert aligned == ((record.round - 1) % 2 == 0)
        if aligned:
            assert record.metrics["align/error_after"] < record.metrics["align/error_before"]


def test_full_copy_of_the_server_as_auxiliary_has_no_error_to_lower(configure) -> None:
    """An auxiliary model equal to the server estimates the true gradient: FSL-SAGE's client step is SplitFed's."""
    federation = Federation(configure(*SAGE, "model.auxiliary=full", "optimizer=sgd", "precision=fp64"))
    server = federation.server.ctx
    server.parts["auxiliary"].load_state_dict(server.parts["server"].state_dict())
    z, y = torch.randn(8, 128, dtype=torch.float64), torch.randint(0, 10, (8,))
    server.store.put(0, "buffer", {"z": z, "y": y})
    federation.server.on_align(0, {})
    assert server.means.read()["align/error_before"] == pytest.approx(0, abs=1e-25)


def test_buffer_keeps_the_newest_samples(configure) -> None:
    federation = Federation(configure(*SAGE, "algorithm.buffer_size=50", "algorithm.upload_interval=1"))
    sent: dict[int, list[torch.Tensor]] = {}
    original = federation.server.on_smashed

    def watch(client, message):
        sent.setdefault(client, []).append(message["z"].clone())
        return original(client, message)

    federation.server.on_smashed = watch
    federation.step()
    for client, pieces in sent.items():
        kept = federation.stores["server"].get(client, "buffer")
        assert torch.equal(kept["z"], torch.cat(pieces)[-50:])


def test_auxiliary_is_kept_by_the_client_between_alignments(configure) -> None:
    federation = Federation(configure(*SAGE, "rounds=3", "algorithm.align_interval=2"))
    federation.step()
    first = [federation.stores["clients"].get(client, "auxiliary") for client in range(4)]
    assert all(row is not None for row in first)
    assert not same(first[0], first[1]), "each client's is fitted to its own data"
    federation.step()
    second = [federation.stores["clients"].get(client, "auxiliary") for client in range(4)]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    federation.step()
    assert not same(first[0], federation.stores["clients"].get(0, "auxiliary"))


def test_warm_start_is_one_round_of_cse_fsl(configure) -> None:
    setting = ("rounds=1", "batch_size=50")
    warm = play(Federation(configure(*SAGE, "algorithm.warm_start=true", *setting)))
    cse = play(Federation(configure("algorithm=cse_fsl", *setting)))
    for part in ("client", "server", "auxiliary"):
        assert same(dict(warm.server.ctx.part(part).state_dict()), dict(cse.server.ctx.part(part).state_dict()))
    assert warm.ledger.state_dict() == cse.ledger.state_dict()
    record, _ = Federation(configure(*SAGE, "algorithm.warm_start=true", *setting)).step()
    assert "align/error_before" not in record.metrics
    assert warm.stores["server"].get(0, "buffer") is None, "what is kept for alignments begins with the second round"


def test_cse_fsl_client_does_not_depend_on_the_server(configure) -> None:
    """Nothing comes down within a round: other uploads change the server's part only."""
    often = play(Federation(configure("algorithm=cse_fsl", "algorithm.upload_interval=1", "batch_size=50")))
    seldom = play(Federation(configure("algorithm=cse_fsl", "algorithm.upload_interval=7", "batch_size=50")))
    for part in ("client", "auxiliary"):
        assert same(dict(often.server.ctx.part(part).state_dict()), dict(seldom.server.ctx.part(part).state_dict()))
    assert not same(*(dict(f.server.ctx.part("server").state_dict()) for f in (often, seldom)))


def test_scaffold_control_variate_is_the_mean_of_the_clients(configure) -> None:
    """With everybody in each round, c stays the mean of all c_i (Karimireddy et al., equation 5)."""
    federation = play(Federation(configure("algorithm=scaffold", "lr=0.1", "precision=fp64", "rounds=3")))
    rows = [federation.stores["clients"].get(client, "control") for client in range(4)]
    for name, c in federation.server._control.items():
        assert torch.allclose(c, torch.stack([row[name] for row in rows]).mean(0), atol=1e-12)
        assert c.abs().max() > 0


def test_scaffold_second_option_is_the_mean_gradient(configure) -> None:
    """With c = c_i = 0, c_i becomes (x - y_i) / (K lr): the mean of the K gradients of plain SGD."""
    federation = Federation(configure("algorithm=scaffold", "lr=0.1", "precision=fp64", "rounds=1", "num_clients=1"))
    start = {name: w.clone() for name, w in federation.server.ctx.part("model").named_parameters()}
    steps = len(list(federation.setup.data(0).batches(torch.Generator().manual_seed(0))))
    play(federation)
    row = federation.stores["clients"].get(0, "control")
    for name, w in federation.server.ctx.part("model").named_parameters():
        assert torch.allclose(row[name], (start[name] - w) / (steps * 0.1), atol=1e-12)


def test_fed_prox_pulls_towards_the_global_model(configure) -> None:
    def distance(mu: float) -> float:
        federation = Federation(
            configure("algorithm=fed_prox", f"algorithm.mu={mu}", "optimizer=sgd", "lr=0.05", "rounds=1")
        )
        start = weights(federation)
        play(federation)
        return sum(float((value - start[key]).square().sum()) for key, value in weights(federation).items())

    distances = [distance(mu) for mu in (0.0, 1.0, 10.0)]
    assert distances[0] > distances[1] > distances[2] > 0
    assert same(
        weights(play(Federation(configure("algorithm=fed_prox", "algorithm.mu=0.0")))),
        weights(play(Federation(configure("algorithm=fed_avg")))),
    )


def test_split_learning_hands_the_client_model_on(configure) -> None:
    """Each client starts from what the one before it left, not from an average."""
    federation = Federation(configure("algorithm=sl", "rounds=1"))
    ups, copies = [], []
    original_down, original_absorb = federation.server.down, federation.server.absorb
    federation.server.absorb = lambda client, upload: ups.append(dict(upload.fields)) or original_absorb(client, upload)
    federation.server.down = lambda client: (
        copies.append({k: v.clone() for k, v in original_down(client).items()}) or original_down(client)
    )
    federation.step()
    assert len(copies) == len(ups) == 4
    for uploaded, following in zip(ups[:-1], copies[1:], strict=True):
        assert same(uploaded, following)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("algorithm=cse_fsl", "algorithm.upload_interval=0"), "algorithm.upload_interval=0: expected an integer >= 1"),
        (("algorithm=fed_prox", "algorithm.mu=-1"), "algorithm.mu=-1: expected a number >= 0"),
        (("algorithm=fsl_sage", "algorithm.buffer_size=0"), "algorithm.buffer_size=0"),
    ],
)
def test_bad_values_are_one_line(configure, overrides, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    assert message in str(caught.value).replace("-1.0", "-1")


def test_bf16_halves_the_smashed_bytes(configure) -> None:
    full = play(Federation(configure("algorithm=sl_single_server", "rounds=1")))
    half = play(Federation(configure("algorithm=sl_single_server", "rounds=1", "precision=bf16")))

    def smashed(federation: Federation) -> int:
        return sum(c.payload for _, kind, field, c in federation.ledger.totals() if kind == "smashed" and field != "y")

    assert smashed(half) * 2 == smashed(full)


@pytest.mark.parametrize("buffers", ["average", "keep_local", "reset"])
def test_buffer_policies(configure, buffers: str) -> None:
    federation = Federation(
        configure(
            "algorithm=fed_avg",
            "model=resnet20",
            "model.options.width=2",
            f"aggregate.buffers={buffers}",
            "eval_interval=1",
        )
    )
    initial = federation.setup.blueprint.initial["model"]
    record, _ = federation.step()
    travels = any(name.endswith("running_mean") for name in federation.server.down(0))
    moved = {
        name: not torch.equal(tensor, initial[name])
        for name, tensor in federation.server.ctx.part("model").state_dict().items()
        if name.endswith("running_mean")
    }
    assert travels == (buffers == "average")
    assert all(moved.values()) if buffers == "average" else not any(moved.values())
    kept = federation.stores["clients"].get(0, "model.buffers")
    assert (kept is not None) == (buffers == "keep_local")
    assert record.test_loss is not None
    assert record.test_loss < 10


def test_without_shared_statistics_the_order_of_the_test_set_does_not_matter(configure) -> None:
    """Test sets are often sorted by class; a batch of one class has other statistics than a mixed one."""
    setting = ("model=resnet20", "model.options.width=4", "aggregate.buffers=reset", "eval_batch_size=36", "rounds=4")
    federation = play(Federation(configure("algorithm=fed_avg", *setting, "batch_size=32", "local_epochs=2")))
    mixed = federation.evaluate().accuracy
    source = federation.setup.dataset.test
    order = source.labels.argsort()
    source.labels = source.targets = source.labels[order]
    source._store._images = source._store._images[order]
    by_class = federation.evaluate().accuracy
    assert mixed > 0.6
    assert by_class == pytest.approx(mixed, abs=0.08)


def test_validation_is_reported_for_clients_models_too(configure) -> None:
    federation = Federation(configure("algorithm=local_only", "dataset.validation=0.2", "eval_interval=1"))
    record, _ = federation.step()
    assert 0 <= record.metrics["val_acc"] <= 1
    assert record.metrics["val_loss"] > 0


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimizer=adam", "optimizer.name=adam: expected what scaffold is defined for (choices: sgd)"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9: expected 0, as scaffold is defined for"),
    ],
)
def test_scaffold_refuses_what_its_second_option_does_not_hold_for(configure, override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Federation(configure("algorithm=scaffold", override))
    assert str(caught.value) == reason
