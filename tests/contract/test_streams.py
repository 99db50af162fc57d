"""Random numbers within the parties' programs: no client draws another's, nor its own or the server's ones again."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer import algorithms
from cutlayer.runtime.ground import rng
from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.drawing import seed_of

# Dropout in every part that the model is cut into, one batch a client.
SETTING = (
    *("model=vit", "model.options.depth=4", "model.options.hidden=8", "model.options.heads=2", "model.options.mlp=8"),
    *("model.options.dropout=0.5", "dataset=synthetic", "dataset.options.n_train=60", "dataset.options.n_test=20"),
    *("dataset.options.height=8", "dataset.options.width=8", "dataset.shuffle=false"),
    *("num_clients=2", "rounds=2", "batch_size=30", "eval_interval=2"),
)
MORE = {
    "fsl_sage": ("algorithm.align_epochs=1", "algorithm.align_interval=1"),
    "moco_sfl": ("algorithm.queue=64",),
    "fl_moco": ("algorithm.queue=64",),
    "ressfl": ("algorithm.attacker_width=4",),
}


@pytest.mark.parametrize("name", algorithms.names())
def test_no_mask_is_drawn_twice(configure, monkeypatch, name: str) -> None:
    masks: list[bytes] = []
    dropout = torch.nn.functional.dropout

    def recorded(x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        kept = dropout(torch.ones_like(x), p, True, False)
        assert kept.numel() > 200, "too many for two masks to be alike by chance"
        masks.append(hashlib.blake2b((kept > 0).numpy().tobytes()).digest())
        return x * kept

    federation = Federation(configure(*SETTING, f"algorithm={name}", *MORE.get(name, ())))
    clients = federation.setup.population
    monkeypatch.setattr(torch.nn.functional, "dropout", recorded)
    federation.step()
    first = len(masks)
    assert first >= clients
    federation.step()
    assert len(masks) > first
    assert len(set(masks)) == len(masks)


@given(st.integers(0, 2**63 - 1), st.integers(-1, 10**6), st.integers(-1, 10**6), st.text(max_size=9))
def test_the_seed_of_a_stream_is_the_documented_one(seed: int, round: int, client: int, stream: str) -> None:
    stream = stream.encode("utf-8", "ignore").decode()
    expected = seed_of(seed, round, client, stream)
    assert rng.derive(seed, round=round, client=client, stream=stream) == expected
    drawn = rng.torch_generator(seed, round=round, client=client, stream=stream).initial_seed()
    assert drawn == expected < 2**63
    assert rng.derive(seed, stream=stream) == seed_of(seed, -1, -1, stream)
