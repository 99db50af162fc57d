"""What holds for every registered algorithm on text: it learns, counts its bytes and repeats its bits, or refuses."""

import math

import pytest

from cutlayer import algorithms
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same, weights
from tests.contract.test_contract import quick

NAMES = algorithms.names()
TEXT = (
    *("dataset=shakespeare", "dataset.options.length=32", "dataset.fraction=0.02", "dataset.distribution=iid"),
    *("model=gpt", "model.options={hidden:16,heads:2,depth:3}", "batch_size=8", "num_clients=3"),
)


def settings(name: str) -> tuple[str, ...]:
    plain = ("dataset.augment=none",) if name in ("moco_sfl", "fl_moco") else ()
    return (f"algorithm={name}", *quick(name), *TEXT, *plain)


def takes_text(name: str) -> bool:
    tasks = algorithms.get(name).tasks
    return tasks is None or "causal_lm" in tasks


@pytest.mark.parametrize("name", NAMES)
def test_a_method_learns_text_counts_its_bytes_and_repeats_its_bits_or_refuses(configure, name: str) -> None:
    if not takes_text(name):
        with pytest.raises(ConfigError, match=f"algorithm={name}: expected another for shakespeare, whose task is"):
            Federation(configure(*settings(name)))
        return
    scale = ("optimizer=sgd", "lr=0.3") if name == "scaffold" else ("lr=0.01",)
    first, second = (
        play(Federation(configure(*settings(name), *scale, "eval_interval=1", "rounds=2"))) for _ in range(2)
    )
    assert same(weights(first), weights(second))
    measured: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in first.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[direction, kind] = measured.get((direction, kind), 0) + count.payload
    assert measured == expected_bytes(first.setup, range(2))
    federation = Federation(configure(*settings(name), *scale, "eval_interval=1", "rounds=2"))
    begun = federation.evaluate()
    losses = [federation.step()[0].test_loss for _ in range(2)]
    assert begun.loss == pytest.approx(math.log(257), abs=0.2), "it begins as a guess among all tokens"
    assert losses[-1] is not None
    assert losses[-1] < begun.loss - 0.1


@pytest.mark.parametrize("name", ["fed_avg", "cse_fsl", "fsl_sage", "sl_multi_server"])
def test_clients_computed_as_one_have_the_loops_results_and_bytes(configure, name: str) -> None:
    setting = (*settings(name), "optimizer=sgd", "lr=0.1", "precision=fp64", "rounds=2")
    loop, one = (play(Federation(configure(*setting, f"cohort.together={each}"))) for each in ("never", 3))
    for key, tensor in weights(loop).items():
        assert tensor.allclose(weights(one)[key], rtol=1e-8, atol=1e-10), key
    assert sorted(loop.ledger.totals()) == sorted(one.ledger.totals())


@pytest.mark.parametrize("model", ["cnn2", "mlp", "resnet18", "torchvision/resnet18"])
def test_a_model_of_images_refuses_text(configure, model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Federation(configure("algorithm=fed_avg", *TEXT, f"model={model}", "model.options={}"))
    assert "model" in str(caught.value).split(":")[0]
    assert "\n" not in str(caught.value)


def test_a_model_of_text_refuses_images(configure) -> None:
    with pytest.raises(ConfigError, match="model.name=gpt: expected a model that takes images, of which digits is"):
        Federation(configure("algorithm=fed_avg", "model=gpt"))


def test_every_role_is_a_client(configure) -> None:
    config = configure(
        "algorithm=fed_avg", *TEXT, "dataset.distribution=natural", "dataset.fraction=1", "num_clients=12"
    )
    federation = Federation(config)
    groups = federation.setup.dataset.groups
    assert groups is not None
    partition = federation.setup.partition
    of = [{*groups[partition.indices(client).numpy()]} for client in range(12)]
    assert all(not one & other for i, one in enumerate(of) for other in of[:i]), "no role is at two clients"
