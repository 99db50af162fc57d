"""Alignment: the gradient of smashed data that an auxiliary model gives is fitted to the one that another gives.

The error of a batch is ||g(w) - t||^2, summed: g(w) is the gradient of the mean cross-entropy with respect to the
smashed data z, t the gradient to be met. Its own gradient is that of <g(w), v> where v = 2 (g(w) - t) is held fixed: a
backward pass through the graph of g, from v to the weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutlayer.tasks import Loss


def input_gradient(
    model: nn.Module | Any, z: Tensor, y: Tensor, loss: Loss = F.cross_entropy, *, differentiable: bool = False
) -> Tensor:
    """The gradient of the batch's mean loss with respect to the smashed data: same shape as ``z``.

    Where it is differentiated again, attention is computed step by step: its fused kernels have no second derivative.
    """
    z = z.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
        output = model(z)
    return torch.autograd.grad(loss(output, y), z, create_graph=differentiable)[0]


def frozen(model: nn.Module) -> Any:
    """The model as a function that computes in its present mode and leaves its running statistics untouched."""

    def call(z: Tensor) -> Tensor:
        state = {**dict(model.named_parameters()), **{name: b.clone() for name, b in model.named_buffers()}}
        return functional_call(model, {name: value.detach() for name, value in state.items()}, (z,))

    return call


class AlignmentBatch:
    """A batch of smashed data, and the gradient of it that an auxiliary model is to give.

    Args:
        model: the auxiliary model, which learns: z -> the model's output [b, ...].
        z: smashed data [b, ...]. y: targets [b, ...]. target: the gradient to be met, of the shape of ``z``.
        loss: of output and targets, of which it is the gradient.
    """

    def __init__(self, model: nn.Module, z: Tensor, y: Tensor, target: Tensor, loss: Loss = F.cross_entropy) -> None:
        self.model, self.z, self.y, self.target, self.loss = model, z, y, target, loss

    def error(self) -> Tensor:
        """The squared distance of the model's gradient from the target, summed; the model is left as it is."""
        return (input_gradient(frozen(self.model), self.z, self.y, self.loss) - self.target).square().sum()

    def differentiate(self) -> None:
        """Put the gradient of the error into the ``grad`` of the model's weights, in place of what was there."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        estimate = input_gradient(self.model, self.z, self.y, self.loss, differentiable=True)
        along = (estimate.detach() - self.target).mul_(2)
        # To the weights alone: none of z, which `backward` would compute too.
        slopes = torch.autograd.grad(estimate, weights, along, allow_unused=True)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope


class LinearAlignmentBatch(AlignmentBatch):
    """The same for cross-entropy and one linear layer as the model, logits = W z + c: in closed form, without a graph.

    Of the softmax P [classes, b] and the one-hot labels Y, let R = Y - P; then g = -R^T W / b, a matrix [b, features]
    that is never made::

        U = -W W^T R / b - W t^T      b / 2 times the error's gradient with respect to P
        V = P * U - P * sum(P * U)    b / 2 times that with respect to the logits; the sum is over classes
        dW = 2 / b (V z + R t) + 2 / b^2 R R^T W,   dc = 2 / b sum(V)

    Args:
        layer: that of the model.
    """

    def __init__(self, model: nn.Module, layer: nn.Linear, z: Tensor, y: Tensor, target: Tensor) -> None:
        super().__init__(model, z, y, target)
        self._layer = layer
        self._rows = torch.cat([z.flatten(1), target.flatten(1)])
        # Compared, as `one_hot` reads the labels, for which a GPU would be waited.
        self._labels = (torch.arange(layer.out_features, device=y.device)[:, None] == y).to(z.dtype)

    @torch.no_grad()
    def differentiate(self) -> None:
        weight: Tensor = self._layer.weight
        bias: Tensor = self._layer.bias
        size = len(self.y)
        products = weight @ self._rows.mT
        logits, met = products[:, :size], products[:, size:]
        factors = weight.new_empty(len(weight), 2 * size)
        v, residual = factors[:, :size], factors[:, size:]
        p = logits.add_(bias[:, None]).softmax(0)
        torch.sub(self._labels, p, out=residual)
        u = torch.addmm(met, weight @ weight.mT, residual, beta=-1, alpha=-1 / size).mul_(p)
        torch.addcmul(u, p, u.sum(0), value=-1, out=v)
        direct = residual @ residual.mT @ weight
        weight.grad = torch.addmm(direct, factors, self._rows, beta=2 / size**2, alpha=2 / size)
        bias.grad = v.sum(1).mul_(2 / size)


def alignment_batch(
    model: nn.Module, z: Tensor, y: Tensor, target: Tensor, loss: Loss = F.cross_entropy
) -> AlignmentBatch:
    """A batch in the quickest way that serves model and loss; see `AlignmentBatch`."""
    layer = _only_layer(model, z) if loss is F.cross_entropy else None
    if layer is None:
        return AlignmentBatch(model, z, y, target, loss)
    return LinearAlignmentBatch(model, layer, z, y, target)


def _only_layer(model: nn.Module, z: Tensor) -> nn.Linear | None:
    """The linear layer, with a bias, that is all of a model but for flattening; None where the model is more."""
    *before, layer = [*model.children()] if type(model) is nn.Sequential and len(model) else [model]
    flattens = all(type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1) for module in before)
    if type(layer) is not nn.Linear or not flattens or (z.dim() > 2 and not before):
        return None
    hooked = any(vars(module)[hooks] for module in (model, layer) for hooks in ("_forward_hooks", "_forward_pre_hooks"))
    learns = [name for name, weight in layer.named_parameters() if weight.requires_grad] == ["weight", "bias"]
    return layer if learns and not hooked else None
