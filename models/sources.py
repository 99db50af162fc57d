"""Models of other libraries: torchvision's, timm's and Hugging Face's by name, and your own by import path.

Each source is a function from a name and `model.options` to what builds the model for a dataset: with the dataset's
number of classes, for its images as far as the model can follow them, and with fresh weights. Nothing is downloaded.
What stands there in the end is a plain `nn.Module`, images [b, channels, h, w] -> logits [b, classes], whose parameters
have the names that their author gave them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torchvision
from torch import nn
from torch.nn.parameter import is_lazy

from cutlayer.models.pretrained import causal_model, causal_names
from cutlayer.models.registry import register_source
from cutlayer.models.shapes import sample
from cutlayer.runtime.ground.config import ConfigError, show
from cutlayer.runtime.ground.extras import install

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

ConfiguredBuilder = Callable[["DatasetInfo"], nn.Module]

# Options by which these libraries take trained weights, which they would download.
_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
_SCHEME = re.compile(r"[\w-]+:")
_SHOWN = 8

# What the builders in a module of torchvision's take besides the number of classes. Auxiliary classifiers, of GoogLeNet
# and Inception, give a second output in training; the sizes are of models that are built for one size of image.
_INCEPTION = {"aux_logits": False, "init_weights": True}
_TORCHVISION: Mapping[str, Callable[[DatasetInfo], dict[str, Any]]] = {
    "googlenet": lambda _: _INCEPTION,
    "inception": lambda _: _INCEPTION,
    "vision_transformer": lambda info: {"image_size": info.height},
    "maxvit": lambda info: {"input_size": (info.height, info.width)},
}

# What your own class or function learns about the dataset, if it has a parameter of that name.
_FROM_DATASET: Mapping[str, Callable[[DatasetInfo], Any]] = {
    "info": lambda info: info,
    "num_classes": lambda info: info.outputs,
    "classes": lambda info: info.outputs,
    "in_channels": lambda info: info.channels,
    "in_chans": lambda info: info.channels,
    "image_size": lambda info: _side(info),
    "img_size": lambda info: _side(info),
}


@register_source("torchvision")
def torchvision_model(name: str, options: Mapping[str, Any]) -> ConfiguredBuilder:
    """Any classification model of `torchvision.models`."""
    zoo = torchvision.models
    _check_name("torchvision", name, zoo.list_models(module=zoo))
    _check_fresh(options)
    given = _TORCHVISION.get(zoo.get_model_builder(name).__module__.rpartition(".")[2], lambda _: {})

    def build(info: DatasetInfo) -> nn.Module:
        settings = {"num_classes": info.outputs, **given(info), **options}
        return _made(f"torchvision/{name}", lambda: zoo.get_model(name, weights=None, **settings), info, options)

    return build


@register_source("timm")
def timm_model(name: str, options: Mapping[str, Any]) -> ConfiguredBuilder:
    """Any model of timm; the first convolution is made for the dataset's channels, as timm does."""
    timm = _package("timm", "timm", f"timm/{name}")
    _check_name("timm", name.partition(".")[0], timm.list_models())
    if "." in name:
        _check_name("timm", name, timm.list_pretrained(f"{name.partition('.')[0]}.*"))
    _check_fresh(options)

    def build(info: DatasetInfo) -> nn.Module:
        settings: dict[str, Any] = {"num_classes": info.outputs, "in_chans": info.channels}
        if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            settings["img_size"] = (info.height, info.width)
        settings |= options
        return _made(f"timm/{name}", lambda: timm.create_model(name, pretrained=False, **settings), info, options)

    return build


