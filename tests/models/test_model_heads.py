"""Auxiliary heads: where they are attached, what they see, whom they teach."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import QUICK, SHALLOWER, built, config, images, info
from torch import Tensor, nn

from cutlayer.models import (
    AuxiliaryHeadsConfig,
    ModelConfig,
    body_and_head,
    build_auxiliary_heads,
    check_model,
    forward_with_blocks,
    head_blocks,
    register,
    split,
)
from cutlayer.models.registry import _ENTRIES
from cutlayer.models.splitting import children_of
from cutlayer.runtime.ground.config import ConfigError


def _with(name: str, *blocks: str) -> ModelConfig:
    return replace(config(name), parts={"auxiliary_heads": AuxiliaryHeadsConfig(blocks or None)})


def body_of(model: nn.Module) -> nn.Module:
    return body_and_head(model)[0]


def _children(name: str) -> list[str]:
    """The children of model `name` that a head may follow: from the first weights to the last but the classifier."""
    children = list(built(name, "digits").named_children())[:-1]
    first = next(i for i, (_, child) in enumerate(children) if list(child.parameters()))
    return [child for child, _ in children[first:]]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        *[(name, ["layer1", "layer2", "layer3"]) for name in ("resnet18", "resnet50", "resnet152")],
        *[(name, ["layer1", "layer2"]) for name in ("resnet20", "resnet32", "resnet56", "resnet110")],
        ("mobilenet_cifar", ["block4", "block7", "block10"]),
        ("cnn4", ["block1", "block2", "block3"]),
        ("vit", ["block1", "block2", "block3"]),  # of four blocks
        ("vgg", ["block2", "block4", "block6"]),
        ("mlp", ["relu1"]),
        ("cnn2", ["pool1", "pool2"]),
        ("simple_conv", ["norm1", "pool2", "relu3"]),
    ],
)
def test_default_blocks(name: str, blocks: list[str]) -> None:
    assert list(head_blocks(config(name), body_of(built(name, "digits")))) == blocks


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, [3, 6, 9]), (8, [2, 4, 6]), (6, [1, 3, 4]), (3, [1, 2]), (2, [1]), (1, [1])],
)
def test_default_blocks_of_a_transformer_are_at_its_quarters(depth: int, blocks: list[int]) -> None:
    shape = replace(config("vit"), options={"depth": depth, "hidden": 8, "heads": 2, "mlp": 8})
    torch.manual_seed(0)
    model = _ENTRIES["vit"].build(info("digits"), shape.typed_options())
    assert head_blocks(shape, body_of(model)) == tuple(f"block{i}" for i in blocks)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [(name, "digits") for name in SHALLOWER]
    + [(name, other) for name in QUICK for other in ("cifar10", "oblong", "pixel")],
)
def test_heads_give_logits_and_a_temperature(name: str, dataset: str) -> None:
    model, own = built(name, dataset), config(name)
    heads = build_auxiliary_heads(own, info(dataset), body_of(model))
    body, head = body_and_head(model)
    x = images(dataset, 3)
    output, outputs = forward_with_blocks(body, head_blocks(own, body_of(model)), x)
    assert len(heads) == len(outputs) > 0
    for attached, seen in zip(heads, outputs, strict=True):
        logits = attached(seen)
        assert logits.shape == (3, info(dataset).classes + 1)
        (weight,) = attached.parameters()  # and no bias
        pooled = seen.mean(1) if seen.dim() == 3 else seen.flatten(2).mean(2) if seen.dim() == 4 else seen
        torch.testing.assert_close(logits, pooled @ weight.T)
    assert head(output).shape == (3, info(dataset).classes)


@pytest.mark.parametrize("name", QUICK)
def test_outputs_are_those_of_the_model_cut_there(name: str) -> None:
    model = built(name, "digits").eval()
    body, head = body_and_head(model)
    children, x = _children(name), images("digits", 2)
    assert head_blocks(_with(name, *children), body_of(model)) == tuple(children)
    output, outputs = forward_with_blocks(body, children, x)
    assert torch.equal(head(output), model(x))
    for child, seen in zip(children, outputs, strict=True):
        client, server = split(model, child)
        assert torch.equal(seen, client(x))
        assert torch.equal(server(seen), head(output))


def test_modules_within_children() -> None:
    model = built("resnet18", "digits").eval()
    names = ("layer2.0", "layer2.0.conv1", "layer3.1", "layer1.0")
    body, x = body_and_head(model)[0], images("digits", 2)
    _, outputs = forward_with_blocks(body, names, x)
    stem = split(model, "layer1")[0](x)
    layer2 = model.get_submodule("layer2.0")
    assert torch.equal(outputs[0], layer2(stem))
    assert torch.equal(outputs[1], model.get_submodule("layer2.0.conv1")(stem))
    assert torch.equal(outputs[2], split(model, "layer3")[0](x))
    assert torch.equal(outputs[3], model.get_submodule("layer1.0")(split(model, "maxpool")[0](x)))
    # As the forward pass ends them, whatever the order in which they are named.
    assert head_blocks(_with("resnet18", *names), body_of(model)) == (
        "layer1.0",
        "layer2.0.conv1",
        "layer2.0",
        "layer3.1",
    )
    heads = build_auxiliary_heads(_with("resnet18", *names), info("digits"), body_of(model))
    assert [head.get_submodule("fc").in_features for head in heads] == [8, 16, 16, 32]


@pytest.mark.parametrize("name", ["vit", "cnn4"])
def test_every_module_has_an_output_or_says_why_not(name: str) -> None:
    model = built(name, "digits")
    body, _ = body_and_head(model)
    refused: list[str] = []
    heads: dict[str, nn.Module] = {}
    for block in [block for block, _ in body.named_modules() if block]:
        try:
            (heads[block],) = build_auxiliary_heads(_with(name, block), info("digits"), body_of(model))
        except ConfigError as error:
            refused.append(str(error))
    outputs = forward_with_blocks(body, list(heads), images("digits", 2))[1]
    assert len(outputs) == len(heads) > 0
    for head, seen in zip(heads.values(), outputs, strict=True):
        assert head(seen).shape == (2, 11)
    assert all(text.startswith("model.auxiliary_heads.blocks=block") and "\n" not in text for text in refused)
    # In each of four transformer blocks attention gives a pair, and a function, no call, runs its last layer.
    assert len(refused) == (8 if name == "vit" else 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_choice_of_blocks_in_any_order(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["cnn2", "cnn4", "mlp", "resnet20", "vit", "mobilenet_cifar"]))
    children = _children(name)
    blocks = data.draw(st.lists(st.sampled_from(children), min_size=1, unique=True))
    model = built(name, "digits").eval()
    chosen = head_blocks(_with(name, *blocks), body_of(model))
    assert chosen == tuple(child for child in children if child in blocks)
    assert len(build_auxiliary_heads(_with(name, *blocks), info("digits"), body_of(model))) == len(blocks)
    body, x = body_and_head(model)[0], images("digits", 2)
    output, outputs = forward_with_blocks(body, blocks, x)
    assert torch.equal(output, body(x))
    assert all(torch.equal(seen, split(model, child)[0](x)) for child, seen in zip(blocks, outputs, strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_a_head_teaches_what_is_before_it_and_nothing_else(name: str) -> None:
    model, own = built(name, "digits"), config(name)
    heads = build_auxiliary_heads(own, info("digits"), body_of(model))
    body, _ = body_and_head(model)
    blocks = head_blocks(own, body_of(model))
    for i, block in enumerate(blocks):
        model.zero_grad()
        heads.zero_grad()
        heads[i](forward_with_blocks(body, blocks, images("digits", 4))[1][i]).square().sum().backward()
        before = {key for key, _ in split(model, block)[0].named_parameters()}
        assert {key for key, p in model.named_parameters() if p.grad is not None} == before
        assert [any(p.grad is not None for p in head.parameters()) for head in heads] == [
            j == i for j in range(len(blocks))
        ]


def test_frozen_heads_hand_gradients_on_and_take_none() -> None:
    model, own = built("cnn4", "digits"), config("cnn4")
    heads = build_auxiliary_heads(own, info("digits"), body_of(model)).requires_grad_(False)
    outputs = forward_with_blocks(body_and_head(model)[0], head_blocks(own, body_of(model)), images("digits", 4))[1]
    heads[2](outputs[2]).square().sum().backward()
    assert all(p.grad is None for p in heads.parameters())
    gradient = dict(model.named_parameters())["block3.conv.weight"].grad
    assert gradient is not None
    assert bool(gradient.any())


@pytest.mark.parametrize("name", QUICK)
def test_attaching_leaves_the_model_alone(name: str) -> None:
    model = built(name, "digits")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(4)
    first = build_auxiliary_heads(config(name), info("digits"), body_of(model))
    torch.manual_seed(4)
    again = build_auxiliary_heads(config(name), info("digits"), body_of(model))
    other = build_auxiliary_heads(config(name), info("digits"), body_of(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
        assert not torch.equal(tensor, other.state_dict()[key])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "blocks", "reason"),
    [
        ("resnet18", ["layer5"], r"=layer5: .*did you mean layer4.*choices: conv1, bn1, relu, maxpool, layer1"),
        ("resnet18", ["layer2.7"], r"=layer2\.7: .*did you mean layer2\."),
        ("resnet18", ["layer1", "fc"], r"=fc: expected a module of the model before its classifier"),
        ("resnet18", [""], r"='': expected"),
        ("resnet18", ["layer1", "layer2", "layer1"], r"=layer1: expected each block once"),
        ("resnet18", ["layer2.0.relu"], r"=layer2\.0\.relu: expected a module that runs once"),
        ("resnet18", ["layer2.0.bn1"], r"=layer2\.0\.bn1: .*writes into"),
        ("mlp", ["flatten"], r"=flatten: .*something to learn"),
        (
            "vit",
            ["block2.self_attention"],
            r"=block2\.self_attention: expected a module that gives one tensor, not tuple",
        ),
        ("vit", ["block2.self_attention.out_proj"], r"=\S*out_proj: expected a module that runs"),
    ],
)
def test_blocks_that_cannot_have_a_head(name: str, blocks: list[str], reason: str) -> None:
    own = replace(config(name), parts={"auxiliary_heads": AuxiliaryHeadsConfig(tuple(blocks))})
    with pytest.raises(ConfigError, match=rf"^model\.auxiliary_heads\.blocks{reason}") as error:
        build_auxiliary_heads(own, info("digits"), body_of(built(name, "digits")))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=reason):
        check_model(own, info("digits"))


def test_no_blocks_at_all() -> None:
    with pytest.raises(ConfigError, match=r"blocks=\[\]: expected null or a list"):
        AuxiliaryHeadsConfig(())
    shallow = ModelConfig("mlp", options={"hidden": [8]})
    torch.manual_seed(0)
    model = _ENTRIES["mlp"].build(info("digits"), shallow.typed_options())
    with pytest.raises(ConfigError, match=r"model\.auxiliary_heads\.blocks=null: .*choices: flatten, fc1, relu1"):
        head_blocks(shallow, body_of(model))
    check_model(shallow, info("digits"))  # of no concern to a method without heads
    assert head_blocks(
        replace(shallow, parts={"auxiliary_heads": AuxiliaryHeadsConfig(("relu1",))}), body_of(model)
    ) == ("relu1",)


def test_checking_heads_neither_draws_nor_allocates() -> None:
    before = torch.random.get_rng_state()
    check_model(
        ModelConfig("resnet152", parts={"auxiliary_heads": AuxiliaryHeadsConfig(("layer1", "layer4"))}),
        info("ham10000"),
    )
    check_model(
        ModelConfig("vit", parts={"auxiliary_heads": AuxiliaryHeadsConfig(("block4",))}, options={"dropout": 0.5}),
        info("cifar10"),
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_hooks_go_even_when_the_pass_fails() -> None:
    body, _ = body_and_head(built("cnn4", "digits"))
    with pytest.raises(RuntimeError):
        forward_with_blocks(body, ["block1"], torch.zeros(1, 7, 8, 8))
    with pytest.raises(ConfigError, match="choices: block1, block2, block3, block4, flatten"):
        forward_with_blocks(body, ["block1", "block9"], images("digits", 1))
    assert not any(module._forward_hooks for module in body.modules())


def test_one_module_in_two_places_is_refused() -> None:
    relu = nn.ReLU()
    layers = {"a": nn.Linear(4, 4), "r1": relu, "b": nn.Linear(4, 4), "r2": relu, "fc": nn.Linear(4, 2)}
    model = nn.Sequential(OrderedDict(layers))
    body, head = body_and_head(model)
    x = torch.randn(3, 4)
    assert torch.equal(head(body(x)), model(x))
    with pytest.raises(ConfigError, match=r"blocks=r1: expected a module that runs once"):
        forward_with_blocks(body, ["r1"], x)
    for cut in ("a", "r1", "b", "r2"):
        client, server = split(model, cut)
        assert torch.equal(server(client(x)), model(x)), cut


def test_evaluation_under_inference_mode() -> None:
    model = built("resnet20", "digits").eval()
    body, _ = body_and_head(model)
    with torch.inference_mode():
        (seen,) = forward_with_blocks(body, ["layer2"], images("digits", 2))[1]
        assert torch.equal(seen, split(model, "layer2")[0](images("digits", 2)))


class _Odd(nn.Module):
    """Gives [b, 4, 1, 1, 1], which has no pixels or tokens to take a mean over."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, None, None, None]


