"""A test's accuracy and loss against a plain loop, in each precision, on all samples or on some, in any batches."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.scoring.scores import _order, evaluate, evaluating, spread
from tests.algorithms.drawing import seed_of

NORMED = ("model=import/tests.contract.elsewhere.Net", "model.cut=norm", "num_clients=2")


@pytest.fixture(scope="module")
def trained(configure) -> Federation:
    """A model with running statistics, after two rounds."""
    federation = Federation(configure(*NORMED, "algorithm=sl_single_server", "lr=0.01"))
    federation.step()
    federation.step()
    return federation


def everything(federation: Federation) -> tuple[torch.Tensor, torch.Tensor]:
    source = federation.setup.dataset.test
    ((x, y),) = source.batches(torch.arange(len(source)), batch_size=len(source))
    return x, y


def parts(federation: Federation) -> list[nn.Module]:
    return [federation.learnt.held[name] for name in ("client", "server")]


@pytest.mark.parametrize("size", [1, 7, 119, 120, 359, 360, 1000])
def test_losses_and_hits_in_the_order_of_the_samples(trained: Federation, size: int) -> None:
    x, y = everything(trained)
    whole = nn.Sequential(*parts(trained))
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[:121]
    for samples in (None, chosen):
        found = evaluate(
            parts(trained), trained.setup.dataset.test, trained.setup.blueprint, batch_size=size, samples=samples
        )
        index = torch.arange(len(y)) if samples is None else samples
        whole.eval()
        with torch.no_grad():
            logits = whole(x)[index]
        whole.train()
        torch.testing.assert_close(found.losses, F.cross_entropy(logits, y[index], reduction="none").double())
        assert torch.equal(found.right.bool(), logits.argmax(1) == y[index])
        assert torch.equal(found.predicted, logits.argmax(1))
        assert torch.equal(found.labels, y[index])
        assert found.both == (float(found.right.sum()) / len(index), float(found.losses.sum()) / len(index))


@pytest.mark.parametrize("size", [90, 100])  # in four batches of equal size either way
def test_batches_statistics_are_those_of_nearly_equal_mixed_batches(trained: Federation, size: int) -> None:
    x, y = everything(trained)
    whole = nn.Sequential(*parts(trained))
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    found = evaluate(parts(trained), trained.setup.dataset.test, trained.setup.blueprint, batch_size=size,
                     batch_statistics=[True, True])  # fmt: skip
    order = _order(len(y), mixed=True)
    seed = seed_of(0, -1, -1, "test order")
    assert torch.equal(order, torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)))
    assert not torch.equal(order, torch.arange(len(y)))
    losses = torch.zeros(len(y))
    with torch.no_grad():
        for batch in order.split(90):
            losses[batch] = F.cross_entropy(whole(x[batch]), y[batch], reduction="none")  # in training mode
    torch.testing.assert_close(found.losses, losses.double())
    whole.load_state_dict(before)
    again = evaluate(parts(trained), trained.setup.dataset.test, trained.setup.blueprint, batch_size=size)
    assert not torch.allclose(again.losses, found.losses), "running statistics are others"


def test_the_statistics_of_one_part_alone(trained: Federation) -> None:
    """And modules are left as they were, in their mode and with their statistics, whatever happens in between."""
    client, server = parts(trained)
    norm = next(module for module in client.modules() if isinstance(module, nn.BatchNorm2d))
    statistics = norm.running_mean, norm.running_var
    server.eval()
    with contextlib.suppress(KeyError), evaluating([client, server], batch_statistics=[True, False]):
        assert norm.running_mean is None
        assert norm.running_var is None
        assert not client.training
        raise KeyError
    assert (norm.running_mean, norm.running_var) == statistics
    assert client.training
    assert not server.training
    server.train()
    with evaluating([client, server], batch_statistics=[False, True]):
        assert norm.running_mean is statistics[0]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)]
)
def test_a_test_computes_in_the_run_s_precision(configure, precision: str, dtype: torch.dtype) -> None:
    """Bits of a forward pass in it, and a loss in float32 or wider."""
    federation = Federation(configure("algorithm=fed_avg", "num_clients=2", "lr=0.01", f"precision={precision}"))
    federation.step()
    (model,) = federation.learnt.held.values()
    seen: set[torch.dtype] = set()
    hook = model[-1].register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    found = evaluate([model], federation.setup.dataset.test, federation.setup.blueprint, batch_size=360)
    hook.remove()
    assert seen == {dtype}
    x, y = everything(federation)
    wide = torch.float64 if precision == "fp64" else torch.float32
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=precision == "bf16"):
        logits = model(x).to(wide)
    losses = F.cross_entropy(logits, y, reduction="none")
    assert losses.dtype == wide
    assert torch.equal(found.losses, losses.double())
    with torch.no_grad():
        exact = F.cross_entropy(model.double()(x.double()), y, reduction="none")
    assert torch.allclose(found.losses, exact, rtol=1e-3, atol=1e-4) == (precision != "bf16"), "it makes a difference"


@pytest.mark.parametrize("count", [1, 9, 10, 19, 20, 25])
def test_spread_over_clients_by_hand(count: int) -> None:
    values = [((7 * i) % count) / count for i in range(count)]
    mean = sum(values) / count
    worst = sorted(values)[: max(1, count // 10)]
    expected = {
        "mean": mean,
        "std": (sum((value - mean) ** 2 for value in values) / count) ** 0.5,
        "worst_decile": sum(worst) / len(worst),
    }
    assert spread(values) == pytest.approx(expected, abs=1e-12)
