"""Auxiliary models: their sizes, their independence of the server part, their second derivatives."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from model_cases import MODELS, built, config, images, info, megabytes, settle
from torch import nn
from torch.func import functional_call

from cutlayer.models import (
    AUXILIARY_SIZES,
    AuxiliaryConfig,
    ModelConfig,
    build_auxiliary,
    build_model,
    cuts,
    default_cut,
    split,
)
from cutlayer.models.registry import entry
from cutlayer.runtime.ground.config import ConfigError


def test_resnet18_has_the_sizes_of_the_papers_ablation() -> None:
    # FSL-SAGE (Nair et al. 2025), auxiliary-size ablation: ResNet-18 cut after layer2, CIFAR-10; MB of 10^6 bytes.
    model = build_model(ModelConfig("resnet18"), info("cifar10"))
    for size, published in (("linear", 0.005), ("half", 3.5), ("default", 8.0), ("full", 40.0)):
        measured = megabytes(build_auxiliary(config("resnet18", narrow=False, size=size), info("cifar10"), model))
        print(f"{size}: {measured:.4f} MB, published {published} MB")
        assert measured == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet152", "resnet1202")])
def test_sizes_grow_and_full_is_the_server(name: str) -> None:
    model = build_model(ModelConfig(name), info("cifar10"))
    server = split(model, default_cut(name))[1]
    made = [build_auxiliary(config(name, narrow=False, size=s), info("cifar10"), model) for s in AUXILIARY_SIZES]
    sizes = [megabytes(auxiliary) for auxiliary in made]
    assert sizes == sorted(set(sizes))
    shapes = {key: t.shape for key, t in server.state_dict().items()}
    assert {key: t.shape for key, t in made[-1].state_dict().items()} == shapes
    weights = [key for key, p in server.named_parameters() if p.dim() > 1]
    assert not any(torch.equal(made[-1].state_dict()[key], server.state_dict()[key]) for key in weights)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet110", "resnet1202", "resnet152")])
@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "oblong", "pixel"])
def test_runs_after_every_cut_and_size(name: str, dataset: str) -> None:
    model = built(name, dataset)
    sizes = [size for size in AUXILIARY_SIZES if size != "full"]  # a full one is a server part, tested as such
    valid = cuts(model)
    # Every cut on the smallest images, where maps run out of pixels; elsewhere the model's own and the last one.
    for cut in valid if dataset == "pixel" else dict.fromkeys((default_cut(name), valid[-1])):
        z = split(model, cut)[0](images(dataset, 3)).detach().requires_grad_()
        received = z.detach().clone()
        for size in sizes:
            auxiliary = build_auxiliary(config(name, size=size, cut=cut), info(dataset), model)
            logits = auxiliary(z)
            assert logits.shape == (3, info(dataset).classes)
            logits.sum().backward()
            assert torch.equal(z, received)
            assert auxiliary.eval()(z[:1]).shape == (1, info(dataset).classes)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet110", "resnet1202", "resnet152")])
def test_runs_on_large_images(name: str) -> None:
    model = built(name, "ham10000")
    with torch.no_grad():
        z = split(model, default_cut(name))[0](images("ham10000", 2))
        for size in AUXILIARY_SIZES:
            auxiliary = build_auxiliary(config(name, size=size), info("ham10000"), model)
            assert auxiliary(z).shape == (2, 7)


@pytest.mark.parametrize("name", ["mobilenet_cifar", "cnn4", "vit", "vgg"])
def test_shares_of_the_server_part_are_those_of_the_paper(name: str) -> None:
    # The ablation's 3.5 and 8.0 of 42 MB: about a twelfth and a fifth, of a server part of any architecture.
    model = build_model(ModelConfig(name), info("cifar10"))
    server = megabytes(split(model, default_cut(name))[1])
    for size, share in (("half", 1 / 12), ("default", 1 / 5)):
        measured = megabytes(build_auxiliary(config(name, narrow=False, size=size), info("cifar10"), model))
        assert measured / server == pytest.approx(share, rel=0.25), size


def test_thinning_leaves_out_blocks_that_keep_their_shape() -> None:
    def kept(name: str, cut: str, size: str) -> list[str]:
        model = built(name, "cifar10")
        own = config(name, cut=cut, size=size)
        return [child for child, _ in build_auxiliary(own, info("cifar10"), model).named_children()]

    # Of blocks 7 to 11 of MobileNet, all 512 to 512, one stays; 12 and 13 change the shape or follow one that does.
    assert kept("mobilenet_cifar", "block5", "default") == ["block6", "block7", "block12", "block13", "avgpool", "fc"]
    assert kept("mobilenet_cifar", "block8", "half") == ["block9", "block12", "block13", "avgpool", "fc"]
    assert kept("vit", "patches", "default") == ["block1", "norm", "token", "fc"]  # a fifth of four
    assert kept("cnn4", "block2", "half") == ["block3", "block4", "flatten", "fc"]
    model = build_model(ModelConfig("vit"), info("cifar10"))
    deep = build_auxiliary(config("vit", narrow=False, cut="patches"), info("cifar10"), model)
    assert [child for child, _ in deep.named_children()] == ["block1", "block2", "block3", "norm", "token", "fc"]


def test_a_linear_auxiliary_model_of_a_transformer_sees_every_token() -> None:
    # Cut after the patches the class token is the same for all images: alone it could teach nothing.
    model = built("vit", "digits")
    z = split(model, "patches")[0](images("digits", 3)).detach().requires_grad_()
    auxiliary = build_auxiliary(config("vit", size="linear", cut="patches"), info("digits"), model)
    (gradient,) = torch.autograd.grad(auxiliary(z).square().sum(), z)
    assert bool(gradient.any(dim=2).all())


def test_building_leaves_the_model_alone_and_keeps_nothing_of_it() -> None:
    model = built("resnet18", "cifar10").train()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    made = [build_auxiliary(config("resnet18", size=size), info("cifar10"), model) for size in AUXILIARY_SIZES]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not any(t.data_ptr() in pointers for auxiliary in made for t in auxiliary.state_dict().values())
    modules = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not any(module() is not None for module in modules)
    assert len(made) == 4


def _tiny(name: str, size: str) -> tuple[nn.Module, torch.Tensor]:
    """A narrow auxiliary model in float64 that is cheap enough for finite differences, and a z for it."""
    torch.manual_seed(0)
    options = {
        "resnet20": {"width": 1},
        "mlp": {"hidden": [4, 3]},
        "mobilenet_cifar": {"width": 1},
        "cnn4": {"width": 2},
        "vit": {"hidden": 4, "heads": 2, "mlp": 8, "depth": 5},
    }
    shape = info("digits").__class__("tiny", 1, 8, 8, 2, ("a", "b"))
    tiny = ModelConfig(name, options=options[name], parts={"auxiliary": AuxiliaryConfig(size)})
    model = entry(name).build(shape, tiny.typed_options())
    auxiliary = build_auxiliary(tiny, shape, model).double()
    z = split(model, default_cut(name))[0](torch.randn(3, *shape.shape)).double().detach()
    z = z + 0.1 * torch.randn_like(z)
    settle(auxiliary)  # untouched statistics let a deep one's activations fade, and differences see nothing but kinks
    with torch.no_grad():
        auxiliary.train()(z)
    return auxiliary, z.requires_grad_()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", ["linear", "default"])
@pytest.mark.parametrize("name", ["resnet20", "mlp", "mobilenet_cifar", "cnn4", "vit"])
def test_twice_differentiable_in_input_and_weights(name: str, size: str, training: bool) -> None:
    auxiliary, z = _tiny(name, size)
    auxiliary.train(training)
    keys = [key for key, _ in auxiliary.named_parameters()]
    buffers = {key: b.clone() for key, b in auxiliary.named_buffers()}

    def loss(z: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        state = dict(zip(keys, weights, strict=True)) | {key: b.clone() for key, b in buffers.items()}
        return F.cross_entropy(functional_call(auxiliary, state, (z,)), torch.tensor([0, 1, 1]))

    weights = [p.detach().requires_grad_() for p in auxiliary.parameters()]
    # Fast mode: a random projection instead of each entry, so that all weights at once stay cheap.
    assert torch.autograd.gradgradcheck(loss, (z, *weights), fast_mode=True)


@pytest.mark.parametrize("size", ["half", "full"])
@pytest.mark.parametrize("name", ["simple_conv", "cnn2", "resnet18", "resnet50", "mobilenet_cifar", "cnn4", "vit"])
def test_gradient_matching_reaches_all_weights_and_lowers_its_error(name: str, size: str) -> None:
    # FSL-SAGE's alignment on one batch: || d/dz CE(aux(z), y) - d/dz CE(server(z), y) ||^2 over the auxiliary weights.
    # The cut is early, so that convolutions and normalisation are differentiated twice too.
    early = {"resnet18": "layer1", "resnet50": "layer1", "mobilenet_cifar": "block5", "cnn4": "block1", "vit": "block1"}
    cut = early.get(name, "pool1")
    model = built(name, "digits")
    client, server = split(model, cut)
    auxiliary = build_auxiliary(config(name, size=size, cut=cut), info("digits"), model)
    z, y = client(images("digits", 16)).detach().requires_grad_(), torch.arange(16) % 10
    (target,) = torch.autograd.grad(F.cross_entropy(server(z), y), z)
    optimizer = torch.optim.Adam(auxiliary.parameters(), lr=3e-3)
    errors: list[float] = []
    for _ in range(30):
        (estimate,) = torch.autograd.grad(F.cross_entropy(auxiliary(z), y), z, create_graph=True)
        error = (estimate - target).square().sum()
        optimizer.zero_grad()
        error.backward()
        reached = [key for key, p in auxiliary.named_parameters() if p.grad is not None and bool(p.grad.any())]
        # The classifier's bias moves the softmax, so even it is reached.
        assert {key for key, p in auxiliary.named_parameters() if p.dim() > 1} <= set(reached)
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.95 * errors[0]


def test_a_layer_that_cannot_be_thinned_is_named() -> None:
    model = built("cnn2", "digits")
    model.conv2 = nn.ConvTranspose2d(32, 64, 3)
    with pytest.raises(ConfigError, match="ConvTranspose2d"):
        build_auxiliary(config("cnn2", cut="pool1"), info("digits"), model)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"size=hlaf: .*did you mean half"):
        AuxiliaryConfig("hlaf")
