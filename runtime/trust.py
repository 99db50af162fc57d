"""What of a configuration may come from a stranger: from the server of a run, or from the folder of one.

A list of what is allowed, with bounds: each key is in it once, and what is not in it is refused. Whoever starts a
program may allow more by naming it on the command line, where what is named has to be what the stranger says. Nothing
is imported, opened or made for a value before it has been checked here.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cutlayer.datasets.registry import check_options
from cutlayer.models import ModelConfig, PersonalConfig
from cutlayer.models.fitting import sketch
from cutlayer.models.part_registry import SLOTS, config_class, refinable
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, join

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo
    from cutlayer.runtime.settings import RunConfig

DATA_BYTES = 1 << 30
"""Of images that a data set makes itself, in memory."""
MODEL_BYTES = 1 << 30
"""Of the model of a run that is restored from its folder."""
_LEVELS, _MAPPINGS, _LEAVES = 6, 16, 10_000
_SHOWN = 12
_ENTRIES = 100


@dataclass(frozen=True)
class Rule:
    """What a key may hold other than true, false and null.

    Attributes:
        most: numbers from -most to most; 0 for none. text: what text has to match; None for none.
        length: entries of a list of such; 0 for no list.
    """

    most: float = 0
    text: re.Pattern[str] | None = None
    length: int = 0

    def wants(self, value: object) -> str | None:
        """What is expected in the place of the value, None if that may be."""
        if isinstance(value, list | tuple) and self.length:
            entries = cast(Sequence[object], value)
            if len(entries) > self.length:
                return f"a list of at most {self.length:,} entries"
            return next((wanted for entry in entries if (wanted := replace(self, length=0).wants(entry))), None)
        if value is None or isinstance(value, bool):
            return None
        if isinstance(value, int | float) and self.most:
            return None if abs(value) <= self.most else f"a number up to {self.most:,.15g}"
        if isinstance(value, str) and self.text is not None:
            return None if self.text.fullmatch(value) else _TEXTS[self.text]
        return "another kind of value"


WORD = re.compile(r"\w[\w+-]{0,63}")
MODULE = re.compile(r"[\w.]{1,200}|auto:\w+<=[\d.e]{1,20}")
FOLDER_PATTERN = re.compile(r"(?!/)(?!(.*/)?\.\.(/|$))[\w .+/-]{0,200}")
# A column of a table within the data, or a pattern that no name makes slow: two repetitions at most, none of a group.
GROUP = re.compile(
    r"(?!/)(?!(.*/)?\.\.(/|$))[\w .+/-]{1,200}:[\w .+-]{1,64}|"
    r"(?=[^+*]*([+*][^+*]*){0,2}$)(?!.*\)[+*?{])[\w\[\]()./\\+*-]{1,64}"
)
NAME_PATTERN = re.compile(r"[^\x00-\x1f\x7f/\\]{1,256}")
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
REGISTERED = re.compile(r"\w{1,64}")
NOTHING = re.compile(r"(?!)")
_TEXTS = {
    WORD: "a word",
    MODULE: "a module of the model",
    FOLDER_PATTERN: "a folder within the data",
    GROUP: "a table within the data, or a short pattern",
    NAME_PATTERN: "a name",
    DEVICE: "auto, cpu, cuda or cuda:<index>",
    REGISTERED: "a model of this project",
    NOTHING: "null",
}
_FLAG = Rule()
_CHOICE = Rule(text=WORD)
_SMALL, _MANY, _ANY = Rule(1e4), Rule(1e6), Rule(1e12)
# Of optimizers and schedules: torch's own classes, by name, with numbers.
_LEARNING = Rule(1e6, WORD, 1000)

RULES: Mapping[str, Rule] = {
    "algorithm.name": _CHOICE,
    "algorithm.ranks": Rule(4096, length=64),
    "algorithm.alphas": Rule(1e6, length=64),
    "algorithm.*": Rule(65_536, WORD),
    "model.name": Rule(text=REGISTERED),
    "model.init": Rule(text=NOTHING),
    "model.cut": Rule(text=MODULE, length=2),
    "model.initialisation": _CHOICE,
    "model.client_norm": _CHOICE,
    "model.server_norm": _CHOICE,
    "model.group_channels": Rule(4096),
    "model.lora.r": Rule(4096),
    "model.lora.alpha": _MANY,
    "model.lora.dropout": Rule(1),
    "model.lora.targets": Rule(text=WORD, length=64),
    "model.lora.train": _CHOICE,
    "model.bottleneck": _CHOICE,
    "model.client.freeze": _FLAG,
    "model.auxiliary.size": Rule(text=MODULE),
    "model.auxiliary_heads.blocks": Rule(text=MODULE, length=64),
    "model.personal.variants.*.depth": Rule(128),
    "model.personal.variants.*.*": Rule(4096, MODULE, 64),
    "model.projector.hidden": Rule(4096),
    "model.projector.width": Rule(4096),
    "model.options.depth": Rule(128),
    "model.options.*": Rule(4096, WORD, 64),
    "dataset.name": _CHOICE,
    "dataset.distribution": _CHOICE,
    "dataset.distribution_options.*": Rule(1e6, WORD, 64),
    "dataset.alpha": _MANY,
    "dataset.classes_per_client": _MANY,
    "dataset.major_share": _MANY,
    "dataset.min_samples": _MANY,
    "dataset.client_samples": _MANY,
    "dataset.drop_unassigned": _FLAG,
    "dataset.augment": _CHOICE,
    "dataset.moco_area": Rule(1),
    "dataset.moco_blur": Rule(1),
    "dataset.resize": Rule(1024),
    "dataset.normalize": _CHOICE,
    "dataset.shuffle": _FLAG,
    "dataset.drop_last": _CHOICE,
    "dataset.validation": _MANY,
    "dataset.fraction": _MANY,
    "dataset.local_test": _CHOICE,
    "dataset.options.train": Rule(text=FOLDER_PATTERN),
    "dataset.options.test": Rule(text=FOLDER_PATTERN),
    "dataset.options.group": Rule(1024, GROUP),
    "dataset.options.classes": Rule(65_536, NAME_PATTERN, 65_536),
    **{f"dataset.options.{key}": Rule(text=NAME_PATTERN, length=1000) for key in ("plays", "roles", "restaurants")},
    **{f"dataset.options.{key}": Rule(1024) for key in ("size", "resize", "height", "width", "channels")},
    "dataset.options.n_train": _MANY,
    "dataset.options.n_test": _MANY,
    "dataset.options.*": Rule(65_536, WORD),
    "optimizer.*": _LEARNING,
    "scheduler.*": _LEARNING,
    "aggregate.weights": Rule(1e12, WORD, 100_000),
    "aggregate.buffers": _CHOICE,
    "monitor.k": _MANY,
    "monitor.features": _CHOICE,
    "monitor.temperature": _MANY,
    "monitor.train_samples": _ANY,
    "num_clients": Rule(100_000),
    "frac": Rule(1),
    "cohort_interval": _MANY,
    "cohort_order": _CHOICE,
    "cohort.together": Rule(65_536, WORD),
    "rounds": _MANY,
    "local_epochs": _SMALL,
    "batch_size": Rule(65_536),
    "lr": _MANY,
    "label_smoothing": Rule(1),
    "seed": Rule(2**63),
    "precision": _CHOICE,
    "eval_interval": _ANY,
    "evaluations": Rule(text=WORD, length=64),
    "eval_batch_size": Rule(65_536),
    "comm_threshold_mb": _ANY,
}
"""By key what a server may set at its clients, and the folder of a run for what reads it: what decides the result.

