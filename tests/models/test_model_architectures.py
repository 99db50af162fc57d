"""The models against references: torchvision's networks, published parameter counts, torch's own normalisation."""

import pytest
import torch
import torchvision
from model_cases import DEEP, MODELS, SHALLOWER, SHAPES, config, images, info, settle
from torch import nn

from cutlayer.models import ModelConfig, build_model, check_model, default_cut, names
from cutlayer.models.layers import GlobalAvgPool, LocalResponseNorm, PadShortcut
from cutlayer.models.registry import entry
from cutlayer.models.shapes import QuickShapes
from cutlayer.models.vit import VitOptions
from cutlayer.runtime.ground.config import ConfigError


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_registered_names_and_their_default_cuts() -> None:
    assert {name: default_cut(name) for name in names()} == {
        "simple_conv": "pool2",
        "cnn2": "pool2",
        "mlp": "relu1",
        "cnn4": "block2",
        "mobilenet_cifar": "block5",
        "vit": "block3",
        "gpt": "block1",
        "vgg": "block2",
        **dict.fromkeys(("resnet18", "resnet50", "resnet152"), "layer2"),
        **dict.fromkeys(("resnet20", "resnet32", "resnet56", "resnet110", "resnet1202"), "layer1"),
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet152"])
def test_imagenet_resnets_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(weights=None, num_classes=10)
    torch.manual_seed(5)
    model = build_model(config(name, narrow=False), info("cifar10"))
    assert [child for child, _ in model.named_children()] == [child for child, _ in reference.named_children()]
    state = reference.state_dict()
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    x = images("cifar10", 2)
    for training in (True, False):  # training first: its running statistics then decide the second comparison
        assert torch.equal(model.train(training)(x), reference.train(training)(x))
    assert torch.equal(dict(model.named_buffers())["bn1.running_mean"], reference.bn1.running_mean)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_small_stem_leaves_images_their_size(name: str) -> None:
    """torchvision's network with another first convolution, and without its pool."""
    reference = getattr(torchvision.models, name)(weights=None, num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    model = build_model(ModelConfig(name, options={"stem": "small"}), info("cifar10"))
    layers = ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert [child for child, _ in model.named_children()] == layers
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    x = images("cifar10", 2)
    assert torch.equal(model(x), reference(x))
    assert model.get_submodule("conv1")(x).shape == (2, 64, 32, 32)
    with pytest.raises(ConfigError, match=r"options\.stem=tiny: expected one .*choices: imagenet, small"):
        ModelConfig(name, options={"stem": "tiny"})


def test_same_seed_gives_torchvisions_weights() -> None:
    torch.manual_seed(3)
    reference = torchvision.models.resnet18(weights=None, num_classes=10).state_dict()
    torch.manual_seed(3)
    state = build_model(config("resnet18", narrow=False), info("cifar10")).state_dict()
    assert all(torch.equal(state[name], reference[name]) for name in reference)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", "0.27"), ("resnet32", "0.46"), ("resnet56", "0.85"), ("resnet110", "1.7"), ("resnet1202", "19.4")],
)
def test_cifar_resnets_have_the_published_parameters(name: str, millions: str) -> None:
    with torch.device("meta"):
        model = entry(name).build(info("cifar10"), ModelConfig(name).typed_options())
    decimals = len(millions.partition(".")[2])
    assert f"{_parameters(model) / 1e6:.{decimals}f}" == millions  # He et al. 2016, table 6


def test_cifar_resnet20_output_sizes() -> None:
    # He et al. 2016, section 4.2: maps of 32, 16 and 8 pixels with 16, 32 and 64 filters; depth = weighted layers.
    model = build_model(ModelConfig("resnet20"), info("cifar10"))
    x, shapes = images("cifar10", 1), {}
    for name, child in model.eval().named_children():
        x = child(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes["layer1"] == (16, 32, 32)
    assert shapes["layer2"] == (32, 16, 16)
    assert shapes["layer3"] == (64, 8, 8)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 20


def test_simple_conv_has_the_published_parameters_on_24_pixel_crops() -> None:
    # Conv 3-64 and 64-64 of 5x5, then 64*6*6-384-192-10, each with its bias.
    crop = info("cifar10").__class__("crop", 3, 24, 24, 10, ())
    model = build_model(ModelConfig("simple_conv"), crop)
    dense = (64 * 6 * 6 + 1) * 384 + 385 * 192 + 193 * 10
    assert _parameters(model) == (75 + 1) * 64 + (64 * 25 + 1) * 64 + dense


@pytest.mark.parametrize(("classes", "published"), [(1000, 4_231_976), (10, 3_217_226)])
def test_mobilenet_has_the_published_parameters(classes: int, published: int) -> None:
    shape = info("cifar10").__class__("colour", 3, 32, 32, classes, ())
    assert _parameters(build_model(ModelConfig("mobilenet_cifar"), shape)) == published


def test_mobilenet_output_sizes_and_parameters_of_each_block() -> None:
    # Howard et al. 2017, table 1, of which the stem's stride of 2 is left out.
    model = build_model(ModelConfig("mobilenet_cifar", options={"width": 8}), info("cifar10"))
    x = model.get_submodule("relu")(model.get_submodule("bn1")(model.get_submodule("conv1")(images("cifar10", 2))))
    channels, shapes = 8, []
    for i in range(1, 14):
        block = model.get_submodule(f"block{i}")
        x = block(x)
        out = x.shape[1]
        assert _parameters(block) == 9 * channels + 2 * channels + channels * out + 2 * out
        shapes.append((out * 4, x.shape[2]))
        channels = out
    assert shapes == [(64, 32), (128, 16), (128, 16), (256, 8), (256, 8), *[(512, 4)] * 6, (1024, 2), (1024, 2)]
    # Depthwise: a channel of the output depends on the same channel of the input only.
    z = torch.randn(1, 8, 5, 5, requires_grad=True)
    model.get_submodule("block1.depthwise")(z)[0, 3].sum().backward()
    assert z.grad is not None
    assert [bool(channel.any()) for channel in z.grad[0]] == [i == 3 for i in range(8)]


def test_cnn4_has_the_published_parameters() -> None:
    # The embedding of the prototypical networks' authors, whose size the few-shot literature gives as 113,088.
    model = build_model(ModelConfig("cnn4"), info("cifar10"))
    classifier = model.get_submodule("fc")
    assert _parameters(model) - _parameters(classifier) == 113_088
    assert _parameters(classifier) == (64 * 2 * 2 + 1) * 10


def _torchvision_vit(side: int, classes: int, options: VitOptions) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """torchvision's transformer with weights everywhere, and these under the names that `vit` gives them."""
    torch.manual_seed(3)
    reference = torchvision.models.VisionTransformer(
        side, options.patch, options.depth, options.heads, options.hidden, options.mlp, num_classes=classes
    )
    state: dict[str, torch.Tensor] = {}
    for key, tensor in reference.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)  # what starts at zero would hide a mistake
        for theirs, ours in (
            ("conv_proj", "patches.conv"),
            ("class_token", "patches.token"),
            ("encoder.pos_embedding", "patches.position"),
            ("encoder.ln", "norm"),
            ("heads.head", "fc"),
        ):
            if key.startswith(theirs):
                state[key.replace(theirs, ours)] = tensor
        if key.startswith("encoder.layers"):
            block, _, rest = key.removeprefix("encoder.layers.encoder_layer_").partition(".")
            state[f"block{int(block) + 1}.{rest}"] = tensor
    return reference, state


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"patch": 8, "hidden": 24, "heads": 3, "mlp": 40, "depth": 5}])
def test_vit_is_torchvisions(options: dict[str, int], training: bool) -> None:
    reference, state = _torchvision_vit(32, 10, VitOptions(**options))
    model = build_model(ModelConfig("vit", options=options), info("cifar10"))
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    x = images("cifar10", 3).requires_grad_()
    ours, theirs = (m.train(training)(x) for m in (model, reference))
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(logits.square().sum(), x)[0] for logits in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_vit_starts_as_torchvisions_does() -> None:
    wide = ModelConfig("vit", options={"depth": 1, "hidden": 256, "mlp": 512})
    state = build_model(wide, info("tinyimagenet")).state_dict()
    assert not state["patches.token"].any()
    assert not state["patches.conv.bias"].any()
    assert float(state["patches.position"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state["patches.conv.weight"].std()) == pytest.approx(48**-0.5, rel=0.05)
    assert state["fc.weight"].any()  # torchvision's zeros are for fine-tuning


def test_vit_fills_images_up_on_the_right_and_below() -> None:
    options = {"depth": 1, "hidden": 8, "heads": 2, "mlp": 8}
    model = build_model(ModelConfig("vit", options=options), info("oblong")).eval()  # 13x21 becomes 16x24
    whole = info("oblong").__class__("filled", 2, 16, 24, 3, ())
    filled = build_model(ModelConfig("vit", options=options), whole).eval()
    filled.load_state_dict(model.state_dict())
    x = images("oblong", 2)
    assert torch.equal(model(x), filled(nn.functional.pad(x, (0, 3, 0, 3))))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit", {"hidden": 30}, r"options\.heads=4: expected a divisor of hidden=30"),
        ("vit", {"depth": 0}, r"options\.depth=0: expected an integer >= 1"),
        ("vit", {"dropout": 1.0}, r"options\.dropout=1\.0: expected a number >= 0 and < 1"),
        ("cnn4", {"width": 0}, r"options\.width=0"),
        ("mobilenet_cifar", {"width": -1}, r"options\.width=-1"),
        ("mobilenet_cifar", {"depth": 3}, r"options\.depth: no such key"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig(name, options=options)


def test_a_shallow_transformer_says_where_it_may_be_cut() -> None:
    shallow = ModelConfig("vit", options={"depth": 2})
    with pytest.raises(ConfigError, match=r"model\.cut=block3: .*choices: patches, block1, block2, norm, token"):
        check_model(shallow, info("cifar10"), ("client", "server"))
    check_model(shallow, info("cifar10"), ("model",))  # of a method that does not cut it


def test_mlp_widths_follow_options_and_dataset() -> None:
    def widths(model: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]

    assert widths(build_model(ModelConfig("mlp"), info("mnist"))) == [(784, 128), (128, 64), (64, 10)]
    deep = ModelConfig("mlp", options={"hidden": [16, 8, 4]})
    assert widths(build_model(deep, info("digits"))) == [(64, 16), (16, 8), (8, 4), (4, 10)]


def test_large_images_do_not_blow_up_the_dense_layers() -> None:
    for name in ("simple_conv", "cnn2"):
        large = _parameters(build_model(ModelConfig(name), info("ham10000")))
        assert large < 1.01 * _parameters(build_model(ModelConfig(name), info("cifar10")))


PAIRS = [(n, d) for n in SHALLOWER for d in SHAPES if n not in DEEP or d in ("digits", "pixel", "ham10000")]
PAIRS.append(("resnet1202", "digits"))


@pytest.mark.parametrize(("name", "dataset"), PAIRS)
def test_every_model_runs_on_every_dataset(name: str, dataset: str) -> None:
    shape = info(dataset)
    deep = name in DEEP and shape.height > 64
    # The deepest on large images: shapes only.
    device = "meta" if deep else "cpu"
    with torch.device(device), torch.no_grad(), QuickShapes():
        torch.manual_seed(0)
        model = entry(name).build(shape, config(name).typed_options())
        settle(model)
        x = images(dataset, 4 if shape.height > 32 else 8).to(device)
        # Evaluated on images that the statistics were taken from, on which no depth overflows.
        for training, batch in ((True, x), (False, x[:1]), (False, x[1:4])):
            logits = model.train(training)(batch)
            assert logits.shape == (len(batch), shape.classes)
            assert deep or bool(logits.isfinite().all())


def test_local_response_norm_is_torchs() -> None:
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64)
    for size in (1, 4, 5, 9):
        ours = LocalResponseNorm(size, alpha=0.3, beta=0.75, k=1.5)(x)
        torch.testing.assert_close(ours, nn.LocalResponseNorm(size, alpha=0.3, beta=0.75, k=1.5)(x))


def test_pad_shortcut_subsamples_and_pads() -> None:
    x = torch.arange(2.0 * 9).reshape(1, 2, 3, 3)
    y = PadShortcut(added=3, stride=2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert y[0, 0].tolist() == [[0.0, 2.0], [6.0, 8.0]]
    assert not y[0, 2:].any()


def test_global_pool_is_the_mean() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(GlobalAvgPool()(x), x.mean(dim=(2, 3)))


def test_relu_before_a_cut_does_not_write_into_its_input() -> None:
    for name in MODELS:
        with torch.device("meta"):
            model = entry(name).build(info("cifar10"), config(name).typed_options())
        assert not any(m.inplace for m in model.children() if isinstance(m, nn.ReLU)), name
