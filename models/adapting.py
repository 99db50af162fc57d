"""What a configuration changes in the model that a builder gives: its normalisation, a bottleneck, first weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cutlayer.models.config import Bottleneck, ModelConfig
from cutlayer.models.frozen import thaw
from cutlayer.models.lora import add_lora
from cutlayer.models.pretrained import causal_model
from cutlayer.models.registry import check_input, entry
from cutlayer.models.sources import error_line
from cutlayer.models.splitting import check_cuts, children_of, ended, split, zeros
from cutlayer.models.tied import state_once
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_EPS = 1e-5
_GROUPS = (32, 16, 8, 4, 2)


class StandardisedConv2d(nn.Conv2d):
    """A convolution by its weights standardised for each output channel (Qiao et al. 2019), of mean 0 and deviation 1.

    The deviation is the unbiased one, with 1e-5 added, as in its authors' code. Parameters are the convolution's.
    """

    def forward(self, input: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (deviation + _EPS), self.bias)


def norm_groups(channels: int) -> int:
    """Groups of a GroupNorm: the largest of 32, 16, 8, 4, 2, 1 with equal groups of at least two channels each."""
    return next((count for count in _GROUPS if channels % count == 0 and channels >= 2 * count), 1)


def _groups(channels: int, size: int | None) -> int:
    """Groups of a GroupNorm: of `size` channels, or the largest number that divides both; by default as above."""
    return norm_groups(channels) if size is None else channels // math.gcd(channels, size)


def unadapted(config: ModelConfig, info: DatasetInfo) -> nn.Module:
    """The model as its builder gives it: fresh weights from torch's global generator, or its base's and adapters."""
    check_input(config.name, info)
    if config.base is not None and not info.length:
        raise ConfigError("model.base", str(config.base), f"null for the images of {info.name}")
    if config.base is not None:
        model = causal_model(config.name.partition("/")[2], config.options, info, config.base)
    else:
        model = entry(config.name).build(info, config.typed_options())
    if config.lora.r:
        add_lora(model, config.lora)
    elif config.base is not None:
        thaw(model)
    return model


def fresh(config: ModelConfig, info: DatasetInfo) -> nn.Module:
    """The model with what `config` changes in it: its norms, a bottleneck, where its fresh weights come from.

    These are of the model, not of a method: they hold where it is cut, or would be. What is in the model otherwise has
    the weights that it has without norms by groups and without a bottleneck.

    Raises:
        ConfigError: they cannot be had at this cut.
    """
    model = unadapted(config, info)
    if config.is_adapted:
        _adapt(model, config, info)
    state_once(model)
    return xavier(model) if config.initialisation == "xavier" else model


def xavier(model: nn.Module) -> nn.Module:
    """Give linear layers and convolutions Xavier's uniform weights (Glorot & Bengio 2010) and zero biases, in place.

    Standardised convolutions get torch's own weights: their scale decides nothing but how fast they change.
    """
    for name, module in model.named_modules():
        if isinstance(module, StandardisedConv2d):
            module.reset_parameters()
        elif ".lora_" in name:
            continue
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _adapt(model: nn.Module, config: ModelConfig, info: DatasetInfo) -> None:
    """Put groups in the place of other norms, and a bottleneck behind the cut, where `config` asks for them."""
    cut, outputs = config.client_end, list[Any]()
    check_cuts(model, cut)
    handle = model.get_submodule(cut).register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        calls = ended(model, info.shape)
    except Exception as error:
        raise ConfigError("model.cut", cut, f"a model that runs ({error_line(error)})") from error
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise ConfigError("model.cut", cut, f"a module that runs once in a forward pass, not {len(outputs)} times")
    end = calls.index(cut) + 1
    client = {*calls[:end]} - {*calls[end:]}
    for part, norm, paths in (
        ("client", config.client_norm, client),
        ("server", config.server_norm, {*calls} - client),
    ):
        if norm == "group":
            _use_groups(model, part, paths, config.group_channels)
    if config.bottleneck is not None:
        _put_bottleneck(model, cut, config.bottleneck, info, outputs[0])


def _use_groups(model: nn.Module, part: str, paths: set[str], size: int | None) -> None:
    """GroupNorm and standardised convolutions among a part's modules `paths`, if there is a BatchNorm among them."""
    everyone = dict(model.named_modules(remove_duplicate=False))
    inside = [everyone[path] for path in paths]
    norms = [module for module in inside if isinstance(module, nn.BatchNorm2d)]
    other = next((type(norm).__name__ for norm in norms if type(norm) is not nn.BatchNorm2d), None)
    if other is not None:
        raise ConfigError(
            f"model.{part}_norm", "group", f"own, as the {part} part has a {other}: not plain BatchNorm2d"
        )
    if not norms:
        return
    twins = {id(norm): _group_norm(norm, size) for norm in norms}
    for path, module in everyone.items():
        if id(module) in twins:
            parent, _, name = path.rpartition(".")
            everyone[parent]._modules[name] = twins[id(module)]
    for module in inside:
        # Of another kind than Conv2d itself the forward may be another; one weight a channel would become nothing.
        if type(module) is nn.Conv2d and module.weight[0].numel() > 1:
            module.__class__ = StandardisedConv2d


