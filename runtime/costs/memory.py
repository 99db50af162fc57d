"""What a client part takes of a client's memory, worked out from shapes: nothing is computed, weights are looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cutlayer.models.shapes import KnownIntegers, sample
from cutlayer.runtime.costs.meter import Meter, frozen_bytes
from cutlayer.runtime.ground import rng
from cutlayer.runtime.parties.blueprint import state_bytes
from cutlayer.runtime.parties.optim import kept_bytes
from cutlayer.runtime.rounds.setup import Setup

_CLIENT = "client"
_fused_attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class AsOnAProcessor(TorchFunctionMode):
    """In the block attention on the meta device is the operation that a processor has, which keeps no b x l x l."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `F.scaled_dot_product_attention` gives; torch itself is asked where a processor has no such operation."""
    alike = query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    fused = torch.backends.cuda.flash_sdp_enabled() and not dropout_p  # what `sdpa_kernel` says on a processor too
    if not (query.is_meta and alike and fused) or (attn_mask is not None and attn_mask.requires_grad):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _fused_attention(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def client_memory(setup: Setup) -> int:
    """Bytes of the client part while it trains: weights, gradients, the optimizer's state, and what is kept of a batch.

    The batch is the client's with the most data; the weights are those of the part as it is, frozen ones too.
    """
    config, blueprint = setup.config, setup.blueprint
    part = blueprint.parts([_CLIENT])[_CLIENT]
    learning = [weight for weight in part.parameters() if weight.requires_grad]
    weights = state_bytes(part.state_dict()) + frozen_bytes({_CLIENT: part})
    gradients = sum(weight.nbytes for weight in learning)
    samples = min(config.batch_size, int(setup.partition.sizes.max()))
    return (
        weights + gradients + kept_bytes(config.optimizer_for(_CLIENT), learning) + _activations(setup, part, samples)
    )


def _activations(setup: Setup, part: nn.Module, samples: int) -> int:
    """Bytes that a pass of a batch keeps for a backward pass."""
    halved = setup.config.precision == "bf16"  # of which there is none on the meta device
    device = torch.device("cpu" if halved else "meta")
    meter = Meter({_CLIENT: part.to(device)})
    with KnownIntegers(), AsOnAProcessor(), rng.TorchStream(0, device), meter.working(), setup.blueprint.autocast():
        x = sample(setup.dataset.info.shape, samples, dtype=setup.blueprint.dtype, device=device)
        output = part(x)
    found = meter.activations
    del output
    return found
