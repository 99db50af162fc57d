"""Where the tests lie and what they start: in a checkout its programs, elsewhere those of the installed package."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
"""The folder with `tests/` in it: a checkout, or wherever somebody has put a copy of the tests."""
SHARED = ROOT.parent / "shared" / "data"
"""Where some machines have published data sets, for the tests that read one."""
_IN_CHECKOUT = (ROOT / "main.py").is_file()


def program(name: str) -> list[str]:
    """What a command of one of the programs begins with, such as `main`."""
    return [sys.executable, str(ROOT / f"{name}.py")] if _IN_CHECKOUT else [sys.executable, "-m", f"cutlayer.{name}"]


def checkout() -> Path:
    """The checkout's root. Without one the test that asks is skipped, or the module that asks while it is imported."""
    if not _IN_CHECKOUT:
        pytest.skip("needs a checkout", allow_module_level=True)
    return ROOT
