"""GroupNorm with standardised convolutions in the client part, and bottlenecks at the cut."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_cases import NARROW, config, images, info
from safetensors.torch import save_file
from torch import Tensor, nn

from cutlayer.models import ModelConfig, build_auxiliary, build_model, check_model, split
from cutlayer.models.adapting import StandardisedConv2d, norm_groups
from cutlayer.models.cutting import Part
from cutlayer.models.parts.auxiliary import AuxiliaryConfig
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from tests.conftest import play

Configure = Callable[..., RunConfig]
MOBILE = {"width_mult": 0.25, "dropout": 0.0}
# Model, cut, and the children that belong to the client.
CASES = [
    ("resnet18", "layer1"),
    ("resnet18", "layer1.0"),
    ("resnet18", "layer2.1.conv1"),
    ("vgg", "block3"),
    ("mobilenet_cifar", "block2"),
    ("torchvision/mobilenet_v2", "features.1"),
    ("torchvision/mobilenet_v2", "features.2.conv.1"),
]


def _config(name: str, cut: str, **more: str | None) -> ModelConfig:
    options = NARROW.get(name, {}) if "/" not in name else MOBILE
    return replace(ModelConfig(name, cut=cut, options=options), **more)  # pyright: ignore[reportArgumentType]


def _built(config: ModelConfig, dataset: str = "cifar10") -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, info(dataset))


def _kinds(module: nn.Module) -> dict[str, type]:
    """The normalisations and convolutions that belong to a part: those that have weights there."""
    layers = (nn.BatchNorm2d, nn.GroupNorm, nn.Conv2d)
    return {
        name: type(layer)
        for name, layer in module.named_modules()
        if isinstance(layer, layers) and next(layer.parameters(recurse=False), None) is not None
    }


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 4), (12, 4), (16, 8), (24, 8), (32, 16), (48, 16), (64, 32), (96, 32)],
)
def test_groups(channels: int, expected: int) -> None:
    assert norm_groups(channels) == expected


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 1, 3, 3), (4, 6, 1, 1)])
def test_a_standardised_convolution(shape: tuple[int, int, int, int]) -> None:
    """Mean 0 and deviation 1 of each channel's weights by NumPy, and the derivative by finite differences."""
    out, channels, kernel, _ = shape
    layer = StandardisedConv2d(channels, out, kernel, stride=2, padding=1).double()
    layer.weight.data = torch.randn(shape, dtype=torch.float64) * 0.3 + 0.1
    raw = layer.weight.detach().numpy().reshape(out, -1)
    weight = (raw - raw.mean(1, keepdims=True)) / (raw.std(1, ddof=1, keepdims=True) + 1e-5)
    x = torch.randn(2, channels, 5, 7, dtype=torch.float64)
    expected = F.conv2d(x, torch.from_numpy(weight.reshape(shape)), layer.bias, 2, 1)
    torch.testing.assert_close(layer(x), expected)

    def given(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, x)

    assert torch.autograd.gradcheck(given, layer.weight, fast_mode=True)


