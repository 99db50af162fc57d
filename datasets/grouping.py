"""Groups of image files: which ones belong together, by their paths or by a table beside them."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from cutlayer.datasets.tables import TABLE_SUFFIXES, read_table
from cutlayer.datasets.trees import Tree
from cutlayer.runtime.ground.config import ConfigError

GROUP_KEY = "dataset.options.group"
_COLUMN = re.compile(r"(?P<file>.+\.(csv|tab|tsv|txt)):(?P<column>[^/]+)", re.IGNORECASE)


def check_group(group: str | int | None) -> None:
    """Raise ConfigError for what is none of the three ways to say what a group is; see `group_names`."""
    if group is None or (isinstance(group, int) and group >= 1):
        return
    expected = "null, a folder level from 1, FILE.csv:COLUMN, or a regular expression with one group, as in ([0-9]+)_"
    if isinstance(group, int):
        raise ConfigError("group", group, expected)
    if _COLUMN.fullmatch(group):
        return
    try:
        count = re.compile(group).groups
    except re.error as error:
        raise ConfigError("group", group, f"{expected} ({error})") from None
    if count != 1:
        raise ConfigError("group", group, f"{expected}; it has {count} groups")


def group_names(paths: Sequence[str], group: str | int, tree: Tree, prefix: str) -> list[str]:
    """The name of each file's group.

    Args:
        paths: of the files in the tree. prefix: how all begin, up to the folders of the classes.
        group: a whole number n: the n-th folder of the path, where the class's is number 0. `FILE.csv:COLUMN`: the
            column of a table in the tree, whose first column that names all files (by path, by name, or by name
            without ending) says which row is whose. Else a regular expression, searched for in the path, whose one
            group is the name.

    Raises:
        ConfigError: there are files without a group.
    """
    if isinstance(group, int):
        found = [_level(path.removeprefix(prefix), group) for path in paths]
        what = f"a folder at level {group} below the class"
    elif table := _COLUMN.fullmatch(group):
        found = _of_table(paths, table["file"], table["column"], tree, prefix)
        what = f"a value in column {table['column']}"
    else:
        pattern = re.compile(group)
        found = [match[1] if (match := pattern.search(path.removeprefix(prefix))) else None for path in paths]
        what = "a match in the path of each image"
    lacking = [path for path, name in zip(paths, found, strict=True) if not name]
    if lacking:
        counts = f"{len(lacking)} of {len(paths)} images have none, the first is {lacking[0]}"
        raise ConfigError(GROUP_KEY, group, f"{what}; {counts}")
    return [name for name in found if name]


def numbered(*parts: Sequence[str]) -> list[np.ndarray]:
    """Names as numbers, the same in all parts: int64, from 0 in order of the names."""
    number = np.unique([name for part in parts for name in part], return_inverse=True)[1]
    return np.split(number.astype(np.int64), np.cumsum([len(part) for part in parts])[:-1])


def _level(path: str, level: int) -> str | None:
    folders = path.split("/")[1:-1]
    return folders[level - 1] if len(folders) >= level else None


def _of_table(paths: Sequence[str], file: str, column: str, tree: Tree, prefix: str) -> list[str | None]:
    """Each file's entry in a column; None where it has none."""
    if file not in tree.paths():
        tables = [path for path in tree.paths() if path.lower().endswith(TABLE_SUFFIXES)]
        raise ConfigError(GROUP_KEY, file, "a table in dataset.root", tables)
    table = read_table(tree, file, GROUP_KEY)
    if column not in table.columns:
        raise ConfigError(GROUP_KEY, column, f"a column of {file}", table.columns)
    best: list[set[str]] = [set() for _ in paths]
    for naming in table.columns.drop(column):
        rows: dict[str, set[str]] = {}
        for name, value in zip(table[naming].tolist(), table[column].tolist(), strict=True):
            rows.setdefault(name.strip(), set()).add(value.strip())
        found = [next((rows[key] for key in _keys(path, prefix) if key in rows), set[str]()) for path in paths]
        if sum(map(bool, found)) > sum(map(bool, best)):
            best = found
    for path, values in zip(paths, best, strict=True):
        if len(values) > 1:
            raise ConfigError(GROUP_KEY, f"{file}:{column}", f"one group for each image; {path} has {len(values)}")
    return [next(iter(values), None) for values in best]


def _keys(path: str, prefix: str) -> tuple[str, ...]:
    """What a table may call a file: by its path, its name, or its name without ending."""
    whole = PurePosixPath(path)
    return path, path.removeprefix(prefix), whole.name, whole.stem
