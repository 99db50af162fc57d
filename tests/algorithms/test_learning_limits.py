"""Limits of the keys of distilling, contrastive and resisting methods at their edges, and the pieces of contrast."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.algorithms.contrastive import Queue, info_nce, unit
from cutlayer.algorithms.fl_moco import FLMocoConfig
from cutlayer.algorithms.fsmkd import FSMKDConfig
from cutlayer.algorithms.moco_sfl import MocoSFL, MocoSFLConfig
from cutlayer.algorithms.ressfl import ResSFLConfig
from cutlayer.runtime.ground.config import ConfigError

INF = float("inf")
POSITIVE, COUNT = "a finite number > 0", "an integer >= 1"
SHARE, MOMENTUM = "a number >= 0 and <= 1", "a number >= 0 and < 1"
RICH = {"rich_batch_size": 1}

# Key, what else is set, what is allowed up to the edge, what is refused from there on, and what was expected.
LIMITS: list[tuple[type[Any], str, dict[str, Any], list[float], list[float], str]] = [
    (FSMKDConfig, "temperature", {}, [1e-9, 1.0, 1e300], [0.0, -1.0, INF], POSITIVE),
    (FSMKDConfig, "distillation_weight", {}, [0.0, 1e300], [-1e-9, INF], "a finite number >= 0"),
    (FSMKDConfig, "aggregate_interval", {}, [1, 2], [0, -1], COUNT),
    (FLMocoConfig, "temperature", {}, [1e-9, 1.0, 1e300], [0.0, -1.0, INF], POSITIVE),
    (FLMocoConfig, "momentum", {}, [0.0, 1 - 1e-9], [-1e-9, 1.0], MOMENTUM),
    (FLMocoConfig, "queue", {}, [1, 2], [0, -1], COUNT),
    (MocoSFLConfig, "temperature", {}, [1e-9, 1.0, 1e300], [0.0, -1.0, INF], POSITIVE),
    *((MocoSFLConfig, key, {}, [0.0, 1 - 1e-9], [-1e-9, 1.0], MOMENTUM) for key in ("momentum", "client_momentum")),
    *(
        (MocoSFLConfig, key, {}, [1, 2], [0, -1], COUNT)
        for key in ("queue", "local_steps", "loss_interval", "stored_steps")
    ),
    (MocoSFLConfig, "rich_share", RICH, [0.0, 1e-9, 1.0], [-1e-9, 1 + 1e-9], SHARE),
    (MocoSFLConfig, "rich_batch_size", {"rich_share": 0.5}, [1, 2], [0], f"{COUNT}, where rich_share is above 0"),
    (ResSFLConfig, "alpha", {}, [0.0, 1e300], [-1e-9, INF], "a number >= 0"),
    (ResSFLConfig, "target_ssim", {}, [-1.0, 0.0, 1.0], [-1 - 1e-9, 1 + 1e-9, INF], "a number from -1 to 1"),
    (ResSFLConfig, "attacker_lr", {}, [1e-9, 1.0, 1e300], [0.0, -1.0, INF], POSITIVE),
    (ResSFLConfig, "attacker_width", {}, [1, 2], [0, -1], COUNT),
]


@pytest.mark.parametrize(
    ("config", "key", "others", "allowed", "refused", "expected"),
    LIMITS,
    ids=[f"{config.__name__}-{key}" for config, key, *_ in LIMITS],
)
def test_limits_at_their_edges(
    config: type[Any], key: str, others: dict[str, Any], allowed: list[float], refused: list[float], expected: str
) -> None:
    for value in allowed:
        assert getattr(config(**{key: value}, **others), key) == value
    for value in refused:
        with pytest.raises(ConfigError) as caught:
            config(**{key: value}, **others)
        assert (caught.value.key, caught.value.value, caught.value.expected) == (key, value, expected)


def test_a_batch_size_of_the_rich_is_asked_for_where_there_are_some() -> None:
    assert MocoSFLConfig(rich_share=0.0, rich_batch_size=None).rich_batch_size is None
    with pytest.raises(ConfigError, match="rich_batch_size=null"):
        MocoSFLConfig(rich_share=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_features_have_length_one_in_the_precision_of_a_weight(given: torch.dtype, kind: torch.dtype) -> None:
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(given)
    found = unit(z, torch.zeros(1, dtype=kind))
    assert found.dtype == kind
    exact = z.double() / z.double().square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(found.double(), exact, atol=1e-6 if kind == torch.float32 else 1e-14, rtol=0)


def test_keys_and_losses_are_where_the_features_are() -> None:
    """A device of its own kind refuses what is on another: as a GPU would, with no GPU."""
    meta = torch.device("meta")
    query = torch.zeros(4, 3, dtype=torch.float64, device=meta)
    for lines in (1, 2):
        queue = Queue(torch.randn(lines, 5, 3))
        queue.move(query)
        assert (queue.keys.device, queue.keys.dtype, queue.keys.shape) == (meta, torch.float64, (lines, 5, 3))
    assert info_nce(query, query, query, 0.2).device == meta


@given(
    sizes=st.lists(st.integers(1, 9), max_size=5), clients=st.integers(1, 8), rich=st.integers(0, 8),
    size=st.integers(1, 40), steps=st.integers(1, 4),
)  # fmt: skip
def test_batches_of_rich_and_other_clients(sizes: list[int], clients: int, rich: int, size: int, steps: int) -> None:
    rich = min(rich, clients)
    config = MocoSFLConfig(rich_share=rich / clients, rich_batch_size=size, local_steps=steps)
    for client in range(clients):
        wanted = size if client < rich else max([0, *sizes])
        assert MocoSFL.steps(config, client, clients, sizes) == [min(wanted, sum(sizes))] * steps