def test_the_standardisation_of_timm() -> None:
    """By its biased variance, to which it adds 1e-5 below the root: each channel is the same but for a factor."""
    layers = pytest.importorskip("timm.layers", reason="the extra timm is not installed")
    other = layers.StdConv2d(3, 8, 3, padding=1, eps=1e-5)
    layer = StandardisedConv2d(3, 8, 3, padding=1, bias=False)
    layer.load_state_dict(other.state_dict())
    x, weight = torch.randn(2, 3, 8, 8), layer.weight.detach().flatten(1)
    factor = (weight.var(1, correction=0) + 1e-5).sqrt() / (weight.std(1) + 1e-5)
    torch.testing.assert_close(layer(x), other(x) * factor.view(-1, 1, 1), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the client part


@pytest.mark.parametrize(("name", "cut"), CASES)
def test_the_client_part_alone_is_changed(name: str, cut: str) -> None:
    shape = info("cifar10").shape
    plain = _built(_config(name, cut))
    before = [_kinds(part) for part in split(plain, cut, shape, compare=False)]
    model = _built(_config(name, cut, client_norm="group"))
    client, server = split(model, cut, shape)
    assert _kinds(server) == before[1]
    assert nn.BatchNorm2d in before[0].values()
    new = {nn.BatchNorm2d: nn.GroupNorm, nn.Conv2d: StandardisedConv2d}
    assert _kinds(client) == {layer: new[kind] for layer, kind in before[0].items()}
    statistics = {key for key, _ in plain.named_buffers()} - {key for key, _ in model.named_buffers()}
    assert [*model.state_dict()] == [key for key in plain.state_dict() if key not in statistics]
    old, own = dict(plain.named_parameters()), dict(model.named_parameters())
    assert old.keys() == own.keys(), "names of parameters"
    assert all(torch.equal(old[key], own[key]) for key in old), "fresh weights are those of the seed"


@pytest.mark.parametrize(("name", "cut"), CASES)
def test_a_client_trains_on_one_sample(name: str, cut: str) -> None:
    """A batch of one gives what it gives among others, gradients too; with BatchNorm it gives another value."""
    shape, x = info("cifar10").shape, images("cifar10", 3)
    for norm in ("group", "own"):
        client = split(_built(_config(name, cut, client_norm=norm)), cut, shape, compare=False)[0].double().train()
        crossed = client(x.double())
        together = crossed if isinstance(crossed, tuple) else (crossed,)
        crossed = client(x[1:2].double())
        alone = crossed if isinstance(crossed, tuple) else (crossed,)
        equal = all(torch.allclose(a[1:2], b, atol=1e-9) for a, b in zip(together, alone, strict=True))
        assert equal is (norm == "group")
    assert all(p.grad is None for p in client.parameters())


def test_checking_draws_nothing_and_a_model_without_batchnorm_stays() -> None:
    for name, cut in (("resnet18", "layer1.0"), ("torchvision/mobilenet_v2", "features.1"), ("cnn2", "pool2")):
        chosen = _config(name, cut, client_norm="group", bottleneck="C2S2")
        state = torch.random.get_rng_state()
        check_model(chosen, info("cifar10"), ("client", "server"))
        assert torch.equal(torch.random.get_rng_state(), state)
    plain, same = (_built(_config("cnn2", "pool2", client_norm=norm)) for norm in ("own", "group"))
    assert [type(layer) for layer in plain.modules()] == [type(layer) for layer in same.modules()]


class _Kinds(nn.Sequential):
    """Layers that are not to be changed: a depthwise kernel of one weight, and a BatchNorm of its own kind."""

    def __init__(self, own: bool = False) -> None:
        norm = _OwnNorm(3) if own else nn.BatchNorm2d(3)
        super().__init__(nn.Conv2d(3, 3, 1, groups=3), norm, nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(4, 10))


class _OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("size", [None, 4, 3])
def test_groups_of_a_size_in_either_part(size: int | None) -> None:
    """ResNet-18 of MocoSFL: 4 channels in each group of every norm, and standardised convolutions all through."""
    model = _built(
        ModelConfig(
            "resnet18",
            cut="relu",
            options={"stem": "small"},
            client_norm="group",
            server_norm="group",
            group_channels=size,
        )
    )
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_channels for norm in norms] == [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5
    groups = {None: {64: 32, 128: 32, 256: 32, 512: 32}, 4: {64: 16, 128: 32, 256: 64, 512: 128}}
    wanted = groups.get(size, {64: 64, 128: 128, 256: 256, 512: 512})  # 3 divides none of them
    assert all(norm.num_groups == wanted[norm.num_channels] for norm in norms)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {type(module) for module in convolutions} == {StandardisedConv2d}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    server = _kinds(
        split(
            _built(ModelConfig("resnet18", cut="relu", options={"stem": "small"}, server_norm="group")),
            "relu",
            (3, 32, 32),
        )[0]
    )
    assert {*server.values()} >= {nn.BatchNorm2d, nn.Conv2d}, "the client part alone stays"


def test_first_weights_of_xavier() -> None:
    """Uniform up to sqrt(6 / (in + out)), biases zero; standardised convolutions have torch's own."""
    chosen = ModelConfig(
        "resnet18", cut="relu", options={"stem": "small"}, client_norm="group", initialisation="xavier"
    )
    model = _built(chosen)
    first, second, last = model.conv1, model.layer1[0].conv1, model.fc
    bounds = {first: (1 / 27) ** 0.5, second: (6 / (2 * 9 * 64)) ** 0.5, last: (6 / (512 + 10)) ** 0.5}
    for layer, bound in bounds.items():
        assert 0.97 * bound < layer.weight.abs().max().item() <= bound, layer
    assert last.bias.abs().max().item() == 0
    own = _built(ModelConfig("resnet18", cut="relu", options={"stem": "small"}, client_norm="group"))
    assert not torch.equal(own.layer1[0].conv1.weight, second.weight)
    assert _kinds(own) == _kinds(model)


def test_layers_that_stay_and_that_are_refused() -> None:
    here = f"import/{__name__}._Kinds"
    model = _built(ModelConfig(here, cut="2", client_norm="group"))
    assert [type(layer) for layer in list(model)[:3]] == [nn.Conv2d, nn.GroupNorm, StandardisedConv2d]
    with pytest.raises(ConfigError, match=r"model\.client_norm=group: expected own, as the client part has a _OwnNorm"):
        _built(ModelConfig(here, cut="2", client_norm="group", options={"own": True}))


def test_a_wrong_cut_is_one_line() -> None:
    for name, cut in (("resnet18", "layer7"), ("torchvision/mobilenet_v2", "features.99"), ("resnet18", "fc")):
        for more in ({"client_norm": "group"}, {"bottleneck": "C4S2"}):
            with pytest.raises(ConfigError, match=rf"^model\.cut={cut}: expected .*choices") as error:
                check_model(_config(name, cut, **more), info("cifar10"))
            assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"model\.cut.*has no cut of its own"):
        check_model(ModelConfig("torchvision/mobilenet_v2", client_norm="group"), info("cifar10"))