``*`` is any one name. What `part_rules` adds of registered parts goes with them.
"""
FOLDER_RULES: Mapping[str, Rule] = {
    "device": Rule(text=DEVICE),
    "deterministic": _FLAG,
    "memory_format": _CHOICE,
    "compile": _FLAG,
    "model.base": Rule(text=NOTHING),
    "threads": Rule(1024, WORD),
    "state_memory_mb": _MANY,
    "progress": _CHOICE,
    "dataset.storage": _CHOICE,
    "dataset.workers": Rule(256),
    "personalize.part": _CHOICE,
    "personalize.epochs": Rule(1e4, length=64),
    "personalize.lr": _MANY,
    "personalize.start": _CHOICE,
    "personalize.loss": _CHOICE,
    "probe.after": _FLAG,
    "probe.knn": _FLAG,
    "probe.k": _MANY,
    "probe.temperature": _MANY,
    "probe.labels": Rule(1, length=64),
    "probe.l2": _MANY,
    "probe.hidden": Rule(4096),
    "probe.train_samples": _ANY,
    "probe.test_samples": _ANY,
    "generate.after": _FLAG,
    "generate.beams": Rule(256),
    "generate.length_penalty": _SMALL,
    "generate.no_repeat": Rule(4096, WORD),
    "generate.tokens": Rule(4096, WORD),
    "generate.prompts": _ANY,
    "generate.prompt": Rule(text=NOTHING),
    "generate.metrics": Rule(text=WORD, length=64),
    "generate.start": _CHOICE,
    "generate.batch_size": Rule(4096),
    "checkpoint_interval": _ANY,
    "communication_by": _CHOICE,
}
"""What the folder of a run may set as well; where its data are is looked at by itself."""
_PART_KEY = Rule(4096, WORD, 64)


def part_rules() -> dict[str, Rule]:
    """The rules of registered parts: for their optimizers and schedules, and for keys that have none in `RULES`."""
    own = {f"model.{name}.{each.name}": _PART_KEY for name in refinable() for each in fields(config_class(name))}
    slots = [f"model.{name}.{slot}" for name in refinable() for slot in SLOTS]
    known = [*slots, *RULES]
    own = {key: rule for key, rule in own.items() if not any(f"{each}.".startswith(f"{key}.") for each in known)}
    return {**own, **{f"{slot}.*": _LEARNING for slot in slots}}


# Of a model of another library each option goes into code that is not this project's.
_OPTIONS = ("model.options.", "model.personal.variants.")

Named = Callable[[str, object], bool]
"""Whether the command line names a key, with this value."""


def check(values: Mapping[str, Any], named: Named, source: str, rules: Mapping[str, Rule] = RULES) -> None:
    """Check what a stranger says of a configuration.

    Args:
        values: plain containers. source: who says so, for messages: "the server".

    Raises:
        ConfigError: in one line the first value that may not be, and what to add to the command to take all that can
            be taken.
    """
    tree = _tree({**part_rules(), **rules})
    name = values.get("model")
    name = cast(Mapping[str, Any], name).get("name") if isinstance(name, Mapping) else name
    elsewhere = isinstance(name, str) and "/" in name
    refused: list[tuple[str, object, str]] = []
    for path, value in _leaves(values, source):
        key = ".".join(path)
        rule = _rule(tree, path, value)
        if rule is None:
            raise ConfigError(key, NO_VALUE, f"no key that {source} may set")
        wanted = rule.wants(value)
        if wanted is None and elsewhere and value is not None and key.startswith(_OPTIONS):
            wanted = f"no option of {name}"
        if wanted is not None and not named(key, value):
            refused.append((key, value, wanted))
    if refused:
        key, value, wanted = refused[0]
        how = to_take([(key, value) for key, value, _ in refused])
        raise ConfigError(key, value, f"{wanted}, as only {source} says so; {how}")


def covered(names: Collection[str], key: str) -> bool:
    """Whether a key, or a section that it is in, is among the names."""
    levels = key.split(".")
    return any(".".join(levels[:depth]) in names for depth in range(1, len(levels) + 1))


def to_take(named: Sequence[tuple[str, object]]) -> str:
    """What to add to a command to take values: "if you trust it, add: model=import/my_net.Net"."""
    shown = [shlex.quote(f"{'model' if key == 'model.name' else key}={_text(value)}") for key, value in named]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"if you trust it, add: {' '.join(shown[:_SHOWN])}{more}"


def _text(value: object) -> str:
    """A value as on the command line, of which not much is left out: it is to be copied."""
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(entry) for entry in cast(Sequence[object], value)[:_ENTRIES])}]"
    known = {None: "null", True: "true", False: "false"}
    return known[value] if value is None or isinstance(value, bool) else str(value)[:500]


def check_made(config: RunConfig, named: Named, source: str) -> None:
    """Check what a configuration makes in memory by itself, once it has its types.

    Raises:
        ConfigError: images of more than `DATA_BYTES`, by options that the command line does not name.
    """
    options = check_options(config.dataset.name, config.dataset.options)
    made = int(getattr(options, "bytes", 0))
    given = [(f"dataset.options.{key}", value) for key, value in config.dataset.options.items()]
    if made > DATA_BYTES and not all(named(key, value) for key, value in given):
        much = f"images of at most {DATA_BYTES / 1e6:,.0f} MB, and not {made / 1e6:,.0f} MB"
        expected = f"{much}, as only {source} says so; {to_take(given)}"
        raise ConfigError("dataset.options", config.dataset.options, expected)


class Limit(NamedTuple):
    """The most bytes that the weights of a model may take, and what allows more, with {mb} for what it takes in MB."""

    bytes: float
    how: str


def check_size(config: ModelConfig, info: DatasetInfo, limit: Limit) -> None:
    """Check how large a model of this project is, before there is memory for it; one of another library was named.

    Raises:
        ConfigError: it, with the models that personal bodies are from, is larger.
    """
    if "/" in config.name:
        return
    found = 0
    for variant in ({}, *(config.part("personal", PersonalConfig).variants or ())):
        options = {key: value for key, value in variant.items() if key != "cut"}
        model = sketch(replace(config, options={**config.options, **options}), info)
        found += sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        if found > limit.bytes:
            how = limit.how.format(mb=math.ceil(found / 1e6))
            expected = f"one of at most {limit.bytes / 1e6:,.0f} MB, and not {found / 1e6:,.0f} MB; {how}"
            raise ConfigError("model.name", config.name, expected)


# ---------------------------------------------------------------------- keys

_Tree = dict[str, Any]
_RULE = ""  # below a name: its own rule


def _tree(rules: Mapping[str, Rule]) -> _Tree:
    tree: _Tree = {}
    for key, rule in rules.items():
        node = tree
        for name in key.split("."):
            node = node.setdefault(name, {})
        node[_RULE] = rule
    return tree


def _rule(tree: _Tree, path: Sequence[str], value: object) -> Rule | None:
    """The rule for a key; for a section that is null or empty one that takes just that."""
    node = tree
    for name in path:
        node = node.get(name, node.get("*")) if name else None
        if node is None:
            return None
    if value is None or value == {}:
        return Rule()
    return node.get(_RULE)


def _leaves(values: Mapping[str, Any], source: str) -> Iterator[tuple[tuple[str, ...], object]]:
    """Keys to the values that are no sections; empty sections are null."""
    pending: list[tuple[tuple[str, ...], object]] = [((), values)]
    found = 0
    while pending:
        path, value = pending.pop()
        entries = _entries(value)
        if not entries:
            if path:
                yield path, None if value == {} else value
            continue
        found += len(entries)
        if len(path) >= _LEVELS or found > _LEAVES:
            raise ConfigError(join(*path[:2]), NO_VALUE, f"more keys below it than {source} may set")
        for name, inner in reversed(entries):
            if not isinstance(cast(object, name), str) or not re.fullmatch(r"[\w-]{1,64}", name):
                raise ConfigError(join(*path[:2], ascii(name)[:64]), NO_VALUE, f"no key that {source} may set")
            pending.append(((*path, name), inner))


def _entries(value: object) -> list[tuple[str, object]]:
    """What is below a section, or a list of sections; nothing below a value."""
    if isinstance(value, Mapping):
        return list(cast(Mapping[str, object], value).items())
    if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in cast(Iterable[object], value)):
        sequence = cast(Sequence[object], value)
        return [(str(at), entry) for at, entry in enumerate(sequence)] if len(sequence) <= _MAPPINGS else []
    return []
