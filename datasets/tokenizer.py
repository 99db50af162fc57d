"""Tokenizers: bytes, which need nothing, and those of Hugging Face, of files that are at hand."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.files import GGUF

BYTES = "bytes"
_KEY = "dataset.options.tokenizer"
# What a tokenizer is tried on for its hash, since equal vocabularies may be put together by other rules.
_TRIED = "The quick brown fox (No. 1,234,567) can't  jump over\n\tnaïve Émile's 12.50 £ - 東京 🦊; don't YOU?"


class Tokenizer(ABC):
    """Text as tokens, and tokens as text.

    Attributes:
        name: what `dataset.options.tokenizer` says.
        size: how many tokens there are, 0 to size - 1; as many logits a model gives for each.
        end: the token that ends a text.
        hash: of what decides the tokens of a text: 16 hexadecimal digits, the same wherever the files are.
    """

    name: str
    size: int
    end: int
    hash: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that mark its beginning or end."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; of those that only mark something, such as the end, nothing."""

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The tokens of each of several texts, faster."""


class ByteTokenizer(Tokenizer):
    """The bytes of a text in UTF-8 are its tokens, and 256 ends it."""

    name, size, end = BYTES, 257, 256
    hash = hashlib.sha256(b"bytes of UTF-8, 256 ends").hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """As many tokens as the text has bytes."""
        return [*_utf8(text)]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As uint8 each."""
        return [np.frombuffer(_utf8(text), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """What is no UTF-8 is shown as the replacement character."""
        return bytes(token for token in tokens if token < self.end).decode(errors="replace")


def _utf8(text: str) -> bytes:
    """Half of a surrogate pair, which JSON may have, is a question mark."""
    return text.encode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """One of `transformers`, from a folder or from the files that it has downloaded before.

    Nothing is downloaded, and no code is run that lies beside the files.

    Raises:
        ConfigError: the package or the files are not there, or no token ends a text.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._own = _found(name)
        self.size, end = len(self._own), self._own.eos_token_id
        if end is None:
            raise ConfigError(_KEY, name, "a tokenizer with a token that ends a text (eos_token)")
        self.end = int(end)
        decides = [sorted(self._own.get_vocab().items()), self.end, self.encode(_TRIED)]
        self.hash = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """As the tokenizer does it, without special tokens."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """All at once, on several threads."""
        return cast("list[list[int]]", self._own([*texts], add_special_tokens=False)["input_ids"]) if texts else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens, and with the spaces that there are."""
        return self._own.decode([*tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _found(name: str) -> Any:
    """The tokenizer of `transformers` by this name."""
    try:
        transformers = importlib.import_module("transformers")  # late: it takes seconds
    except ImportError:
        raise ConfigError(_KEY, name, f"{BYTES}, or the packages for others: {install('huggingface')}") from None
    folder = Path(name).expanduser()
    # A length that nothing reaches: what is too long for a model is cut, counted and said elsewhere.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "model_max_length": 1 << 40}
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    if folder.suffix == GGUF and folder.is_file():
        folder, options = folder.parent, {**options, "gguf_file": folder.name}
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name, **options)
    except Exception as error:  # of files that are missing, damaged or of another kind it raises what it likes
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        files = f"a Hugging Face tokenizer, by folder, file *{GGUF} or name, whose files are on this machine"
        raise ConfigError(_KEY, name, f"{BYTES}, or {files} ({reason})") from None
    finally:
        quiet.setLevel(level)


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `dataset.options.tokenizer` names.

    Raises:
        ConfigError: its package or its files are not there, or it has no token that ends a text.
    """
    return ByteTokenizer() if name == BYTES else HuggingFaceTokenizer(name)
