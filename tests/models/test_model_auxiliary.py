"""Auxiliary models: their sizes, their independence of the server part, their second derivatives."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import MODELS, QUICK, built, config, images, info, megabytes, settle
from torch import nn
from torch.func import functional_call

from cutlayer.models import (
    AUXILIARY_SIZES,
    AuxiliaryConfig,
    ModelConfig,
    build_auxiliary,
    build_model,
    check_model,
    cuts,
    default_cut,
    split,
)
from cutlayer.models.registry import entry
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.parties.schedules import SchedulePoint
from cutlayer.runtime.rounds.federation import Federation


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def made(name: str, size: str, dataset: str = "cifar10", **options: Any) -> nn.Module:
    """The auxiliary model of a model of full width, cut where it is by default; only shapes, no values."""
    own = ModelConfig(name, options=options, parts={"auxiliary": AuxiliaryConfig(size)})
    with torch.device("meta"):
        return build_auxiliary(own, info(dataset), build_model(own, info(dataset)))


# Parameters of the auxiliary models of FSL-SAGE's code (437e77b), counted on what it builds:
# ResNet-18 cut after layer2 with `layers` [2, 2, 2, 2] and [2, 2, 1, 2], ResNet-56 and 110 of 64 channels cut after
# layer1, 100 classes.
AUTHORS = [
    ("resnet18", "default", "cifar10", {}, 2_102_282),
    ("resnet18", "half", "cifar10", {}, 921_610),
    ("resnet18", "default", "cifar100", {}, 2_125_412),
    ("resnet56", "default", "cifar100", {"width": 64}, 2_597_988),
    ("resnet110", "default", "cifar100", {"width": 64}, 5_256_804),
]


@pytest.mark.parametrize(("name", "size", "dataset", "options", "count"), AUTHORS)
def test_parameters_are_those_of_the_authors_models(
    name: str, size: str, dataset: str, options: dict[str, Any], count: int
) -> None:
    assert parameters(made(name, size, dataset, **options)) == count


def test_the_four_of_resnet18_in_closed_form() -> None:
    """Nair et al. 2025 publish 0.005, 3.5, 8.0 and 40 MB, which are MiB; with buffers, float32."""

    def block(before: int, after: int, *, down: bool) -> tuple[int, int]:
        """Parameters, and elements of buffers, of which the counter of batches is an int64: twice a float32."""
        norms = 3 if down else 2
        weights = 9 * before * after + 9 * after * after + norms * 2 * after + (before * after if down else 0)
        return weights, norms * (2 * after + 2)

    first, second = block(128, 256, down=True), block(256, 256, down=False)
    third, fourth = block(256, 512, down=True), block(512, 512, down=False)
    for size, blocks, width, published in (
        ("linear", [], 128, 0.005),
        ("half", [first], 256, 3.5),
        ("default", [first, second], 256, 8.0),
        ("full", [first, second, third, fourth], 512, 40.0),
    ):
        auxiliary = made("resnet18", size)
        count = sum(weights for weights, _ in blocks) + 10 * (width + 1)
        assert parameters(auxiliary) == count
        octets = 4 * (count + sum(buffers for _, buffers in blocks))
        assert round(megabytes(auxiliary) * 1e6) == octets
        assert octets / 2**20 == pytest.approx(published, rel=0.025)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet152", "resnet1202")])
def test_sizes_grow_and_full_is_the_server(name: str) -> None:
    model = build_model(ModelConfig(name), info("cifar10"))
    server = split(model, default_cut(name))[1]
    every = [build_auxiliary(config(name, narrow=False, size=s), info("cifar10"), model) for s in AUXILIARY_SIZES]
    sizes = [megabytes(auxiliary) for auxiliary in every]
    assert sizes == sorted(sizes)
    assert sizes[-2] < sizes[-1]
    # Of one or two layers none may be nearer to a fifth than linear.
    matrices = sum(parameter.dim() > 1 for child in [*server.children()][:-1] for parameter in child.parameters())
    assert (sizes[0] < sizes[1] < sizes[2]) == (matrices > 2)
    shapes = {key: t.shape for key, t in server.state_dict().items()}
    assert {key: t.shape for key, t in every[-1].state_dict().items()} == shapes
    *_, classifier = server.named_children()
    for auxiliary in every:  # at full width, under the server's own names, but for the classifier's input
        own = {key: t for key, t in auxiliary.state_dict().items() if not key.startswith(classifier[0])}
        assert all(t.shape == shapes[key] for key, t in own.items())
        weights = [key for key, p in auxiliary.named_parameters() if p.dim() > 1 and key in own]
        assert not any(torch.equal(own[key], server.state_dict()[key]) for key in weights)


@pytest.mark.parametrize("name", QUICK)
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


@pytest.mark.parametrize("name", QUICK)
def test_runs_on_large_images(name: str) -> None:
    model = built(name, "ham10000")
    with torch.no_grad():
        z = split(model, default_cut(name))[0](images("ham10000", 2))
        for size in AUXILIARY_SIZES:
            auxiliary = build_auxiliary(config(name, size=size), info("ham10000"), model)
            assert auxiliary(z).shape == (2, 7)


# The blocks of each size, at each model's own cut, in the server part's order.
BLOCKS = {
    "resnet18": ("layer3.0 layer3.1 layer4.0 layer4.1", 1, 2),
    "resnet50": ("layer3.0 layer3.1 layer3.2 layer3.3 layer3.4 layer3.5 layer4.0 layer4.1 layer4.2", 1, 4),
    "resnet20": ("layer2.0 layer2.1 layer2.2 layer3.0 layer3.1 layer3.2", 1, 3),
    "mobilenet_cifar": ("block6 block7 block8 block9 block10 block11 block12 block13", 1, 3),
    "vgg": ("block3 block4 block5 block6 block7 block8 block9 block10", 4, 5),
    "vit": ("block4 block5 block6 block7 block8 block9 block10 block11 block12", 1, 2),
    "cnn4": ("block3 block4", 0, 0),
    "cnn2": ("fc1", 0, 0),
    "simple_conv": ("fc1 fc2", 0, 0),
    "mlp": ("fc2", 0, 0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_come_nearest_to_the_shares_of_resnet18(name: str) -> None:
    """Against a search over all numbers of blocks, with shares of the parameters before the classifier."""
    text, half, default = BLOCKS[name]
    blocks = text.split()
    model = build_model(ModelConfig(name), info("cifar10"))
    inside = [parameters(model.get_submodule(block)) for block in blocks]
    server = split(model, default_cut(name))[1]
    outside = parameters(server) - sum(inside) - parameters(list(server.children())[-1])
    assert outside == (0 if name != "vit" else 2 * 64)  # the normalisation behind a transformer's blocks
    resnet = build_model(ModelConfig("resnet18"), info("cifar10"))
    behind = sum(parameters(resnet.get_submodule(f"layer{i}")) for i in (3, 4))
    for size, count, part in (("half", half, "layer3.0"), ("default", default, "layer3")):
        wanted = parameters(resnet.get_submodule(part)) / behind
        found = min(range(len(blocks) + 1), key=lambda n: abs(sum(inside[:n]) / sum(inside) - wanted))
        assert found == count
        auxiliary = build_auxiliary(config(name, narrow=False, size=size), info("cifar10"), model)
        *body, _ = auxiliary.children()
        assert sum(map(parameters, body)) == sum(inside[:count]) + outside


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
    every = [build_auxiliary(config("resnet18", size=size), info("cifar10"), model) for size in AUXILIARY_SIZES]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not any(t.data_ptr() in pointers for auxiliary in every for t in auxiliary.state_dict().values())
    modules = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not any(module() is not None for module in modules)
    assert len(every) == 4


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
    while not errors or (errors[-1] >= 0.95 * errors[0] and len(errors) < 80):
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


@pytest.mark.parametrize(
    ("name", "cut", "size", "kept"),
    [
        ("resnet18", "layer2", "layer3.0", "layer3.0"),
        ("resnet18", "layer2", "layer4", "layer3 layer4"),
        ("resnet18", "layer1", "layer2.1", "layer2"),
        ("cnn4", "block1", "block3", "block2 block3"),
        ("cnn4", "block2", "block3.bn", "block3.conv block3.bn"),
        ("vit", "block1", "block2", "block2 norm"),
        ("mlp", "relu1", "relu2", "fc2"),
        ("mobilenet_cifar", "block5", "block7.bn1", "block6 block7.depthwise block7.bn1"),  # inside of a block
        ("resnet20", "layer1.0", "layer2.0", "layer1.1 layer1.2 layer2.0"),  # the cut inside of a child
    ],
)
def test_a_module_ends_the_auxiliary_model(name: str, cut: str, size: str, kept: str) -> None:
    model = built(name, "cifar10")
    auxiliary = build_auxiliary(config(name, size=size, cut=cut), info("cifar10"), model)
    z = split(model, cut, info("cifar10").shape)[0](images("cifar10", 3))
    assert auxiliary(z).shape == (3, 10)
    *body, (last, head) = auxiliary.named_children()
    assert isinstance(head, nn.Linear)
    assert last == list(dict(model.named_children()))[-1]
    assert sum(parameters(module) for _, module in body) == sum(
        parameters(model.get_submodule(module)) for module in kept.split()
    )


def test_body_and_head_are_the_servers_own() -> None:
    """With the server's weights in its place, what is before the classifier is what the server computes there."""
    model = built("vit", "cifar10").eval()
    z = split(model, "block1")[0](images("cifar10", 3)).detach()
    auxiliary = build_auxiliary(config("vit", size="block2", cut="block1"), info("cifar10"), model).eval()
    auxiliary.load_state_dict({k: t for k, t in model.state_dict().items() if k in auxiliary.state_dict()})
    expected = model.fc(model.token(model.norm(model.block2(z))))
    torch.testing.assert_close(auxiliary(z), expected, rtol=0, atol=0)
    whole = built("cnn4", "cifar10").eval()
    z = split(whole, "block1")[0](images("cifar10", 3)).detach()
    auxiliary = build_auxiliary(config("cnn4", size="block4", cut="block1"), info("cifar10"), whole).eval()
    auxiliary.load_state_dict(split(whole, "block1")[1].state_dict())
    torch.testing.assert_close(auxiliary(z), split(whole, "block1")[1](z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ("hlaf", r"size=hlaf: expected a size .* or the module .*did you mean half\?"),
        ("layer2", r"size=layer2: .*choices: linear, half, default, full, layer3, layer4, avgpool"),  # the cut itself
        ("layer1.0", r"size=layer1\.0: expected"),
        ("fc", r"size=fc: expected"),
        ("layer3.0.conv1", r"size=layer3\.0\.conv1: expected a module after which one value crosses, as 2 do here"),
        ("layer3.0.relu", r"size=layer3\.0\.relu: expected"),  # runs twice
    ],
)
def test_modules_that_cannot_end_one(size: str, line: str) -> None:
    model = built("resnet18", "cifar10")
    with pytest.raises(ConfigError, match=line) as error:
        build_auxiliary(config("resnet18", size=size), info("cifar10"), model)
    assert "\n" not in str(error.value)


