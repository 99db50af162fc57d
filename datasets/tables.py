"""Tables of text beside images: with commas, tabs or semicolons."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from cutlayer.datasets.trees import Tree
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".tab", ".tsv", ".txt")


def read_table(tree: Tree, file: str, key: str) -> pd.DataFrame:
    """A table of a tree, all entries as text, empty ones as ""; the mark that its first line has most divides columns.

    Raises:
        ConfigError: for `key`; it is no table.
    """
    import pandas as pd  # late: few data sets have a table, and it takes a while to load

    content = tree.read(file)
    head = content.split(b"\n", 1)[0]
    separator = max("\t;,", key=lambda mark: head.count(mark.encode()))
    try:
        return pd.read_csv(io.BytesIO(content), sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise ConfigError(key, file, f"a table with commas or tabs ({error})") from None
