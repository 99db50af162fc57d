"""Names of models of other libraries, `<source>/<name>`: what Hydra has to know of them before anything is imported."""

from __future__ import annotations

import re

# Where models come from besides this project; `models/sources.py` builds them.
SOURCES = ("torchvision", "timm", "huggingface", "import")

_CHOICE = re.compile(rf"model/((?:{'|'.join(SOURCES)})/.+?)(?:\.yaml)?")


def chosen_model(config_path: str) -> str | None:
    """The model that the path of a config names (model/timm/resnet18 is timm/resnet18), None if it is no such path."""
    found = _CHOICE.fullmatch(config_path)
    return found[1] if found else None


def spellings(group: str) -> tuple[str, ...]:
    """What may be chosen in a config group besides its files, as named in messages."""
    return tuple(f"{source}/<name>" for source in SOURCES) if group == "model" else ()
