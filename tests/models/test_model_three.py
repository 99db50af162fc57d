"""Models cut in three, the personal bodies that go between their first and last part, and VGG against torchvision's."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from model_cases import QUICK, SHAPES, built, config, images, info, settle
from torch import nn

from cutlayer.models import ModelConfig, PersonalConfig, build_model, build_personal, check_model, divide, names
from cutlayer.models.layers import GridOfMeans
from cutlayer.models.registry import entry
from cutlayer.models.splitting import split_in_three
from cutlayer.runtime.ground.config import ConfigError, build


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", QUICK)
def test_parts_compose_to_the_model(name: str, training: bool) -> None:
    model = built(name, "digits")
    settle(model)
    with torch.no_grad():
        model(images("digits", 8))
    model.train(training)
    parts = divide(config(name), info("digits"), copy.deepcopy(model))
    assert {part.training for part in parts} == {training}
    assert [key for part in parts for key in part.state_dict()] == list(model.state_dict())
    x, y = images("digits", 4), torch.tensor([0, 3, 9, 1])
    whole, z = model(x), x
    for part in parts:
        z = part(z)
    assert torch.equal(z, whole)
    F.cross_entropy(whole, y).backward()
    F.cross_entropy(z, y).backward()
    found = {key: p.grad for part in parts for key, p in part.named_parameters()}
    for key, p in model.named_parameters():
        assert torch.equal(found[key], p.grad), key


def children(part: nn.Module) -> list[str]:
    return [name for name, _ in part.named_children()]


def test_the_registered_cuts() -> None:
    vgg = [children(part) for part in divide(ModelConfig("vgg"), info("digits"), built("vgg", "digits"))]
    assert vgg == [["block1", "block2"], [f"block{i}" for i in range(3, 11)], ["avgpool", "fc"]]
    vit = [children(part) for part in divide(config("vit"), info("digits"), built("vit", "digits"))]
    assert vit == [["patches"], ["block1", "block2", "block3", "block4"], ["norm", "token", "fc"]]
    mlp = [children(part) for part in divide(config("mlp"), info("digits"), built("mlp", "digits"))]
    assert mlp == [["flatten", "fc1", "relu1"], ["fc2", "relu2"], ["fc3"]]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Kernel 3x3 and bias, then scale and shift of BatchNorm; a block of the transformer has 12 h^2 + 13 h
        # parameters with a hidden layer of 4 h.
        ("vgg", {}, [sum(9 * a * b + 3 * b for a, b in pairs) for pairs in (
            [(64, 128), (128, 256), (256, 512)],
            [(64, 128), (128, 256), (256, 256), (256, 512), (512, 512)])]),
        ("vit", {}, [12 * 64**2 + 13 * 64]),
    ],
)  # fmt: skip
def test_the_published_bodies(name: str, options: dict[str, Any], expected: list[int]) -> None:
    model = build_model(ModelConfig(name, options=options), info("cifar10"))
    cifar = info("cifar10")
    bodies = build_personal(
        ModelConfig(name, options=options), cifar, divide(ModelConfig(name, options=options), cifar, model)
    )
    assert [sum(p.numel() for p in body.parameters()) for body in bodies] == expected
    shared = divide(ModelConfig(name), cifar, model)[1]
    # The paper's: eight convolutions of 128 to 512 channels, twelve transformer blocks.
    whole = {
        "vgg": sum(9 * a * b + 3 * b for a, b in [(64, 128), (128, 128), (128, 256), (256, 256), (256, 512)])
        + 3 * (9 * 512 * 512 + 3 * 512),
        "vit": 12 * (12 * 64**2 + 13 * 64),
    }
    assert sum(p.numel() for p in shared.parameters()) == whole[name]


@pytest.mark.parametrize("dataset", list(SHAPES))
@pytest.mark.parametrize("name", ["vgg", "vit", "mlp", "cnn2", "resnet20"])
def test_personal_bodies_fit_any_image(name: str, dataset: str) -> None:
    model = built(name, dataset)
    client, server, tail = thirds = divide(config(name), info(dataset), model)
    bodies = build_personal(config(name), info(dataset), thirds)
    assert len(bodies) == len(entry(name).variants)
    z = client(images(dataset, 2))
    for body in bodies:
        assert body(z).shape == server(z).shape
        assert tail(body(z)).shape == (2, info(dataset).classes)
        mine = {tensor.data_ptr() for tensor in body.state_dict().values()}
        assert not mine & {tensor.data_ptr() for tensor in model.state_dict().values()}


@pytest.mark.parametrize(("name", "last"), [("vgg", 3), ("vgg", 4), ("vit", 2)])
def test_variants_follow_cuts_of_ones_own(name: str, last: int) -> None:
    """A variant's body ends as many children before the end as the model's."""
    model = built(name, "digits")
    order = children(model)
    first, second = order[1], order[-last]
    own = ModelConfig(name, cut=(first, second), options=config(name).options)
    client, server, tail = thirds = divide(own, info("digits"), model)
    assert (children(client)[-1], children(server)[-1], len(tail)) == (first, second, last - 1)
    variant = PersonalConfig(({},))
    (body,) = build_personal(
        ModelConfig(name, cut=own.cut, parts={"personal": variant}, options=own.options), info("digits"), thirds
    )
    assert children(body) == children(server)


def test_registered_without_cuts_it_is_cut_before_the_classifier() -> None:
    for name in names():
        if entry(name).cuts is None and name in QUICK:
            client, _, tail = divide(config(name), info("digits"), built(name, "digits"))
            assert children(client)[-1] == entry(name).cut
            assert children(tail) == children(built(name, "digits"))[-1:]


@pytest.mark.parametrize(
    ("cuts", "reason"),
    [
        (("block3", "block9"), r"model\.cut=block9: .*choices: block1, block2, block3, block4, flatten"),
        (("block3", "block1"), r"model\.cut=\[block3,block1\]: expected two children of the model, in its order"),
        (("block3", "block3"), r"model\.cut=\[block3,block3\]: expected two children of the model, in its order"),
        (("block4", "flatten"), r"model\.cut=\[block4,flatten\]: expected cuts that leave weights to each"),
    ],
)
def test_bad_cuts_are_reported(cuts: tuple[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        split_in_three(built("cnn4", "digits"), *cuts)
    with pytest.raises(ConfigError, match=reason):
        check_model(ModelConfig("cnn4", cut=cuts), info("digits"), ("client", "server", "tail"))


def test_cuts_through_tied_weights_are_refused() -> None:
    for first, second in ((0, 2), (2, 4), (0, 4)):
        tied = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        tied[second].weight = tied[first].weight
        with pytest.raises(ConfigError, match="shared"):
            split_in_three(tied, "1", "3")


def test_what_does_not_fit_is_refused() -> None:
    for name, variant in (
        ("vgg", {"body": [2, 4]}),
        ("vgg", {"width": 8}),
        ("vit", {"hidden": 8}),
        ("mlp", {"hidden": [128]}),
    ):
        own = ModelConfig(name, options=config(name).options, parts={"personal": PersonalConfig(({}, variant))})
        with pytest.raises(
            ConfigError, match=r"model\.personal\.variants\.1=\{.*\}: expected a body with weights from"
        ):
            check_model(own, info("digits"), ("tail", "personal"))


def test_checking_bodies_neither_draws_nor_allocates() -> None:
    before = torch.random.get_rng_state()
    check_model(ModelConfig("vgg"), info("ham10000"), ("client", "server", "tail", "personal"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_vgg_has_torchvisions_layers(training: bool) -> None:
    """VGG-13 with BatchNorm up to its fourth pool, which is left out here as is the fifth."""
    torch.manual_seed(0)
    reference = torchvision.models.vgg13_bn(weights=None).features
    pools = [i for i, layer in enumerate(reference) if isinstance(layer, nn.MaxPool2d)]
    assert len(pools) == 5
    layers = [layer for i, layer in enumerate(reference) if i not in pools[3:]]
    model = build_model(ModelConfig("vgg"), info("cifar10"))
    body, fc = nn.Sequential(*list(model.children())[:-2]), model.get_submodule("fc")
    state = [tensor for layer in layers for tensor in layer.state_dict().values()]
    assert [t.shape for t in body.state_dict().values()] == [t.shape for t in state]
    body.load_state_dict(dict(zip(body.state_dict(), state, strict=True)))
    x = images("cifar10", 3)
    expected = nn.Sequential(*layers).train(training)(x)
    assert expected.shape == (3, 512, 4, 4)
    assert torch.equal(body.train(training)(x), expected)
    logits = model.train(False)(x)
    maps = body(x)
    torch.testing.assert_close(logits, fc(maps.mean((2, 3))))


# The network of FSMKD's public code, in torchvision's notation: its first convolution, the body at the server, and the
# two that clients have.
STEM, SERVER = [64], ["M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
CLIENTS = (["M", 128, "M", 256, "M", 512, "M"], ["M", 128, "M", 256, 256, "M", 512, "M", 512, "M"])


def plain(width: int, classifier: list[int]) -> ModelConfig:
    """That network at some width of its first convolution."""
    bodies = [[each if each == "M" else each // 64 for each in body] for body in (SERVER, *CLIENTS)]
    options = {"width": width, "stem": 1, "body": bodies[0], "batch_norm": False, "classifier": classifier}
    personal = build(PersonalConfig, {"variants": [{"body": body} for body in bodies[1:]]})
    return ModelConfig("vgg", options=options, parts={"personal": personal})


@pytest.mark.parametrize("training", [True, False])
def test_vgg_without_normalisation_is_torchvisions(training: bool) -> None:
    """The whole network and its three parts, the pool after the first block being the body's."""
    torch.manual_seed(0)
    asked = plain(4, [12, 8])
    cifar, model = info("cifar10"), build_model(asked, info("cifar10"))
    thirds = divide(asked, cifar, model)
    features = torchvision.models.vgg.make_layers([each if each == "M" else each // 16 for each in STEM + SERVER])
    dense = [nn.Linear(49 * 32, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10)]
    reference = nn.Sequential(*features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *dense).train(training)
    state = model.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in reference.state_dict().values()]
    reference.load_state_dict(dict(zip(reference.state_dict(), state.values(), strict=True)))
    x = images("cifar10", 3)
    torch.testing.assert_close(model.train(training)(x), reference(x))
    z = thirds[0](x)
    torch.testing.assert_close(z, reference[:2](x))
    torch.testing.assert_close(thirds[1](z), reference[:-7](x))
    bodies = build_personal(asked, cifar, thirds)
    for body, layers, side in zip(bodies, CLIENTS, (2, 1), strict=True):
        own = torchvision.models.vgg.make_layers([4, *(each if each == "M" else each // 16 for each in layers)])[2:]
        own.load_state_dict(dict(zip(own.state_dict(), body.state_dict().values(), strict=True)))
        torch.testing.assert_close(body(z), own(z))
        assert body(z).shape == (3, 32, side, side)
        assert thirds[2](body(z)).shape == (3, 10)


def test_the_published_vgg_has_the_size_of_the_public_codes() -> None:
    """A convolution at the client, eight at the server, and dense layers of 4096 at the client again."""
    with torch.device("meta"):
        asked, cifar = plain(64, [4096, 4096]), info("cifar10")
        thirds = divide(asked, cifar, build_model(asked, cifar))
        bodies = build_personal(asked, cifar, thirds)
    pairs = [(64, 128), (128, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 3]
    dense = [(512 * 49, 4096), (4096, 4096), (4096, 10)]
    assert [sum(p.numel() for p in part.parameters()) for part in thirds] == [
        9 * 3 * 64 + 64,
        sum(9 * a * b + b for a, b in pairs),
        sum(a * b + b for a, b in dense),
    ]
    assert [sum(p.numel() for p in body.parameters()) for body in bodies] == [
        sum(9 * a * b + b for a, b in pairs)
        for pairs in ([(64, 128), (128, 256), (256, 512)],
                      [(64, 128), (128, 256), (256, 256), (256, 512), (512, 512)])
    ]  # fmt: skip


def test_weights_without_normalisation_are_drawn_as_torchvisions() -> None:
    torch.manual_seed(0)
    model = build_model(plain(32, [512]), info("cifar10"))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            spread = (2 / (9 * module.out_channels)) ** 0.5 if isinstance(module, nn.Conv2d) else 0.01
            assert float(module.weight.detach().std()) == pytest.approx(spread, rel=0.1)
            assert module.bias is not None
            assert not module.bias.any()


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (7, 7), (16, 9)])
def test_the_grid_of_means_is_torchs_adaptive_pool(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = GridOfMeans(7)(x), nn.AdaptiveAvgPool2d(7)(x)
    torch.testing.assert_close(ours, theirs)
    along = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, along)[0] for y in (ours, theirs)))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"width": 0}, "width"),
        ({"stem": 0}, "stem"),
        ({"body": []}, "body"),
        ({"body": [2, 0]}, "body"),
        ({"body": ["M"]}, "body"),
        ({"classifier": [8, 0]}, "classifier"),
    ],
)
def test_bad_options_of_vgg(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"options\.{key}="):
        ModelConfig("vgg", options=options)
