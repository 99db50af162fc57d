"""A cut gives two parts that together are the model: values, gradients, names, ownership."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from model_cases import DEEP, MODELS, SHALLOWER, built, config, images, info, settle
from torch import Tensor, nn

from cutlayer.models import ModelConfig, build_model, check_model, cuts, default_cut, split
from cutlayer.models.registry import entry
from cutlayer.runtime.ground.config import ConfigError


def _cuts_to_try(name: str) -> tuple[str, ...]:
    if name in DEEP:
        return (default_cut(name),)
    with torch.device("meta"):
        return cuts(entry(name).build(info("digits"), config(name).typed_options()))


CASES = [(name, cut) for name in MODELS for cut in _cuts_to_try(name)]


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "cut"), CASES)
def test_parts_compose_to_the_model(name: str, cut: str, training: bool) -> None:
    model = built(name, "digits")
    settle(model)
    with torch.no_grad():
        model(images("digits", 8))
    model.train(training)
    client, server = split(copy.deepcopy(model), cut)
    assert client.training == server.training == training
    x, y = images("digits", 4), torch.tensor([0, 3, 9, 1])

    whole = model(x)
    F.cross_entropy(whole, y).backward()
    z = client(x)
    received = z.detach().clone().requires_grad_()
    before = received.detach().clone()
    logits = server(received)
    F.cross_entropy(logits, y).backward()
    assert torch.equal(received, before), "the server part wrote into what it received"
    assert received.grad is not None
    z.backward(received.grad)

    assert bool(whole.isfinite().all())
    assert torch.equal(logits, whole)
    expected, got = _gradients(model), _gradients(client) | _gradients(server)
    assert expected.keys() == got.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    buffers = dict(client.named_buffers()) | dict(server.named_buffers())
    assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())


@pytest.mark.parametrize(("name", "cut"), CASES)
def test_parts_share_names_out_and_no_storage(name: str, cut: str) -> None:
    model = built(name, "digits")
    client, server = split(model, cut)
    assert [*client.state_dict(), *server.state_dict()] == list(model.state_dict())
    storages = [{t.untyped_storage().data_ptr() for t in part.state_dict().values()} for part in (client, server)]
    assert not storages[0] & storages[1]
    assert any(p.requires_grad for p in client.parameters())
    # The model's own tensors, so that what trains the parts trains the model.
    own = model.state_dict()
    assert all(t.data_ptr() == own[key].data_ptr() for key, t in server.state_dict().items())


@pytest.mark.parametrize("name", SHALLOWER)
def test_parts_copy_and_pickle(name: str) -> None:
    model = built(name, "digits")
    settle(model)
    with torch.no_grad():
        model(images("digits", 8))
    model.eval()
    client, server = split(model, default_cut(name))
    x = images("digits", 2)
    expected = model(x)
    assert bool(expected.isfinite().all())
    for again in (copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))):
        assert torch.equal(again(server)(again(client)(x)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_cuts_are_the_children_but_the_last(name: str) -> None:
    model = built(name, "digits")
    children = [child for child, _ in model.named_children()]
    # What has no parameter before it has any, such as a perceptron's flatten, would be a client with nothing to learn.
    learning = [any(True for _ in child.parameters()) for child in model.children()]
    assert list(cuts(model)) == children[learning.index(True) : -1]
    assert default_cut(name) in cuts(model)


@pytest.mark.parametrize("cut", ["layer5", "fc", "layer2.0", ""])
def test_bad_cut_says_which_are_good(cut: str) -> None:
    with pytest.raises(ConfigError) as error:
        split(built("resnet18", "digits"), cut)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"model.cut={cut or repr('')}: expected")
    assert "choices: conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool" in text
    if cut in ("layer5", "layer2.0"):
        assert "did you mean layer" in text
    if cut == "layer2.0":  # inside of a child: for the general splitter, which needs the images' shape
        client, _ = split(built("resnet18", "digits"), cut, info("digits").shape)
        assert "layer2.0.bn2.weight" in client.state_dict()
    else:
        with pytest.raises(ConfigError, match=r"model\.cut"):
            check_model(config("resnet18", cut=cut), info("digits"))


def test_cut_through_tied_weights_is_refused() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    with pytest.raises(ConfigError, match="shared"):
        split(tied, "1")
    client, _ = split(tied, "2")
    assert len(list(client.children())) == 3


def test_a_model_that_is_not_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="Sequential"):
        cuts(nn.Linear(2, 2))


def test_checking_neither_draws_nor_allocates() -> None:
    before = torch.random.get_rng_state()
    check_model(ModelConfig("resnet152"), info("ham10000"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_follow_the_global_seed() -> None:
    first, again, other = (built("simple_conv", "digits", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["simple_conv", "resnet20"])
def test_parts_train_in_half_and_double_precision(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        client, server = split(built(name, "digits").to(dtype), default_cut(name))
        logits = server(client(images("digits", 2).to(dtype)))
        logits.sum().backward()
        assert logits.dtype == dtype


def test_options_are_checked_where_they_are_given() -> None:
    with pytest.raises(ConfigError, match=r"options\.widht: no such key; did you mean options\.width"):
        ModelConfig("resnet18", options={"widht": 8})
    for name, options in (("resnet20", {"width": 0}), ("mlp", {"hidden": []}), ("resnet18", {"width": "8"})):
        with pytest.raises(ConfigError, match=r"options\.(width|hidden)="):
            ModelConfig(name, options=options)
    with pytest.raises(ConfigError, match=r"name=resnet19: .*did you mean resnet1"):
        ModelConfig("resnet19")
    narrow = build_model(ModelConfig("resnet20", options={"width": 4}), info("digits"))
    assert dict(narrow.named_parameters())["fc.weight"].shape == (10, 16)
