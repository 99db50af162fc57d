"""Files of text with anything in them are read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cutlayer.datasets import Dataset, DatasetConfig, load
from cutlayer.runtime.ground.config import ConfigError

CPU = torch.device("cpu")

PIECES = [
    b"name : A | area : b||It is.\n",
    b"||",
    b" : ",
    b"|",
    b"\n",
    b"\r",
    b"\xff",
    b"\x00",
    b"mr,ref\n",
    b'"',
    b"name[A], near[]",
]
PIECES += [
    b'{"prompt": "a\\n", "completion": "b"}\n',
    b'{"completion": "\\ud800", "prompt": ""}\n',
    b"{}",
    b"[",
    b'{"a\\n\\u2028": 1}\n',
    b"1e999",
]
contents = st.lists(st.sampled_from(PIECES) | st.binary(max_size=5), max_size=12).map(b"".join)


def tried(name: str, root: Path, **options: Any) -> Dataset | None:
    """What is loaded; None where it is refused."""
    config = DatasetConfig(name, root=root, options=options)
    refused: ConfigError | None = None
    try:
        return load(config, seed=0, device=CPU, dtype=torch.float32)
    except ConfigError as error:
        refused = error
    assert len(str(refused).splitlines()) == 1, str(refused)
    return None


def check(data: Dataset | None) -> None:
    if data is not None:
        for source in (data.train, data.test):
            assert all((y != -100).any(1).all() for _, y in source.batches(torch.arange(len(source)), batch_size=3))


@settings(max_examples=150, deadline=None)
@given(content=contents, file=st.sampled_from(["train.txt", "trainset.csv"]))
@example(content=b"mr,ref\nname[A],\x00\n", file="trainset.csv")
@example(content=b'mr,ref\n"' + b"x" * 200_000, file="trainset.csv")
def test_of_e2e(tmp_path_factory: pytest.TempPathFactory, content: bytes, file: str) -> None:
    root = tmp_path_factory.mktemp("e2e")
    (root / file).write_bytes(content)
    (root / "test.txt").write_text("name : B | area : c||It is.\n")
    check(tried("e2e", root))
    check(tried("e2e", root, test=None, test_fraction=0.5))


@settings(max_examples=150, deadline=None)
@given(content=contents, layout=st.sampled_from(["padded", "packed"]), length=st.integers(1, 9))
def test_of_json_lines(tmp_path_factory: pytest.TempPathFactory, content: bytes, layout: str, length: int) -> None:
    root = tmp_path_factory.mktemp("jsonl")
    (root / "train.jsonl").write_bytes(content)
    (root / "test.jsonl").write_text(json.dumps({"prompt": "ask", "completion": "answer"}))
    check(tried("jsonl", root, layout=layout, length=length))
    check(tried("jsonl", root / "train.jsonl", layout=layout, length=length, prompt=None, empty="skip"))