# ---------------------------------------------------------------------- a bottleneck


@pytest.mark.parametrize(
    ("dataset", "name", "cut", "text"),
    [
        *[("cifar10", *case, "C3S3") for case in CASES if "conv" not in case[1]],
        *[("cifar10", *CASES[1], text) for text in ("C4S2", "C1S1")],
        *[("oblong", "cnn4", "block2", text) for text in ("C4S2", "C1S1", "C2S4", "C40S3")],  # 3x5 pixels
    ],
)
def test_a_bottleneck_is_narrow_and_of_any_size(dataset: str, name: str, cut: str, text: str) -> None:
    shape = info(dataset).shape
    chosen = _config(name, cut, bottleneck=text)
    model, x = _built(chosen, dataset).eval(), images(dataset, 2)
    plain = _built(_config(name, cut), dataset).eval()
    wide = split(plain, cut, shape, compare=False)[0](x)
    client, server = split(model, chosen.cut_after, shape)
    z = client(x)
    channels, stride = (int(number) for number in text[1:].split("S"))
    assert z.shape == (2, channels, *((side + stride - 1) // stride for side in wide.shape[2:]))
    assert torch.equal(server(z), model(x))
    where = model.get_submodule(cut)
    seen: list[Tensor] = []
    where.register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(x)
    assert seen[0].shape == wide.shape, "the server has the former channels and size again"
    assert seen[0].min() >= 0
    assert f"{cut}.down.weight" in client.state_dict()
    assert {f"{cut}.up.weight", f"{cut}.up.bias"} <= {*server.state_dict()}
    left = {key.replace(f"{cut}.body.", f"{cut}."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(value, left[key]) for key, value in plain.state_dict().items())


def test_a_bottleneck_by_hand() -> None:
    """Convolution and transposed convolution with what it crosses, by torch's functions."""
    chosen = _config("cnn2", "pool1", bottleneck="C2S2")
    model = _built(chosen, "oblong")
    where, x = model.get_submodule("pool1"), torch.rand(2, 32, 13, 21)
    state = where.state_dict()
    assert [*state] == ["down.weight", "down.bias", "up.weight", "up.bias"]
    z = F.conv2d(F.max_pool2d(x, 2), state["down.weight"], state["down.bias"], stride=2, padding=1)
    assert z.shape == (2, 2, 3, 5)  # of 6x10
    wide = F.conv_transpose2d(z, state["up.weight"], state["up.bias"], stride=2, padding=1, output_padding=1).relu()
    assert wide.shape == (2, 32, 6, 10)
    torch.testing.assert_close(where(x), wide)


@pytest.mark.parametrize("text", ["", "C4", "S2", "c4s2", "C0S2", "C4S0", "C4S2x", "4,2"])
def test_a_bad_bottleneck_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^bottleneck=.*expected null, or C and S with a number each") as error:
        ModelConfig("resnet18", bottleneck=text)
    assert "\n" not in str(error.value)


def test_cuts_that_no_bottleneck_fits_at() -> None:
    for name, cut, found in (
        ("cnn2", "flatten", r"it is \[1, 4096\]"),
        ("vit", "block1", r"it is \[1, 65, 16\]"),
        ("resnet18", "layer1.0.conv1", "2 values cross"),
    ):
        expected = rf"model\.bottleneck=C4S2: expected a cut that one map .* crosses; after {cut} {found}"
        with pytest.raises(ConfigError, match=expected):
            _built(_config(name, cut, bottleneck="C4S2"))
    with pytest.raises(ConfigError, match=r"null where the model is cut in three"):
        replace(config("vgg"), cut=("block2", "block4"), bottleneck="C4S2")
    with pytest.raises(ConfigError, match=r"null, as the method cuts the model in three"):
        check_model(replace(config("vgg"), bottleneck="C4S2"), info("cifar10"), ("client", "server", "tail"))


def test_auxiliary_models_behind_a_bottleneck() -> None:
    chosen = _config("resnet18", "layer2", bottleneck="C4S2", client_norm="group")
    model = _built(chosen)
    client, server = split(model, chosen.cut_after, info("cifar10").shape)
    z = client(images("cifar10", 2))
    for size in ("linear", "full"):
        auxiliary = build_auxiliary(replace(chosen, parts={"auxiliary": AuxiliaryConfig(size)}), info("cifar10"), model)
        assert auxiliary(z).shape == (2, 10)
    assert isinstance(server, Part)
    assert [*server.state_dict()] == [*auxiliary.state_dict()]


# ---------------------------------------------------------------------- runs


def test_runs_of_both(configure: Configure) -> None:
    """What crosses are the bottleneck's bytes, and all weights of the client part are trained."""
    given = ("algorithm=sl_single_server", "model=resnet20", "model.options.width=4", "model.cut=layer1.0", "rounds=1")
    federation = Federation(configure(*given, "model.client_norm=group", "model.bottleneck=C2S2", "frac=0.5"))
    before = copy.deepcopy(federation.server.ctx.parts["client"].state_dict())
    play(federation)
    after = federation.server.ctx.parts["client"].state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    totals = federation.ledger.totals()
    sent = {way: count.payload for way, kind, field, count in totals if kind == "smashed" and field != "y"}
    assert [*sent] == ["up", "down"]
    samples = sum(len(federation.setup.partition.indices(client)) for client in federation.cohort(0))
    assert set(sent.values()) == {samples * 2 * 4 * 4 * 4}


def test_saved_weights_go_into_the_same_model(configure: Configure, tmp_path: Path) -> None:
    """Of a split run into one that cuts nothing, of another library's on grey images; not into the plain model."""
    file = tmp_path / "model.safetensors"
    given = (
        *("model=torchvision/mobilenet_v2", "model.options.width_mult=0.25", "dataset.resize=32", "num_clients=2"),
        *("model.cut=features.1", "model.client_norm=group", "model.bottleneck=C2S2"),
    )
    learnt = Federation(configure("algorithm=sl_single_server", *given)).full_model()
    assert learnt is not None
    save_file(learnt, file)
    whole = Federation(configure("algorithm=fed_avg", *given, f"model.init={file}")).server.ctx.parts["model"]
    state = whole.state_dict()
    assert state.keys() == learnt.keys()
    assert all(torch.equal(state[key], learnt[key]) for key in state)
    assert isinstance(whole.get_submodule("features.0.1"), nn.GroupNorm)
    with pytest.raises(ConfigError, match=r"model\.init=.*missing .*unexpected") as error:
        Federation(configure("algorithm=fed_avg", *given[:5], f"model.init={file}"))
    assert "\n" not in str(error.value)
