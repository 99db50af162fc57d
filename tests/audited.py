"""What the interpreter is asked to do while hostile values are read: to open files, to import, to run programs."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from tests.places import ROOT

MARK = "h0stile"
# Where what is installed lies, and what the kernel tells of this process and machine.
_INSTALLED = (
    ROOT,
    sys.prefix,
    sys.base_prefix,
    sysconfig.get_path("stdlib"),
    "/proc",
    "/sys",
    "/usr",
    "/etc/localtime",
)
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
_REACHES = ("socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen", "pickle.find_class")
_CODE = ("import", "compile", "exec")
_TOUCHES = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.truncate", "shutil.rmtree")

HOSTILE: list[Any] = [
    f"import/{MARK}.run",
    f"import/{MARK}",
    "import/subprocess.getoutput",
    "import/turtle.Turtle",
    f"huggingface/{MARK}",
    "huggingface/timm_wrapper",
    "timm/resnet18",
    f"hf-hub:{MARK}/model",
    f"/{MARK}/secret",
    f"../../{MARK}",
    f"~/{MARK}",
    "/dev/zero",
    f"${{oc.env:{MARK}}}",
    f"${{{MARK}:1}}",
    f"!!python/object/apply:os.system [{MARK}]",
    f"__import__('{MARK}')",
    f"http://{MARK}/",
    f"\x1b[2J\x07{MARK}\r\nmore",
    f"{MARK}\0",
    "x" * 4000,
    "",
    10**9,
    -(10**9),
    2**62,
    10**40,
    1e308,
    -1.5,
    1e-300,
    [10**9] * 3,
    [1] * 2000,
    {"_target_": f"{MARK}.run", "args": [f"/{MARK}"]},
    {"name": f"import/{MARK}.run", "checkpoint_path": f"/{MARK}", "pretrained": True},
    [{"name": f"import/{MARK}.run", "cut": [f"/{MARK}", 1]}],
    {MARK: {MARK: {MARK: {MARK: {MARK: {MARK: {MARK: {MARK: 1}}}}}}}},
    True,
    None,
]

_events: list[tuple[str, tuple[Any, ...]]] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and (
        event in ("import", "compile", "exec", *_REACHES, *_TOUCHES) or event.startswith(_RUNS)
    ):
        _events.append((event, arguments))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(*mine: Path) -> Generator[None]:
    """Check what is done within the block.

    No program is started, no host asked for and nothing unpickled; no package is imported that was not; files are
    opened among what is installed and below ``mine`` alone; nothing at all is done with a hostile value.
    """
    global _events
    before = {name.partition(".")[0] for name in sys.modules}
    assert _events is None
    _events = seen = []
    try:
        yield
    finally:
        _events = None
    allowed = [Path(each).resolve() for each in (*_INSTALLED, *mine)]
    for event, arguments in seen:
        assert not event.startswith(_RUNS), (event, arguments)
        assert event not in _REACHES, (event, arguments)
        if event in _CODE:
            assert MARK not in repr([getattr(each, "co_filename", each) for each in arguments[:2]]), (event, arguments)
        if event in _TOUCHES and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.fsdecode(arguments[0]))
            assert path == Path("/dev/null") or _below(path, allowed), (event, arguments)
    fresh = {name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names
    assert not fresh, f"imported: {sorted(fresh)}"
    assert "turtle" not in sys.modules


def _below(path: Path, allowed: Iterable[Path]) -> bool:
    here = Path(os.path.abspath(path))
    return any(top == each or top in each.parents for top in allowed for each in (here, here.resolve()))
