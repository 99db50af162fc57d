"""Cutlayer as one package: `cutlayer.algorithms`, `cutlayer.datasets`, `cutlayer.runtime` ....

In a checkout these are the folders beside this one, which `__path__` takes in; in an installed wheel they are inside.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
HOME = _HERE if (_HERE / "runtime").is_dir() else _HERE.parent
"""The folder in which the packages and `hydra_config/` are."""

if HOME != _HERE:
    __path__.append(str(HOME))
    # A program of the root, or `python -c` in it, has the root first on the path, where `datasets/` would hide the
    # package of that name of Hugging Face. What is looked for there, such as a module of one's own, is found last.
    if any(Path(entry or ".").resolve() == HOME for entry in sys.path):
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HOME] + [str(HOME)]
