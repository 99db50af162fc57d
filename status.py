"""Show a run over the network: `python status.py [run] [once=true] [save_dir=saves]`.

Without a run it is the newest one below save_dir that reports its status, and one that runs before those that do not.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.screen import Screen
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_errors
from cutlayer.runtime.network.server.overview import current_view, picture
from cutlayer.runtime.network.server.status import NETWORK
from cutlayer.runtime.run_folder import is_owned

KEYS = ("run", "once", "save_dir")
REFRESH_S = 1.0
_PLAIN_WIDTH = 200  # where there is no terminal: a line for each client


def main(arguments: list[str] | None = None) -> int:
    """Show what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Show how far a run over the network is and who is there, until Ctrl-C or the run's end.",
        epilog="Keys: once=true shows it once, with all its clients, as happens where there is no terminal; "
        "save_dir=saves is where runs are looked for.",
    )
    parser.add_argument("argument", nargs="*", help="the folder of a run, or one above several; and key=value")
    try:
        folder, once = _read(parser.parse_args(arguments).argument)
        console = Screen()
        if once or not console.is_terminal or console.is_dumb_terminal:
            width = None if console.is_terminal else _PLAIN_WIDTH
            console = Screen(width=width)
            console.print(picture(current_view(folder), console, fit=False))
        else:
            _watch(folder, console)
    except ConfigError as error:
        print_errors(error)
        return 1
    except PermissionError as error:
        print_errors(ConfigError("run", str(error.filename), "a folder that this user may read"))
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _watch(folder: Path, console: Console) -> None:
    """Show the run until it is over or somebody ends this."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # so that the terminal is left as it was found
    view, pause = current_view(folder), threading.Event()
    try:
        with Live(picture(view, console, fit=True), console=console, screen=True, auto_refresh=False) as live:
            while not view.is_over:
                pause.wait(REFRESH_S)
                view = current_view(folder)
                live.update(picture(view, console, fit=True), refresh=True)
    finally:
        console.print(picture(view, console, fit=True))


def _read(texts: Sequence[str]) -> tuple[Path, bool]:
    """The run's folder, and whether it is shown only once, of a command line."""
    given: dict[str, str] = {}
    for text in texts:
        key, _, value = ("run", "", text) if "=" not in text or Path(text).exists() else text.partition("=")
        if key not in KEYS:
            raise ConfigError.unknown_key(key, KEYS)
        if key in given:
            raise ConfigError(key, value, "one value")
        given[key] = value
    once = given.get("once", "false").lower()
    if once not in ("true", "false"):
        raise ConfigError("once", once, "true or false")
    key = "run" if "run" in given else "save_dir"
    return _newest(key, Path(given.get(key, "saves"))), once == "true"


def _newest(key: str, above: Path) -> Path:
    """The folder itself, or the one below it whose run wrote last, one that runs before all others."""
    found = [path.parent for path in above.rglob(NETWORK)] if above.is_dir() else []
    if not found:
        expected = f"a folder with a run over the network in it ({NETWORK}, some seconds after its server was started)"
        raise ConfigError(key, str(above), expected)
    return max(found, key=lambda folder: (is_owned(folder), (folder / NETWORK).stat().st_mtime))


if __name__ == "__main__":
    run_program(main)