def _group_norm(norm: nn.BatchNorm2d, size: int | None) -> nn.GroupNorm:
    """A GroupNorm that starts with the scale and shift of a BatchNorm."""
    like = {} if norm.weight is None else {"device": norm.weight.device, "dtype": norm.weight.dtype}
    twin = nn.GroupNorm(_groups(norm.num_features, size), norm.num_features, norm.eps, norm.affine, **like)
    twin.load_state_dict(dict(norm.named_parameters()))
    return twin.train(norm.training)


def _put_bottleneck(model: nn.Module, cut: str, text: str, info: DatasetInfo, z: object) -> None:
    """Put a convolution that narrows behind the module `cut`, which gives `z`, and one that widens again."""
    bottleneck = Bottleneck.read(text)
    expected = f"a cut that one map [b, c, h, w] crosses; after {cut}"
    if not isinstance(z, Tensor) or z.dim() != 4:
        found = f"it is {list(z.shape)}" if isinstance(z, Tensor) else f"it is a {type(z).__name__}"
        raise ConfigError("model.bottleneck", text, f"{expected} {found}")
    between = isinstance(model, nn.Sequential) and cut in children_of(model)
    if not between and z.device.type != "meta":
        crossing = getattr(split(model, cut, info.shape, compare=False)[0], "crossing", 1)
        if crossing > 1:
            raise ConfigError("model.bottleneck", text, f"{expected} {crossing} values cross")
    body = model.get_submodule(cut)
    parent, _, name = cut.rpartition(".")
    model.get_submodule(parent)._modules[name] = _around(body, bottleneck, z).train(body.training)
    mode = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(zeros(model, info.shape))
    except Exception as error:
        raise ConfigError("model.bottleneck", text, f"{expected} it does not fit ({error_line(error)})") from error
    finally:
        model.train(mode)


def _around(body: nn.Module, bottleneck: Bottleneck, z: Tensor) -> nn.Sequential:
    """`body`, then to fewer channels and pixels, and back to the shape of `z` [b, c, h, w], what `body` gives."""
    channels, height, width = z.shape[1:]
    narrow, stride = bottleneck
    like: dict[str, Any] = {"padding": 1, "stride": stride, "device": z.device, "dtype": z.dtype}
    rest = (height - 1) % stride, (width - 1) % stride  # what a strided convolution does not determine of a side
    return nn.Sequential(
        OrderedDict(
            body=body,
            down=nn.Conv2d(channels, narrow, 3, **like),
            up=nn.ConvTranspose2d(narrow, channels, 3, output_padding=rest, **like),
            relu=nn.ReLU(),
        )
    )
