"""Models of other libraries: built by name as their own library builds them, or refused in one line."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cutlayer.datasets import DatasetInfo
from cutlayer.models import ModelConfig, build_model, check_model, cuts, input_channels, split
from cutlayer.models.registry import sources
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.launching.model_names import SOURCES, chosen_model
from tests.audited import watched

OWN = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_channels=7, width=5):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Lazy(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.LazyLinear(classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Fixed(nn.Module):
    """Made for one size of image."""

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(64 * 64, classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


class Squeezed(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


class Looking(Net):
    """Its path depends on values, which the meta device does not have."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def sequence(info, width=4):
    first = nn.Linear(info.height * info.width, width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, info.classes))


def broken(classes):
    raise RuntimeError("first line\\nsecond line")


def number():
    return 3


def nothing_to_learn():
    return nn.Flatten()


MADE = nn.Linear(2, 3)
CONSTANT = 3
'''


@pytest.fixture(autouse=True, scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package of a user's own, `own_models.net`, on the import path."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_models").mkdir()
    (folder / "own_models" / "__init__.py").touch()
    (folder / "own_models" / "net.py").write_text(OWN, encoding="utf-8")
    (folder / "own_models" / "bad.py").write_text("import missing_package_of_somebody\n", encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_models"]:
        del sys.modules[name]


def info(channels: int = 3, side: int = 32, classes: int = 10) -> DatasetInfo:
    return DatasetInfo("some", channels, side, side, classes, tuple(map(str, range(classes))))


def seeded(make: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return make().state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_hydra_knows_the_sources_that_are_registered() -> None:
    assert set(SOURCES) == set(sources())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model/torchvision/resnet18", "torchvision/resnet18"),
        ("model/timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("model/import/my_package.net.Net.yaml", "import/my_package.net.Net"),
        ("model/torchvision/", None),
        ("model/torchvision", None),
        ("model/cnn2", None),
        ("dataset/torchvision/resnet18", None),
        ("model/other/resnet18", None),
    ],
)
def test_paths_of_configs(path: str, name: str | None) -> None:
    assert chosen_model(path) == name


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18.a1_in1k", "import/my_package.net.Net"])
def test_a_name_is_an_ordinary_choice_of_the_group(name: str) -> None:
    chosen, plain = (
        load_config([f"model={name}", "model.client.optimizer.lr=0.5"]).model,
        load_config(["model=cnn2"]).model,
    )
    assert chosen.name == name
    assert chosen.part("client").optimizer == {"lr": 0.5}
    assert (chosen.cut, chosen.init, chosen.part("server"), chosen.options) == (None, None, plain.part("server"), {})


def test_an_experiment_may_choose_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import compose, initialize_config_dir

    from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR

    (tmp_path / "experiment").mkdir()
    content = "# @package _global_\ndefaults:\n  - override /model: torchvision/vgg11_bn\n"
    (tmp_path / "experiment" / "own.yaml").write_text(content, encoding="utf-8")
    given = ["experiment=own", f"hydra.searchpath=[file://{tmp_path}]"]
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        assert compose("config", overrides=given).model.name == "torchvision/vgg11_bn"


# ---------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_model_of_torchvision_is_torchvisions_own(name: str) -> None:
    ours = seeded(lambda: build_model(ModelConfig(f"torchvision/{name}"), info(classes=7)))
    builder = getattr(torchvision.models, name)
    assert equal(ours, seeded(lambda: builder(num_classes=7)))


def test_options_go_to_the_builder() -> None:
    options = {"width_per_group": 128, "zero_init_residual": True}
    ours = seeded(lambda: build_model(ModelConfig("torchvision/resnet50", options=options), info()))
    assert equal(ours, seeded(lambda: torchvision.models.resnet50(num_classes=10, **options)))


def test_a_vision_transformer_follows_the_size_of_the_images() -> None:
    config = ModelConfig("torchvision/vit_b_32")
    assert input_channels(config, info(side=64)) == 3
    with torch.device("meta"):
        model = build_model(config, info(side=64))
    assert model.encoder.pos_embedding.shape == (1, 1 + (64 // 32) ** 2, 768)  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("inception_v3", 96)])
def test_auxiliary_classifiers_are_left_out(name: str, side: int) -> None:
    config = ModelConfig(f"torchvision/{name}")
    assert input_channels(config, info(side=side)) == 3
    with torch.device("meta"):
        assert not [key for key in build_model(config, info(side=side)).state_dict() if "aux" in key.lower()]
    with pytest.raises(ConfigError, match=r"not \w+Outputs as in training"):
        input_channels(ModelConfig(f"torchvision/{name}", options={"aux_logits": True}), info(side=299))


@pytest.mark.parametrize(
    "name", ["densenet121", "mnasnet0_5", "shufflenet_v2_x0_5", "swin_t", "vit_b_16", "regnet_x_400mf"]
)
def test_all_kinds_take_images_of_their_usual_size(name: str) -> None:
    state = torch.get_rng_state()
    assert input_channels(ModelConfig(f"torchvision/{name}"), info(side=224)) == 3
    assert torch.equal(torch.get_rng_state(), state), "looking at a model uses no random numbers up"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet81", {}, "did you mean torchvision/resnet18?"),
        ("fasterrcnn_resnet50_fpn", {}, "one of the 80 classifiers"),
        ("resnet18", {"pretrained": True}, "model.options.pretrained=true: expected no trained weights"),
        ("resnet18", {"weights": "DEFAULT"}, "model.options.weights=DEFAULT: expected no trained weights"),
        ("resnet18", {"depth": 3}, "model.options={depth:3}: expected what torchvision/resnet18 can be built with"),
    ],
)
def test_what_torchvision_does_not_have(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        input_channels(ModelConfig(f"torchvision/{name}", options=options), info())
    assert text.replace("80", str(len(torchvision.models.list_models(module=torchvision.models)))) in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- what goes in and what comes out


@pytest.mark.parametrize(
    ("name", "given", "seen"),
    [
        ("torchvision/resnet18", 1, 3),
        ("torchvision/resnet18", 3, 3),
        ("import/own_models.net.Net", 1, 1),
        ("import/own_models.net.Net", 5, 5),
        ("cnn2", 1, 1),
        ("cnn2", 4, 4),
    ],
)
def test_grey_images_are_repeated_only_for_a_model_that_wants_colours(name: str, given: int, seen: int) -> None:
    assert input_channels(ModelConfig(name), info(given)) == seen


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="for images of 2 channels; its first convolution takes 3"):
        input_channels(ModelConfig("torchvision/resnet18"), info(2))


@pytest.mark.parametrize(
    ("name", "side", "suggested"),
    [
        # 32 can be halved five times, AlexNet needs 63, and 224 is the first of the sizes that 14 divides.
        ("torchvision/vgg11", 8, 32),
        ("torchvision/alexnet", 32, 64),
        ("torchvision/vit_h_14", 32, 224),
        ("torchvision/maxvit_t", 32, 224),
        ("import/own_models.net.Fixed", 8, 64),
        ("import/own_models.net.Fixed", 96, 64),
    ],
)
def test_images_of_a_wrong_size_give_the_size_that_would_do(name: str, side: int, suggested: int) -> None:
    channels = 1 if name.endswith("Fixed") else 3
    with pytest.raises(ConfigError) as error:
        input_channels(ModelConfig(name), info(channels, side))
    wanted = f"dataset.resize: {name} takes images of {suggested}x{suggested} and not of {side}x{side}"
    assert str(error.value).startswith(wanted)
    assert f"dataset.resize={suggested}" in str(error.value)
    assert input_channels(ModelConfig(name), info(channels, suggested)) == channels


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("import/own_models.net.Pair", "one tensor of logits, not tuple as in training"),
        ("import/own_models.net.Squeezed", "logits [1, 10] for 1 images, not [10]"),
        ("import/torchvision.models.resnet18", "logits [2, 10] for 2 images, not [2, 1000]"),
    ],
)
def test_a_model_that_is_no_classifier_of_the_dataset_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        input_channels(ModelConfig(name), info())
    assert text in str(error.value)


def test_a_model_that_looks_at_values_is_tried_with_values() -> None:
    assert input_channels(ModelConfig("import/own_models.net.Looking"), info(1)) == 1


# ---------------------------------------------------------------------- one's own


def test_an_imported_class_gets_facts_of_the_dataset_and_takes_options() -> None:
    net = importlib.import_module("own_models.net")
    ours = seeded(
        lambda: build_model(ModelConfig("import/own_models.net.Net", options={"width": 3}), info(2, classes=6))
    )
    assert equal(ours, seeded(lambda: net.Net(6, 2, 3)))
    overruled = build_model(ModelConfig("import/own_models.net.Net", options={"in_channels": 3}), info(1))
    assert overruled.conv.in_channels == 3
    assert input_channels(ModelConfig("import/own_models.net.Net", options={"in_channels": 3}), info(1)) == 3


def test_an_imported_function_that_makes_a_sequence_can_be_cut() -> None:
    config = ModelConfig("import/own_models.net.sequence", cut="1")
    check_model(config, info(1, 8))
    model = build_model(config, info(1, 8))
    assert cuts(model) == ("1", "2")
    client, server = split(model, config.cut_after)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(server(client(x)), model(x))
    with pytest.raises(ConfigError, match="no cut of its own"):
        split(model, ModelConfig("import/own_models.net.sequence").cut_after)


def test_lazy_layers_are_made_for_the_dataset() -> None:
    config = ModelConfig("import/own_models.net.Lazy")
    assert input_channels(config, info(2, 8)) == 2
    model = build_model(config, info(2, 8))
    assert model.fc.weight.shape == (10, 2 * 8 * 8)  # type: ignore[union-attr]
    assert model.training


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("own_models.net.Nett", "a name in own_models.net, which has no Nett; did you mean import/own_models.net.Net?"),
        ("own_models.nett.Net", "a name in own_models, which has no nett"),
        ("own_models.bad.Net", "No module named 'missing_package_of_somebody'"),
        ("nobodys_package.Net", "No module named 'nobodys_package'"),
        ("Net", "import/<module>.<class or function>"),
        ("own_models..Net", "import/<module>.<class or function>"),
        ("own_models.net.broken", "(RuntimeError: first line)"),
        ("own_models.net.number", "what makes an nn.Module, not int"),
        ("own_models.net.nothing_to_learn", "a model with parameters to train"),
        ("own_models.net.MADE", "not a module that is made already"),
        ("own_models.net.CONSTANT", "makes an nn.Module, not int"),
        ("torch.nn.Linear", "missing 2 required positional arguments"),
    ],
)
def test_what_cannot_be_imported_or_built_is_one_line(path: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        input_channels(ModelConfig(f"import/{path}"), info())
    assert str(error.value).startswith(f"model.name=import/{path}: expected")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- extras


def test_a_source_that_is_not_installed_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in (("timm", "timm/resnet18"), ("transformers", "huggingface/vit")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ConfigError, match=rf'{package} is missing.*pip install -e "\.\[{name.partition("/")[0]}\]"'
        ):
            input_channels(ModelConfig(name), info())


def test_models_of_timm_are_timms_own() -> None:
    timm = pytest.importorskip("timm", reason="timm is an optional extra")
    grey = ModelConfig("timm/resnet18.a1_in1k")
    assert input_channels(grey, info(1)) == 1
    ours = seeded(lambda: build_model(grey, info(1, classes=7)))
    assert equal(ours, seeded(lambda: timm.create_model("resnet18", num_classes=7, in_chans=1)))
    small = ModelConfig("timm/vit_tiny_patch16_224", options={"patch_size": 8})
    assert input_channels(small, info(3, 32)) == 3
    for name, close in (("resnt18", "timm/resnet18"), ("resnet18.a1_in2k", "timm/resnet18.a1_in1k")):
        with pytest.raises(ConfigError, match=rf"did you mean {close}\?"):
            input_channels(ModelConfig(f"timm/{name}"), info())
    with pytest.raises(ConfigError, match="classifiers of timm"):
        input_channels(ModelConfig("timm/hf-hub:somebody/model"), info())


@pytest.mark.filterwarnings("default")  # what another library warns of in itself
def test_models_of_transformers_are_made_from_a_configuration() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "patch_size": 4,
    }
    config = ModelConfig("huggingface/vit", options=options)
    assert input_channels(config, info(1, 8)) == 1
    torch.manual_seed(3)
    ours = build_model(config, info(1, 8, 7)).eval()
    theirs = transformers.ViTConfig(**options, image_size=8, num_channels=1, num_labels=7)
    torch.manual_seed(3)
    reference = transformers.AutoModelForImageClassification.from_config(theirs).eval()
    assert equal(ours.state_dict(), reference.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(ours(x), reference(x).logits)
    with pytest.raises(ConfigError, match=r"did you mean model\.options\.hidden_size\?"):
        input_channels(ModelConfig("huggingface/vit", options={"hiden_size": 16}), info())
    with pytest.raises(ConfigError, match="takes images"):
        input_channels(ModelConfig("huggingface/bert"), info(3, 8))


def test_an_unknown_source_is_reported_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"did you mean torchvision/<name>\?"):
        load_config(["model=torchvison/resnet18"])
    with pytest.raises(ConfigError, match="registered model"):
        ModelConfig("keras/resnet18")


def test_a_module_of_ones_own_keeps_its_kind() -> None:
    net = importlib.import_module("own_models.net")
    model = build_model(ModelConfig("import/own_models.net.Net"), info())
    assert type(model) is net.Net
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("timm_wrapper", {"model_args": {"checkpoint_path": "/x.pth"}}, "model.options.model_args.checkpoint_path=/x"),
        (
            "timm_wrapper",
            {"model_args": {"a": [{"pretrained_cfg": {"file": "/x"}}]}},
            "model.options.model_args.a.pre",
        ),
        (
            "timm_wrapper",
            {"architecture": "hf-hub:somebody/net"},
            "model.options.architecture=hf-hub:somebody/net: ",
        ),
        ("vit", {"label2id": {"pretrained": True}}, "model.options.label2id.pretrained=true: expected no trained"),
    ],
)
def test_no_option_of_transformers_leads_to_trained_weights(name: str, options: dict[str, Any], line: str) -> None:
    """Whose files timm would unpickle, or download."""
    pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    with watched(), pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(f"huggingface/{name}", options=options), DatasetInfo("x", 3, 32, 32, 10, ()))
    assert str(caught.value).startswith(line)