def test_a_users_model_without_blocks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlayer.models.registry._ENTRIES", copy.copy(_ENTRIES))

    @register("own", cut="c1")
    def own(shape: object, _: object) -> nn.Sequential:
        layers: dict[str, nn.Module] = {}
        for i, width in enumerate((1, 2, 3, 4, 5), start=1):
            layers |= {f"c{i}": nn.Conv2d(width, width + 1, 1), f"n{i}": nn.BatchNorm2d(width + 1), f"r{i}": nn.ReLU()}
        layers |= {"flat": nn.Flatten(), "fc": nn.Linear(6 * 64, 10)}
        return nn.Sequential(OrderedDict(layers))

    model = own(info("digits"), None)
    # A normalisation belongs to its convolution; the last group is what the classifier sees.
    assert head_blocks(ModelConfig("own"), body_of(model)) == ("r2", "r3", "r4")
    odd = nn.Sequential(
        OrderedDict(flat=nn.Flatten(), a=nn.Linear(64, 4), odd=_Odd(), end=nn.Flatten(), fc=nn.Linear(4, 10))
    )
    with pytest.raises(ConfigError, match=r"blocks=odd: .*not \[2, 4, 1, 1, 1\]"):
        build_auxiliary_heads(
            ModelConfig("own", parts={"auxiliary_heads": AuxiliaryHeadsConfig(("odd",))}), info("digits"), body_of(odd)
        )


# ---------------------------------------------------------------------- body and classifier


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", QUICK)
def test_body_and_head_are_the_model(name: str, training: bool) -> None:
    model = built(name, "digits").train(training)
    body, head = body_and_head(model)
    assert body.training == head.training == training
    assert [*body.state_dict(), *head.state_dict()] == list(model.state_dict())
    own = model.state_dict()
    assert all(
        t.data_ptr() == own[key].data_ptr() for key, t in [*body.state_dict().items(), *head.state_dict().items()]
    )
    assert list(head.state_dict()) == [f"{list(children_of(model))[-1]}.{kind}" for kind in ("weight", "bias")]
    x = images("digits", 3)
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    assert torch.equal(head(body(x)), expected)


def test_models_without_a_body_or_a_classifier_of_their_own() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for model, reason in (
        (tied, "the classifier 1 shares weights"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "needs weights in its last child"),
        (nn.Sequential(nn.Linear(4, 2), nn.LogSoftmax(1)), "needs weights in its last child"),
        (nn.Sequential(), "needs weights in its last child"),
        (nn.Linear(4, 2), "Sequential of named children"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.name.*{reason}"):
            body_and_head(model)
