"""Features: what the classifier takes, given by the whole model, by copies of it and by the parts of any cut."""

import copy
import pickle
from typing import Any

import pytest
import torch
from model_cases import MODELS, QUICK, built, images, info
from torch import Tensor, nn
from torchvision.models import vgg11

from cutlayer.models import ModelConfig, Projector, build_model, default_cut, feature_width, give_features, split
from cutlayer.runtime.ground.config import ConfigError

TORCHVISION = "torchvision/mobilenet_v2"
CUTS = [
    *[("resnet18", cut, "fc") for cut in ("layer2", "layer1.0", "layer1.0.conv1", "avgpool")],
    *[("vgg", cut, "fc") for cut in ("block2", "block1.conv")],
    *[("vit", cut, "fc") for cut in ("block3", "block1.mlp")],
    *[(TORCHVISION, cut, "classifier.1") for cut in ("features.1", "features.3.conv.0")],
]


def _model(name: str, dataset: str) -> nn.Module:
    if name in MODELS:
        return built(name, dataset)
    torch.manual_seed(0)
    return build_model(ModelConfig(name, options={"width_mult": 0.25, "dropout": 0.0}), info(dataset))


def _with_grad(*modules: nn.Module) -> set[str]:
    return {name for module in modules for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "cut", "classifier"), CUTS)
def test_parts_give_what_the_classifier_takes(name: str, cut: str, classifier: str, training: bool) -> None:
    plain = _model(name, "cifar10").train(training)
    model = copy.deepcopy(plain)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    shape = info("cifar10").shape
    assert give_features(model, shape) == classifier
    assert model.training is training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    x = images("cifar10", 4)
    client, server = split(model, cut, shape)
    crossed = client(x)
    features = server(*crossed) if isinstance(crossed, tuple) else server(crossed)
    assert features.shape == (4, feature_width(model, shape))
    head = plain.get_submodule(classifier)
    torch.testing.assert_close(head(features), plain(x), rtol=1e-4, atol=1e-5)

    features.square().sum().backward()
    assert _with_grad(client, server) == {
        key for key, _ in model.named_parameters() if not key.startswith(f"{classifier}.")
    }


@pytest.mark.parametrize("name", QUICK)
def test_each_model_and_its_copies_give_features(name: str) -> None:
    plain = built(name, "digits").eval()
    model = copy.deepcopy(plain)
    classifier = give_features(model, info("digits").shape)
    x = images("digits", 3)
    features = model(x)
    assert torch.equal(plain.get_submodule(classifier)(features), plain(x))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), features)
    client, server = split(model, default_cut(name))
    assert torch.equal(copy.deepcopy(server)(copy.deepcopy(client)(x)), features)


class _Map(nn.Module):
    """A classifier of 1x1 convolution, its logits flattened (`pooled` False) or pooled afterwards."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.body, self.pool, self.classifier = nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(4, 10, 1)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return self.pool(self.classifier(z)).flatten(1) if self.pooled else self.classifier(self.pool(z)).flatten(1)


def test_maps_are_averaged_and_a_model_that_goes_on_is_refused() -> None:
    model, x = _Map(pooled=False), images("digits", 2)
    assert give_features(model, info("digits").shape) == "classifier"
    assert torch.allclose(model(x), model.body(x).mean((2, 3)))
    going_on = _Map(pooled=True)
    expected = going_on(x)
    with pytest.raises(ConfigError, match=r"^model.name: a model whose last layer is its classifier, which is") as e:
        give_features(going_on, info("digits").shape)
    assert "\n" not in str(e.value)
    assert torch.equal(going_on(x), expected), "the refused model is as it was"
    bare: list[Any] = [nn.Sequential(), nn.Sequential(nn.Linear(4, 2), nn.LogSoftmax(1)), nn.Flatten()]
    for model in bare:
        with pytest.raises(ConfigError, match="weights in its last module"):
            give_features(model, (4,))


def test_dropout_before_the_classifier_is_part_of_the_features() -> None:
    """torchvision's VGG: the classifier's last layer is the classifier, and takes what dropout lets through."""
    model = vgg11(num_classes=7)
    assert give_features(model, (3, 32, 32)) == "classifier.6"
    with torch.no_grad():
        assert (model.train()(images("cifar10", 2)) == 0).float().mean() > 0.5
    assert feature_width(model, (3, 32, 32)) == 4096


def test_the_projector_is_two_layers() -> None:
    projector = Projector(6)
    assert [name for name, _ in projector.named_parameters()] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert projector(torch.zeros(2, 6)).shape == (2, 1024)
    small = Projector(3, 5, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    w1, b1, w2, b2 = (p.detach().numpy() for p in small.parameters())
    hidden = (x.numpy() @ w1.T + b1).clip(min=0)
    torch.testing.assert_close(small(x).detach(), torch.from_numpy(hidden @ w2.T + b2))
