"""Our packages have one name each, `cutlayer.datasets`, and leave the bare one, `datasets`, to others.

In a checkout they are folders of the root, which is on the path of whoever starts there.
"""

import sys
from importlib import machinery
from importlib.util import module_from_spec
from pathlib import Path

from cutlayer import HOME

TAKEN = ("datasets",)
"""Names that other libraries import, or look for: `datasets` is Hugging Face's."""
_LOADERS = (
    (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
    (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
    (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
)


class _Root(machinery.FileFinder):
    """Finds what is in the root, but not under a name that belongs to others."""

    def find_spec(self, fullname: str, target: object = None) -> machinery.ModuleSpec | None:
        return None if fullname in TAKEN else super().find_spec(fullname, None)


def leave_to_others() -> None:
    """From now on our folders are not found under such a name: another package is, or none."""

    def hook(path: str) -> _Root:
        if Path(path).resolve() != HOME:
            raise ImportError
        return _Root(path, *_LOADERS)

    sys.path_hooks.insert(0, hook)
    for path in [path for path in sys.path_importer_cache if Path(path).resolve() == HOME]:
        del sys.path_importer_cache[path]


def refuse(name: str) -> None:
    """Called by a package of ours that is imported under another name than its own, so that it is never there twice.

    Raises:
        ImportError: always, in one line.
    """
    raise ImportError(f"import cutlayer.{name.rpartition('.')[2]}, not {name}, which would be there a second time")


def give_way(name: str) -> None:
    """As `refuse`, but where there is another package of that name, put it in the place of ours.

    So it is for whoever asks for Hugging Face's before anything has imported `cutlayer`.

    Raises:
        ImportError: there is no other.
    """
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != HOME]
    spec = machinery.PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None:
        refuse(name)
        return
    sys.modules[name] = module_from_spec(spec)  # the import statement takes what it finds there at the end
    spec.loader.exec_module(sys.modules[name])