@register_source("huggingface")
def huggingface_model(name: str, options: Mapping[str, Any]) -> ConfiguredBuilder:
    """A model of transformers by its type, made from a configuration: the default one with `options`.

    A classifier of images where there is one for the type, else one of sequences; of text as `causal_model` makes it.
    """
    full = f"huggingface/{name}"
    transformers = _package("transformers", "huggingface", full)
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    images, sequences = (
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    _check_name("huggingface", name, dict.fromkeys([*images, *sequences, *causal_names()]))
    maker = (
        transformers.AutoModelForImageClassification
        if name in images
        else transformers.AutoModelForSequenceClassification
    )
    _check_fresh(options)
    known = transformers.AutoConfig.for_model(name).to_dict()
    for key in options:
        if key not in known:  # a configuration of transformers takes any key, and keeps what it does not know
            raise ConfigError.unknown_key(f"model.options.{key}", known)

    def build(info: DatasetInfo) -> nn.Module:
        if info.length:
            return causal_model(name, options, info, None)
        settings: dict[str, Any] = {"num_labels": info.outputs, "architectures": []}
        settings |= {"num_channels": info.channels} if "num_channels" in known else {}
        settings |= {"image_size": _side(info)} if "image_size" in known else {}
        config = transformers.AutoConfig.for_model(name, **{**settings, **options})
        model = maker.from_config(config)
        model.register_forward_hook(_logits)
        return model

    return lambda info: _made(full, lambda: build(info), info, options)


@register_source("import")
def imported_model(path: str, options: Mapping[str, Any]) -> ConfiguredBuilder:
    """What the class or function at an import path, such as my_package.net.Net, makes when called with `options`.

    It gets those facts of the dataset that it has parameters for: see `_FROM_DATASET`.
    """
    full = f"import/{path}"
    target = _imported(path)
    if isinstance(target, nn.Module) or not callable(target):
        found = f"not {'a module that is made already' if callable(target) else type(target).__name__}"
        raise ConfigError("model.name", full, f"a class or function that makes an nn.Module, {found}")
    try:
        parameters = set(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # written in C
        parameters = set[str]()

    def build(info: DatasetInfo) -> nn.Module:
        reported = {key: value(info) for key, value in _FROM_DATASET.items() if key in parameters}
        return _made(full, lambda: target(**{**reported, **options}), info, options)

    return build


def _made(name: str, build: Callable[[], object], info: DatasetInfo, options: Mapping[str, Any]) -> nn.Module:
    """What `build` gives, if that is a module with something to learn; `ConfigError` if not, or if it fails."""
    try:
        model = build()
        if isinstance(model, nn.Module) and any(is_lazy(parameter) for parameter in model.parameters()):
            with torch.no_grad():  # layers that take their width from the first images that they see
                model.eval()(sample(info.shape, 1))
            model.train()
    except Exception as error:
        key, value = ("model.options", dict(options)) if options else ("model.name", name)
        shape = f"{info.outputs} classes of {'x'.join(map(str, info.shape))}"
        raise ConfigError(key, value, f"what {name} can be built with for {shape} ({error_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise ConfigError("model.name", name, f"what makes an nn.Module, not {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model.name", name, "a model with parameters to train; this one has none")
    return model


def error_line(error: BaseException) -> str:
    """An exception in a few words: its kind and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {show(lines[0])}" if lines else type(error).__name__


def _logits(_model: nn.Module, _args: object, output: Any) -> Any:
    """The logits alone of what a model of transformers gives."""
    return output.logits


def _side(info: DatasetInfo) -> int | tuple[int, int]:
    """The size of square images as most models take it, or height and width."""
    return info.height if info.height == info.width else (info.height, info.width)


def _check_name(source: str, name: str, known: Iterable[str]) -> None:
    """A `ConfigError` with the names most like `name`, of thousands, if it is not known."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=_SHOWN, cutoff=0.5)
        examples = "" if close else f", such as {', '.join(known[:_SHOWN])}"
        expected = f"one of the {len(known)} classifiers of {source}{examples}"
        raise ConfigError("model.name", f"{source}/{name}", expected, [f"{source}/{other}" for other in close])


def _check_fresh(options: object, where: str = "model.options") -> None:
    """Refuse trained weights in options, or in mappings and lists in them: libraries download them, or unpickle files.

    Names with a scheme, such as hf-hub:, would be looked up on the network.
    """
    if isinstance(options, str) and _SCHEME.match(options):
        raise ConfigError(where, options, "a name without a scheme, as nothing is downloaded")
    if isinstance(options, list | tuple):
        for entry in cast(Sequence[object], options):
            _check_fresh(entry, where)
    if not isinstance(options, Mapping):
        return
    for key, value in cast(Mapping[str, object], options).items():
        if key in _WEIGHTS:
            raise ConfigError(f"{where}.{key}", value, "no trained weights; model.init starts from a file")
        _check_fresh(value, f"{where}.{key}")


def _package(package: str, extra: str, model: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        advice = f"an installed source; {package} is missing ({error_line(error)}): {install(extra)}"
        raise ConfigError("model.name", model, advice) from error


def _imported(path: str) -> object:
    """The object at a dotted path: the longest module that there is, then attributes."""
    full, parts = f"import/{path}", path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError("model.name", full, "import/<module>.<class or function>, such as import/my_package.net.Net")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: object = importlib.import_module(module)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            if missing and end > 1:
                continue
            expected = f"a module that can be imported, from this folder or PYTHONPATH ({error_line(error)})"
            raise ConfigError("model.name", full, expected) from error
        for at, name in enumerate(parts[end:], start=end):
            if not hasattr(found, name):
                where = ".".join(parts[:at])
                names = [f"import/{where}.{other}" for other in _public(found)]
                raise ConfigError("model.name", full, f"a name in {where}, which has no {name}", names)
            found = getattr(found, name)
        return found
    raise AssertionError("the first part is a module, or the loop has raised")


def _public(found: object) -> list[str]:
    """The classes and functions in it that do not begin with an underscore."""
    return sorted(name for name, value in vars(found).items() if callable(value) and not name.startswith("_"))
