"""Parts of models cut anywhere: what they compute, what they own, and which cuts are refused."""

import copy
import pickle
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.models.cutting import CutError, Part, composed, split_module

IMAGES = {
    "resnet18": ("conv1", "bn1", "layer1.0.conv1", "layer3.1.bn2", "avgpool"),
    "resnet50": ("layer1.0.downsample.0", "layer4.2.conv3"),
    "vgg11_bn": ("features.14", "features", "classifier.1"),
    "mobilenet_v2": ("features.0", "features.3", "features.3.conv.1", "features.18.0"),
    "densenet121": ("features.denseblock2.denselayer3", "features.transition2.norm"),
    "efficientnet_b0": ("features.1", "features.3.0.block.1", "features.6.1.block.2.fc1"),
    "squeezenet1_0": ("features.3.expand1x1", "features.7"),
}


def image_model(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision on its future defaults
        model = torchvision.models.get_model(name, weights=None, num_classes=10)
    if isinstance(model, torchvision.models.VGG):  # 120 of its 129 million parameters are here
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


def grown(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


Outcome = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def outcome(parts: Sequence[nn.Module], inputs: dict[str, Any], mode: bool) -> Outcome:
    """The output of copies of the parts, one after another, all their gradients, and all their state afterwards."""
    modules = [copy.deepcopy(part).train(mode) for part in parts]
    torch.manual_seed(7)
    output = composed(modules, **inputs)
    output = output if isinstance(output, Tensor) else output[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: value for module in modules for name, value in grown(module).items()}
    buffers = {name: value for module in modules for name, value in module.state_dict().items()}
    return output.detach(), gradients, buffers


def same_as_the_model(model: nn.Module, parts: Sequence[nn.Module], inputs: dict[str, Any], mode: bool) -> None:
    """Outputs and gradients to the bit of one thread's order of sums, running statistics to the bit."""
    same_outcome(outcome([model], inputs, mode), outcome(parts, inputs, mode))


def same_outcome(of_model: Outcome, of_them: Outcome) -> None:
    (expected, gradients, state), (found, of_parts, after) = of_model, of_them
    assert torch.equal(found, expected)
    assert of_parts.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(of_parts[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@lru_cache(maxsize=1)
def of_images(name: str) -> tuple[nn.Module, list[tuple[bool, dict[str, Any], Outcome]]]:
    """A model, and what it comes to by itself in training and in evaluation."""
    torch.manual_seed(0)
    model = image_model(name)
    given = [(True, {"x": torch.randn(4, 3, 32, 32)}), (False, {"x": torch.randn(3, 3, 32, 32)})]
    return model, [(mode, inputs, outcome([model], inputs, mode)) for mode, inputs in given]


@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name, cuts in IMAGES.items() for cut in cuts])
def test_two_parts_are_the_model(name: str, cut: str) -> None:
    model, expected = of_images(name)
    parts = split_module(model, [cut], {"x": torch.randn(2, 3, 32, 32)}, check=False)
    for mode, inputs, of_model in expected:  # of other sizes than the one that the model was cut with
        same_outcome(of_model, outcome(parts, inputs, mode))
    assert sorted(name for part in parts for name in part.state_dict()) == sorted(model.state_dict())
    first = parts[0].state_dict()
    assert cut.split(".")[0] in {key.split(".")[0] for key in first} or not list(
        model.get_submodule(cut).parameters()
    ), "the module that ends the part is the part's own"


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("resnet18", ["conv1", "layer4"]),
        ("resnet18", ["layer1.0.bn1", "layer3.1.conv2"]),
        ("vgg11_bn", ["features.3", "classifier.0"]),
        ("mobilenet_v2", ["features.2", "features.9.conv.0", "features.18"]),
    ],
)
def test_three_and_more_parts_are_the_model(name: str, cuts: list[str]) -> None:
    torch.manual_seed(0)
    model, x = image_model(name), torch.randn(2, 3, 64, 64)
    parts = split_module(model, cuts, {"x": x})
    assert len(parts) == len(cuts) + 1
    for mode in (True, False):
        same_as_the_model(model, parts, {"x": x}, mode)
    assert sorted(name for part in parts for name in part.state_dict()) == sorted(model.state_dict())


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model, x = torchvision.models.VisionTransformer(**sizes, num_classes=10, dropout=0.1), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros, which hide what is before
    crossing = {}
    block = "encoder.layers.encoder_layer"
    for cut in ("conv_proj", "encoder.dropout", f"{block}_0", f"{block}_1.ln_2"):
        parts = split_module(model, [cut], {"x": x})
        for mode in (True, False):
            same_as_the_model(model, parts, {"x": x}, mode)
        crossing[cut] = parts[0].train().crossing
    # Behind the second normalisation the residual stream is used again, as the two values that it is the sum of.
    assert list(crossing.values()) == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("resnet18.a1_in1k", "layer2.0.conv1"),
        ("resnet18.a1_in1k", "layer3"),
        ("mobilenetv3_small_100", "blocks.2"),
        ("efficientnet_b0", "blocks.1.0.conv_pw"),
        ("convnext_atto", "stages.1"),
        ("vit_tiny_patch16_224", "blocks.3"),
    ],
)
def test_models_of_timm(name: str, cut: str) -> None:
    timm = pytest.importorskip("timm", reason='timm is not installed (pip install -e ".[timm]")')
    torch.manual_seed(0)
    sizes = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=10, drop_rate=0.1, **sizes)
    parts = split_module(model, [cut], {"x": torch.randn(2, 3, 32, 32)})
    for mode in (True, False):
        same_as_the_model(model, parts, {"x": torch.randn(2, 3, 32, 32)}, mode)


