"""Cutlayer as one package: `cutlayer.algorithms`, `cutlayer.datasets`, `cutlayer.runtime` ....

In a checkout these are the folders beside this one, which `__path__` takes in; in an installed wheel they are inside.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
HOME = _HERE if (_HERE / "runtime").is_dir() else _HERE.parent
"""The folder in which the packages and `hydra_config/` are."""
IN_CHECKOUT = HOME != _HERE
"""Whether this is a checkout, or an editable install of one; else it is an installed wheel."""

if IN_CHECKOUT:
    __path__.append(str(HOME))
    from cutlayer.names import leave_to_others

    leave_to_others()
