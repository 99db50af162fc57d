"""Train a tokenizer on a dataset's texts: `python train_tokenizer.py <folder> tokens=1024 dataset=shakespeare`.

Byte pairs (Sennrich et al. 2016) as in GPT-2, of the texts that the configuration trains on and of no others. The
folder is then `dataset.options.tokenizer`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.folders import nothing_left
from cutlayer.runtime.ground.importing import quick_imports
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_errors, print_lines

if TYPE_CHECKING:
    from cutlayer.datasets.texts import Texts

_END = "<|endoftext|>"
_TOKENS = 1024
# All bytes and the end.
_LEAST = 257
# Longer than any text, so that none is cut; what has a fixed length is read in such blocks.
_WHOLE = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    """Train what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a tokenizer on the texts that a dataset trains on.",
        epilog=f"Keys: tokens={_TOKENS}, how many there are; dataset, dataset.options and all else that decides which "
        "texts are trained on, as of main.py.",
    )
    parser.add_argument("argument", nargs="+", help="a new folder for the tokenizer, and key=value")
    try:
        given: list[str] = parser.parse_args(arguments).argument
        folders = [text for text in given if "=" not in text]
        if len(folders) != 1:
            raise ConfigError("folder", ",".join(folders), "one folder for the tokenizer, such as data/tokenizer")
        folder = Path(folders[0])
        if folder.exists():
            raise ConfigError("folder", str(folder), "a folder that does not exist yet")
        size = _size([text for text in given if text.startswith("tokens=")])
        overrides = [text for text in given if text not in folders and not text.startswith("tokens=")]
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("", NO_VALUE, f"the package transformers is not installed: {install('huggingface')}")
        with quick_imports():  # late: a mistake in the keys need not wait for torch
            texts = _texts(overrides)
        found = _train(_pieces(texts), size)
        with nothing_left(folder):
            found.save_pretrained(folder)
        tokens = int((texts.lengths - 1).sum())
        print_lines(f"{len(found):,} tokens from {len(texts):,} texts of {tokens:,} bytes, in {folder}")
    except ConfigError as error:
        print_errors(error)
        return 1
    except KeyboardInterrupt:
        print_errors("interrupted; nothing was made")
        return 130
    return 0


def _size(given: list[str]) -> int:
    text = given[-1].partition("=")[2] if given else str(_TOKENS)
    if not text.isdecimal() or int(text) < _LEAST:
        raise ConfigError("tokens", text, f"an integer >= {_LEAST}: all bytes, and the end of a text")
    return int(text)


def _texts(overrides: list[str]) -> Texts:
    """What the configuration trains on, as bytes."""
    from cutlayer.datasets.text_source import TextSource
    from cutlayer.runtime.launching.hydra_support import load_config
    from cutlayer.runtime.rounds.setup import load_data

    own = ["dataset.options.tokenizer=bytes", f"dataset.options.length={_WHOLE}", "device=cpu"]
    config = load_config([*overrides, *own])
    source = load_data(config).train
    if not isinstance(source, TextSource):
        raise ConfigError("dataset", config.dataset.name, "data with text")
    return source.texts


def _pieces(texts: Texts) -> Iterator[str]:
    """Prompts and completions, each of which tokenizers take by itself."""
    for index in range(len(texts)):
        for part in (texts.prompt(index), texts.completion(index)):
            yield bytes(token for token in part if token < _LEAST - 1).decode(errors="replace")


def _train(texts: Iterator[str], size: int) -> Any:
    tokenizers = importlib.import_module("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(texts, trainer)
    fast = importlib.import_module("transformers").PreTrainedTokenizerFast
    return fast(tokenizer_object=own, eos_token=_END)


if __name__ == "__main__":
    run_program(main)
