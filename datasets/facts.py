"""What is known of a data set, to see whether two are the same, or how they differ, without either at hand.

It is the same wherever the files lie, in a folder or a zip, whenever they were written and however they are listed. All
labels count, all names of image files, and of these the sizes and a sample of the bytes: a second for ImageNet.
Of texts their lengths count, a sample of the tokens, and the tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.config import DatasetConfig
from cutlayer.datasets.registry import RawDataset, RawSplit, read
from cutlayer.datasets.texts import Texts

# Images in memory count with all their bytes up to this many, larger sets with evenly spaced images of as many.
_SAMPLED_BYTES = 16 << 20
SPLITS = ("training", "test")


def facts(config: DatasetConfig, raw: RawDataset) -> dict[str, Any]:
    """What is known of a data set as it was read, before anything is held out of it; plain JSON types."""
    found: dict[str, Any] = {
        "name": config.name,
        "classes": len(raw.class_names),
        "class_names": [str(name) for name in raw.class_names],
    }
    if raw.tokenizer is not None:
        found["tokenizer"] = f"{raw.tokenizer.size} tokens, {raw.tokenizer.hash}"
    for split, data in zip(SPLITS, (raw.train, raw.test), strict=True):
        found |= {f"{split} {name}": value for name, value in _of_split(data, len(raw.class_names)).items()}
    return found


def read_facts(config: DatasetConfig, seed: int) -> dict[str, Any]:
    """The same of a configured data set that is not loaded.

    Raises:
        ConfigError: its files are missing or unreadable.
    """
    return facts(config, read(config.name, config.root, config.options, seed, download=False))


def _of_split(data: RawSplit, classes: int) -> dict[str, Any]:
    groups = {} if data.groups is None else {"groups": _short_sum(np.asarray(data.groups, dtype="<i8"))}
    inputs = _sum_of(data.inputs) if isinstance(data.inputs, Tensor) else data.inputs.sum()
    if isinstance(data.inputs, Texts):
        content = {"tokens to predict": data.inputs.predicted, "texts": inputs[:16]}
    else:
        content = {"images": inputs[:16]}
    return {
        "samples": len(data.labels),
        "samples by class": torch.bincount(data.labels, minlength=classes).tolist(),
        "labels": _short_sum(data.labels.numpy()),
        **groups,
        **content,
    }


def _short_sum(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def _sum_of(images: Tensor) -> str:
    each = max(1, images[:1].numel() * images.element_size())
    if len(images) * each > _SAMPLED_BYTES:
        images = images[torch.linspace(0, len(images) - 1, max(1, _SAMPLED_BYTES // each)).long()]
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    digest.update(cast(Any, images.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How data that were something before are something else now, in words; None where they are the same."""
    for key in ("name", "classes", "class_names", "tokenizer"):
        if before.get(key) != now.get(key):
            return f"{key} {_short(before.get(key))} before, {_short(now.get(key))} now"
    names = cast(list[str], now.get("class_names", []))
    for split in SPLITS:
        was, count, is_now = f"{split} samples", f"{split} samples by class", now.get(f"{split} samples")
        if before.get(was) != is_now or before.get(count) != now.get(count):
            by_class = zip(names, before.get(count) or [], now.get(count) or [], strict=False)
            differ = [f"{name} {old} before, {new} now" for name, old, new in by_class if old != new]
            more = f", and {len(differ) - 3} more classes" if len(differ) > 3 else ""
            return f"{before.get(was)} {was} before, {is_now} now ({'; '.join(differ[:3])}{more})"
    for split in SPLITS:
        tokens = f"{split} tokens to predict"
        if before.get(tokens) != now.get(tokens):
            return f"{before.get(tokens)} {tokens} before, {now.get(tokens)} now"
        for what in ("labels", "groups", "images", "texts"):
            if before.get(f"{split} {what}") != now.get(f"{split} {what}"):
                count = now.get(f"{split} samples")
                return f"the {split} {what} are others ({before.get(f'{split} samples')} before, {count} now)"
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
