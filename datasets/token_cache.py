"""Large files of text as tokens in a file beside them, made once and then read where they are needed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cutlayer.datasets.examples import COLUMNS, Columns, Example, Examples, read_examples, write_tokens
from cutlayer.datasets.texts import MappedTokens, token_dtype
from cutlayer.datasets.tokenizer import Tokenizer
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import sync_file

log = logging.getLogger(__name__)

# Smaller files are made tokens each time, in memory.
CACHED_BYTES = 32 << 20
_FOLDER = "tokens"
_FORMAT = "1"


def examples_of(file: Path, rows: Callable[[], Iterable[Example]], how: str, tokenizer: Tokenizer) -> Examples:
    """The examples of a file, as tokens: of a large one in files in `tokens/` beside it.

    These are named by what is in the file, by how it is read and by the tokenizer, so that they are never out of date.
    Several processes may make them at once: each makes its own, and the last one's, which are equal, stay.

    Args:
        rows: reads the file. how: what decides its rows, beside what is in it.

    Raises:
        ConfigError: the folder cannot be written to; and what `rows` raises.
    """
    if file.stat().st_size <= CACHED_BYTES:
        return read_examples(rows(), tokenizer)
    name = _digest(file, how, tokenizer)
    tokens, index = (file.parent / _FOLDER / f"{name}.{suffix}" for suffix in ("tokens", "npz"))
    found = _open(tokens, index, tokenizer)
    if found is None:
        log.info("%s is made tokens, which are kept in %s", file, tokens.parent)
        try:
            _write(tokens, index, rows(), tokenizer)
        except OSError as error:
            expected = f"in a folder that can be written to, as its tokens are kept beside it ({error})"
            raise ConfigError("dataset.root", file, expected) from error
        found = _open(tokens, index, tokenizer)
        assert found is not None
    return found


def _digest(file: Path, how: str, tokenizer: Tokenizer) -> str:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    digest.update(json.dumps([_FORMAT, how, tokenizer.hash]).encode())
    return digest.hexdigest()[:32]


def _write(tokens: Path, index: Path, rows: Iterable[Example], tokenizer: Tokenizer) -> None:
    """Both files take their places whole, the index last: where it is, the tokens are."""
    tokens.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=tokens.parent) as folder:
        written, listed = (Path(folder) / path.name for path in (tokens, index))
        with written.open("wb") as file:
            columns = write_tokens(rows, tokenizer, file)
        names = json.dumps([columns.stratum_names, columns.group_names]).encode()
        np.savez(listed, allow_pickle=False, **columns.values, names=np.frombuffer(names, np.uint8))
        for made, path in ((written, tokens), (listed, index)):
            sync_file(made)
            made.replace(path)


def _open(tokens: Path, index: Path, tokenizer: Tokenizer) -> Examples | None:
    """What was written; None where it is not there, or not whole."""
    try:
        with np.load(index, allow_pickle=False) as found:
            values = {name: found[name] for name in COLUMNS}
            strata, groups = json.loads(found["names"].tobytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, EOFError) as error:
        log.warning("%s is made again, as it cannot be read (%s)", index, " ".join(str(error).split())[:120])
        return None
    dtype, count = token_dtype(tokenizer.size), int(values["lengths"].sum())
    if not tokens.is_file() or os.path.getsize(tokens) != count * dtype.itemsize:
        return None
    columns = Columns(values, tuple(strata), tuple(groups))
    return columns.examples(MappedTokens.open(tokens, dtype, count))