def tokens() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": torch.randint(1, 100, (2, 7)), "attention_mask": mask}


def language_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    few = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(**few, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2Model(config), tokens() | {"use_cache": False}
    if name == "gpt2_lm":
        config = transformers.GPT2Config(**few, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config), {"input_ids": tokens()["input_ids"], "use_cache": False}
    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**few, **sizes, num_attention_heads=2, num_key_value_heads=1)
        return transformers.LlamaModel(config), tokens() | {"use_cache": False}
    config = transformers.DistilBertConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    return transformers.DistilBertForSequenceClassification(config), tokens()


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("gpt2", ["drop"]),
        ("gpt2", ["h.0"]),
        ("gpt2", ["h.0.attn"]),
        ("gpt2", ["h.1.mlp.c_fc"]),
        ("gpt2", ["h.0", "h.1"]),
        ("distilbert", ["distilbert.embeddings"]),
        ("distilbert", ["distilbert.transformer.layer.0.attention"]),
        ("distilbert", ["distilbert.transformer.layer.1", "pre_classifier"]),
        ("llama", ["embed_tokens"]),
        ("llama", ["layers.0"]),
        ("llama", ["layers.1.self_attn"]),
        ("llama", ["layers.0.mlp.gate_proj"]),
    ],
)
def test_language_models(name: str, cuts: list[str]) -> None:
    model, inputs = language_model(name)
    parts = split_module(model, cuts, inputs)
    given = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    for mode in (True, False):
        constant = {} if name == "distilbert" else {"use_cache": False}
        whole = copy.deepcopy(model).train(mode)
        halves = [copy.deepcopy(part).train(mode) for part in parts]
        torch.manual_seed(3)
        expected = whole(**given, **constant)[0]
        torch.manual_seed(3)
        assert torch.equal(composed(halves, **given)[0], expected)


def test_tied_weights_are_divided_only_when_asked() -> None:
    model, inputs = language_model("gpt2_lm")
    with pytest.raises(CutError, match=r"transformer\.wte\.weight and lm_head\.weight, on either side, are one tensor"):
        split_module(model, ["transformer.h.0"], inputs)
    client, server = (copy.deepcopy(part) for part in split_module(model, ["transformer.h.0"], inputs, untie=True))
    model.eval()(**inputs)[0].square().sum().backward()
    composed([client.eval(), server.eval()], input_ids=inputs["input_ids"])[0].square().sum().backward()
    names = ((model, "lm_head.weight"), (client, "transformer.wte.weight"), (server, "lm_head.weight"))
    tied, embedding, head = (module.get_parameter(name).grad for module, name in names)
    assert model.get_parameter("transformer.wte.weight") is model.get_parameter("lm_head.weight")
    torch.testing.assert_close(embedding + head, tied)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.act = nn.ReLU(inplace=True)
        self.same = nn.Identity()


class InPlace(Block):
    """The rectifier writes into what the layer before it gave, and an identity hands it on."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.same(self.act(self.one(x)))
        return self.two(h) + h


class WritesInto(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h += 1
        h = self.same(h * 2) + h
        return self.two(h)


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        scaled = h * self.gamma
        return self.two(self.same(h)) + scaled


class Twice(Block):
    """The rectifier and the identity run on either side."""

    def forward(self, x: Tensor) -> Tensor:
        return self.same(F.relu(self.two(self.same(self.one(x)))))


class Input(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) + x


class FunctionalDropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.one(x), 0.5, self.training)
        return self.two(self.same(h)) + h


class ByAnotherName(Block):
    """A layer used through its weight, which no hook sees."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.same(F.linear(x, self.one.weight)))


class Unused(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(x)


class OnlyInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h) + self.same(h) * self.gamma if self.training else self.two(h)


