"""Cutlayer as one package: `cutlayer.algorithms`, `cutlayer.datasets`, `cutlayer.runtime` ....

In a checkout these are the folders beside this one, which `__path__` takes in; in an installed wheel they are inside.

`cutlayer.run`, `sweep`, `load` and `runs` are for scripts and notebooks, see docs/python.md. They, and what they
need, are imported when they are first asked for.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlayer.interface.result import RunResult as RunResult
    from cutlayer.interface.result import load_run as load
    from cutlayer.interface.running import run_here as run
    from cutlayer.interface.sweeping import run_sweep as sweep
    from cutlayer.interface.tidy import all_runs as runs
    from cutlayer.runtime.ground.config import ConfigError as ConfigError

_HERE = Path(__file__).resolve().parent
HOME = _HERE if (_HERE / "runtime").is_dir() else _HERE.parent
"""The folder in which the packages and `hydra_config/` are."""
IN_CHECKOUT = HOME != _HERE
"""Whether this is a checkout, or an editable install of one; else it is an installed wheel."""

if IN_CHECKOUT:
    __path__.append(str(HOME))
    from cutlayer.names import leave_to_others

    leave_to_others()

__all__ = ["ConfigError", "RunResult", "load", "run", "runs", "sweep"]
_FROM = {
    "run": ("interface.running", "run_here"),
    "runs": ("interface.tidy", "all_runs"),
    "sweep": ("interface.sweeping", "run_sweep"),
    "load": ("interface.result", "load_run"),
    "RunResult": ("interface.result", "RunResult"),
    "ConfigError": ("runtime.ground.config", "ConfigError"),
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _FROM[name]
    globals()[name] = found = getattr(import_module(f"{__name__}.{module}"), inside)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