def test_a_module_that_is_not_there_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ConfigError, match=r"model\.auxiliary\.size=hlaf: .*did you mean half"):
        check_model(config("resnet18", size="hlaf"), info("cifar10"), ("client", "server", "auxiliary"))
    check_model(config("resnet18", size="layer3.0"), info("cifar10"), ("client", "server", "auxiliary"))


def test_no_weight_decay_unless_asked_for() -> None:
    decay = ("optimizer.weight_decay=0.1", "algorithm=fsl_sage")

    def options(*overrides: str) -> list[Any]:
        found = load_config(overrides)
        return [found.optimizer_for(name).options.get("weight_decay") for name in ("model", "server", "auxiliary")]

    for name in ("adam", "sgd"):
        assert options(f"optimizer={name}", *decay) == [0.1, 0.1, 0]
    assert options("optimizer=adamw", "algorithm=cse_fsl") == [None, None, 0]  # torch's own default is 0.01
    assert options(*decay, "model.auxiliary.optimizer=adamw") == [0.1, 0.1, 0]
    assert options(*decay, "model.auxiliary.optimizer.weight_decay=0.2") == [0.1, 0.1, 0.2]
    assert options(*decay, "model.auxiliary.optimizer.lr=0.2") == [0.1, 0.1, 0]
    assert options("optimizer.name=rprop") == [None, None, None]  # which has none


@pytest.mark.parametrize("algorithm", ["cse_fsl", "fsl_sage"])
def test_weight_decay_does_not_reach_the_auxiliary_model_of_a_run(algorithm: str) -> None:
    given = (f"algorithm={algorithm}", "num_clients=2", "rounds=1", "model=mlp")
    blueprint = Federation(load_config([*given, "optimizer.weight_decay=0.1"])).setup.blueprint
    groups = {
        name: blueprint.optimizer([(name, part)], lambda _: SchedulePoint(0, 1))
        ._optimizers[0]
        .param_groups[0]["weight_decay"]
        for name, part in blueprint.parts(("client", "server", "auxiliary")).items()
    }
    assert groups == {"client": 0.1, "server": 0.1, "auxiliary": 0}