class Looped(nn.Module):
    """A list that nobody calls, walked through; the last layer skips over the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for layer in self.layers:
            x = layer(x).relu()
            kept.append(x)
        return sum(kept[1:], kept[0])


@pytest.mark.parametrize(
    ("kind", "cut", "crossing"),
    [
        (InPlace, "one", 1),
        (InPlace, "act", 1),
        (InPlace, "same", 1),
        (WritesInto, "one", 1),
        (WritesInto, "same", 2),
        (Twice, "one", 1),
        (Twice, "two", 1),
        (OnlyInTraining, "one", 1),
        (Looped, "layers.0", 1),
        (Looped, "layers.2", 3),
    ],
)
def test_peculiar_modules(kind: type[nn.Module], cut: str, crossing: int) -> None:
    torch.manual_seed(0)
    model = kind()
    parts = split_module(model, [cut], {"x": torch.randn(3, 4)})
    for mode in (True, False):
        same_as_the_model(model, parts, {"x": torch.randn(5, 4)}, mode)
    assert parts[0].train().crossing == crossing


@pytest.mark.parametrize(
    ("kind", "cuts", "why"),
    [
        (Scaled, ["same"], r"made with the parameter gamma itself would cross"),
        (Twice, ["same"], "runs 2 times"),
        (Input, ["one"], "uses its input x again"),
        (FunctionalDropout, ["same"], "is not the model's"),
        (Unused, ["one"], "no forward pass calls it"),
        (Unused, ["three"], "the model has no such module"),
        (InPlace, ["two", "one"], "it ends before the cut named before it"),
        (Looped, ["layers"], "no forward pass calls it"),
    ],
)
def test_cuts_that_are_refused(kind: type[nn.Module], cuts: list[str], why: str) -> None:
    model = kind()
    before = copy.deepcopy(model.state_dict())
    model.eval()
    state = torch.get_rng_state()
    with pytest.raises(CutError, match=why):
        split_module(model, cuts, {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))})
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_hooks_cannot_see_fails_the_comparison() -> None:
    """Its weight belongs to a part that never runs the layer: without the comparison the parts would be accepted."""
    model, x = ByAnotherName(), torch.randn(3, 4)
    with pytest.raises(CutError, match="the parts"):
        split_module(model, ["same"], {"x": x})


def reachable(module: nn.Module) -> set[int]:
    """Storages that a part holds, in whatever attribute."""
    found: set[int] = set()
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            visit(vars(value))

    visit(module)
    return found - {0}


@pytest.mark.parametrize("cut", ["layer2.0.conv1", "layer3"])
def test_parts_copy_pickle_and_hold_nothing_of_each_other(cut: str) -> None:
    torch.manual_seed(0)
    model, x = image_model("resnet18"), torch.randn(2, 3, 32, 32)
    client, server = split_module(model, [cut], {"x": x}, check=False)
    assert not reachable(client) & reachable(server)
    own = {tensor.untyped_storage().data_ptr() for tensor in client.state_dict().values()}
    assert reachable(client) & reachable(model) == own
    expected = model.eval()(x)
    for copies in ([copy.deepcopy(client), copy.deepcopy(server)], pickle.loads(pickle.dumps([client, server]))):
        halves = [half.eval() for half in copies]
        assert torch.equal(composed(halves, x=x), expected)
        assert not reachable(halves[0]) & reachable(client)
    z = client.eval()(x)
    assert not any(wire.values for wire in (client._wire, server._wire)), "a pass leaves nothing behind"
    with pytest.raises((TypeError, ValueError)):
        server(*(value[..., :1] for value in (z if isinstance(z, tuple) else (z,))))
    with pytest.raises(TypeError, match="expected"):
        server()


def test_parts_change_precision_and_run_under_autocast() -> None:
    torch.manual_seed(0)
    model, x = image_model("resnet18"), torch.randn(2, 3, 32, 32)
    parts = split_module(model, ["layer2.1.conv1"], {"x": x}, check=False)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            expected = copy.deepcopy(model).train(mode)(x)
            halves = [copy.deepcopy(part).train(mode) for part in parts]
            found = composed(halves, x=x)
        assert torch.equal(found, expected)
    double = [copy.deepcopy(part).double().eval() for part in parts]
    assert torch.equal(composed(double, x=x.double()), copy.deepcopy(model).double().eval()(x.double()))


def test_a_trained_model_loads_back() -> None:
    torch.manual_seed(0)
    model, x = image_model("mobilenet_v2"), torch.randn(4, 3, 32, 32)
    parts = [copy.deepcopy(part) for part in split_module(model, ["features.5.conv.1"], {"x": x}, check=False)]
    for modules in (parts, [model]):
        torch.manual_seed(1)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
        F.cross_entropy(composed(modules, x=x), torch.arange(4)).backward()
        for optimizer in optimizers:
            optimizer.step()
    plain = image_model("mobilenet_v2")
    plain.load_state_dict({name: value for part in parts for name, value in part.state_dict().items()}, strict=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value)


def test_a_part_is_a_module_like_any_other() -> None:
    model, x = image_model("resnet18"), torch.randn(2, 3, 32, 32)
    client, server = split_module(model, ["layer2"], {"x": x}, check=False)
    assert isinstance(client, Part)
    assert client.training
    client.eval()
    assert not client.get_submodule("layer1.0").training
    for part, other in ((client, server), (server, client)):
        part.load_state_dict(part.state_dict(), strict=True)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            part.load_state_dict({**part.state_dict(), **other.state_dict()}, strict=True)
        with pytest.raises(RuntimeError, match="Missing key"):
            part.load_state_dict({}, strict=True)
    assert sum(p.numel() for part in (client, server) for p in part.parameters()) == 11_181_642
    client.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in client.parameters())
