"""The models against references: torchvision's networks, published parameter counts, torch's own normalisation."""

import pytest
import torch
import torchvision
from model_cases import MODELS, SHAPES, config, images, info, settle
from torch import nn

from models import ModelConfig, build_model, default_cut, names
from models.layers import GlobalAvgPool, LocalResponseNorm, PadShortcut
from models.registry import entry


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_registered_names_and_their_default_cuts() -> None:
    assert {name: default_cut(name) for name in names()} == {
        "simple_conv": "pool2",
        "cnn2": "pool2",
        "mlp": "relu1",
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dataset", list(SHAPES))
def test_every_model_runs_on_every_dataset(name: str, dataset: str) -> None:
    shape = info(dataset)
    deep = name in ("resnet110", "resnet1202", "resnet152") and shape.height > 64
    # The deepest on large images: shapes only.
    device = "meta" if deep else "cpu"
    with torch.device(device), torch.no_grad():
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
