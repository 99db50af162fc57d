"""U-shaped SplitFed against pooled training, FSMKD without distillation, and what crosses."""

import pytest
import torch

from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.test_fsmkd import leaks
from tests.conftest import play, weights

SETTING = ("optimizer=sgd", "lr=0.1", "precision=fp64", "local_epochs=2", "rounds=3")
TEXT = (
    *("dataset=shakespeare", "dataset.options.length=16", "dataset.fraction=0.01", "dataset.distribution=iid"),
    *("model=gpt", "model.options={hidden:8,heads:2,depth:3}"),
)


@pytest.mark.parametrize("data", [(), TEXT], ids=["images", "text"])
def test_with_one_client_it_is_pooled_training(configure, data: tuple[str, ...]) -> None:
    both = [
        weights(play(Federation(configure(f"algorithm={name}", *SETTING, *data, "num_clients=1"))))
        for name in ("sl_u_shape", "centralized")
    ]
    split, pooled = ({name.rpartition("/")[2]: tensor for name, tensor in each.items()} for each in both)
    assert split.keys() == pooled.keys()
    for name, tensor in split.items():
        assert torch.allclose(tensor, pooled[name], rtol=1e-9, atol=1e-12), name


def test_it_is_the_global_path_of_fsmkd_without_distillation(configure) -> None:
    alone = weights(play(Federation(configure("algorithm=sl_u_shape", *SETTING))))
    mutual = weights(play(Federation(configure("algorithm=fsmkd", "algorithm.distillation_weight=0", *SETTING))))
    assert {*alone} <= {*mutual}
    assert all(torch.equal(tensor, mutual[name]) for name, tensor in alone.items())


@pytest.mark.parametrize("data", [(), TEXT], ids=["images", "text"])
def test_neither_labels_nor_tokens_leave_the_client(configure, monkeypatch, data: tuple[str, ...]) -> None:
    assert leaks(Federation(configure("algorithm=sl_u_shape", *data)), monkeypatch) == set()
    found = leaks(Federation(configure("algorithm=sl_single_server", *data)), monkeypatch)
    assert found == {"smashed/y"}, "the test sees them where they cross"
