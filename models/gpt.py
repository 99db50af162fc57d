"""A small language model, GPT-2's architecture, for the texts of federated learning."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutlayer.models.layers import check_transformer
from cutlayer.models.registry import register

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_STD = 0.02  # of fresh weights
# What transformers calls the modules, and those of a block.
_MODULES = {
    "embedding.token": "transformer.wte",
    "embedding.position": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention": "attn.c_attn",
    "project": "attn.c_proj",
    "widen": "mlp.c_fc",
    "narrow": "mlp.c_proj",
}


class Embedding(nn.Module):
    """Tokens as vectors: int64 [b, l] -> [b, l, hidden], positions added; l is at most `length`."""

    def __init__(self, tokens: int, length: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, hidden), nn.Embedding(length, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.dropout(self.token(x) + self.position(places))


class CausalBlock(nn.Module):
    """A block of GPT-2, [b, l, hidden] -> same shape: attention to what came before, then a wider layer.

    Attention is of plain matrix products: torch's fused one has no second derivative, which gradient alignment needs.
    """

    def __init__(self, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self._heads, self._dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.project = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.widen, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.project(self._attend(self.norm1(x))))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh")))

    def _attend(self, x: Tensor) -> Tensor:
        b, length, hidden = x.shape
        q, k, v = (each.view(b, length, self._heads, -1).transpose(1, 2) for each in self.attention(x).chunk(3, 2))
        with sdpa_kernel(SDPBackend.MATH):
            found = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=self._dropout if self.training else 0.0
            )
        return found.transpose(1, 2).reshape(b, length, hidden)


@dataclass(frozen=True)
class GPTOptions:
    """`hidden`: width of a token; `heads`: of attention, a divisor of `hidden`; `depth`: blocks; `dropout`: its
    probability, in attention and everywhere else."""

    hidden: int = 128
    heads: int = 4
    depth: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_transformer(self, "hidden", "heads", "depth")


def gpt2(state: Mapping[str, Tensor], options: GPTOptions, info: DatasetInfo) -> Any:
    """transformers' `GPT2LMHeadModel` with copies of the weights of `gpt`; linear layers of blocks are transposed."""
    transformers = importlib.import_module("transformers")
    sizes = {"n_layer": options.depth, "n_embd": options.hidden, "n_head": options.heads}
    sizes |= {"vocab_size": info.outputs, "n_positions": info.length}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, tie_word_embeddings=False))
    names = {**_MODULES}
    for at in range(options.depth):
        names |= {f"block{at + 1}.{own}": f"transformer.h.{at}.{theirs}" for own, theirs in _BLOCK.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        turned = tensor.dim() == 2 and module.startswith("block")
        found[f"{names[module]}.{kind}"] = tensor.T if turned else tensor
    made.to(next(iter(found.values())).dtype).load_state_dict(found)
    return made


@register(
    "gpt",
    cut="block1",
    options=GPTOptions,
    cuts=lambda options: ("block1", f"block{options.depth}"),
    variants=({"depth": 1},),
    text=True,
    twin=gpt2,
)
def gpt(info: DatasetInfo, options: GPTOptions) -> nn.Sequential:
    """Radford et al. 2019: tokens, int64 [b, l], -> logits of the next token at each place, [b, l, tokens].

    For the same weights the outputs are those of transformers' `GPT2LMHeadModel` with an untied head. Weights start as
    there: normal with deviation 0.02, in the layers that end a branch divided by the root of twice the depth.
    """
    children: list[tuple[str, nn.Module]] = [
        ("embedding", Embedding(info.outputs, info.length, options.hidden, options.dropout))
    ]
    blocks = [CausalBlock(options.heads, options.hidden, options.dropout) for _ in range(options.depth)]
    children += [(f"block{i}", block) for i, block in enumerate(blocks, start=1)]
    children += [("norm", nn.LayerNorm(options.hidden)), ("head", nn.Linear(options.hidden, info.outputs, bias=False))]
    model = nn.Sequential(OrderedDict(children))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in blocks:
        for layer in (block.project, block.narrow):
            nn.init.normal_(layer.weight, std=_STD / (2 * options.depth) ** 0.5)
    return model
