"""Texts of one's own: fields, groups, layouts, what is refused, and files larger than what is kept in memory."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer.datasets import Dataset, DatasetConfig, load, token_cache
from cutlayer.datasets.facts import changed
from cutlayer.datasets.text_source import TextSource
from cutlayer.datasets.texts import MappedTokens
from cutlayer.runtime.ground.config import ConfigError

CPU = torch.device("cpu")

ROWS = [
    {"prompt": f"ask {i // 2}", "completion": f"answer {i}", "client": f"c{i % 3}", "kind": i % 2, "text": "é" * i}
    for i in range(40)
]


def save(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def loaded(root: Path, values: dict[str, Any] | None = None, **options: Any) -> Dataset:
    config = DatasetConfig("jsonl", root=root, options=options, **(values or {}))
    return load(config, seed=0, device=CPU, dtype=torch.float32)


def texts_of(data: Dataset, source: object) -> list[tuple[str, str]]:
    assert isinstance(source, TextSource)
    assert data.tokenizer is not None
    texts, decode = source.texts, data.tokenizer.decode
    return [(decode(texts.prompt(index)), decode(texts.completion(index))) for index in range(len(texts))]


def test_fields_are_named_by_options(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", ROWS[:30])
    save(tmp_path / "test.jsonl", ROWS[30:])
    data = loaded(tmp_path, client="client", by="kind")
    assert data.info.class_names == ("0", "1")
    assert data.train.labels.tolist() == [row["kind"] for row in ROWS[:30]]
    assert data.groups is not None
    assert data.test.groups is not None
    assert data.groups.tolist() == [i % 3 for i in range(30)]
    assert data.test.groups.tolist() == [i % 3 for i in range(30, 40)]
    assert texts_of(data, data.test) == [(row["prompt"], row["completion"]) for row in ROWS[30:]]


def test_without_by_the_classes_are_the_clients_and_without_these_there_is_one(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", ROWS)
    save(tmp_path / "test.jsonl", ROWS)
    assert loaded(tmp_path, client="client").info.class_names == ("c0", "c1", "c2")
    data = loaded(tmp_path)
    assert data.info.class_names == ("all",)
    assert data.groups is not None
    assert len(np.unique(data.groups)) == 20, "texts of one prompt"


def test_a_prompt_is_on_one_side(tmp_path: Path) -> None:
    save(tmp_path / "mine.jsonl", ROWS)
    for root, options in ((tmp_path, {"train": "mine.jsonl", "test": None}), (tmp_path / "mine.jsonl", {})):
        data = loaded(root, test_fraction=0.3, **options)
        train, test = ({prompt for prompt, _ in texts_of(data, each)} for each in (data.train, data.test))
        assert not train & test
        assert len(train | test) == 20
        assert len(data.test) == 12
    held = loaded(tmp_path / "mine.jsonl", {"validation": 0.2}, test_fraction=0.3)
    train, validation = ({prompt for prompt, _ in texts_of(held, each)} for each in (held.train, held.validation))
    assert validation
    assert not train & validation


@pytest.mark.parametrize("length", [3, 7, 64])
def test_packed_texts_predict_every_byte_once(tmp_path: Path, length: int) -> None:
    save(tmp_path / "train.jsonl", ROWS)
    save(tmp_path / "test.jsonl", ROWS[:4])
    data = loaded(tmp_path, length=length, layout="packed", prompt=None, completion="completion", client="client")
    assert data.info.shape == (length,)
    count = sum(int((y != -100).sum()) for _, y in data.train.batches(torch.arange(len(data.train)), batch_size=5))
    assert count == sum(len(row["completion"].encode()) + 1 for row in ROWS), "and the end of each text"


def test_a_text_without_a_prompt_has_its_first_token_predicted(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", [{"completion": "ab"}])
    save(tmp_path / "test.jsonl", [{"completion": "c"}])
    data = loaded(tmp_path, prompt=None)
    assert data.groups is None
    ((x, y),) = data.train.batches(torch.arange(1), batch_size=1)
    assert x.tolist() == [[256, 97, 98]]
    assert y.tolist() == [[97, 98, 256]]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            ['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'],
            {},
            r"completion=completion: .*it has prompt in .*train\.jsonl line 2",
        ),
        (['{"prompt": "a", "completion": 3}'], {}, r"a field with text; .*train\.jsonl line 1"),
        (['{"prompt": "a", "completion": " "}'], {}, r"empty=skip; it is empty in .*train\.jsonl line 1"),
        (["", '["a"]'], {}, r"dataset\.root=.*train\.jsonl: .*line 2 is another value"),
        (['{"a": '], {}, r"train\.jsonl: .*line 1 is none"),
        (["[" * 100_000], {}, r"train\.jsonl: .*line 1 is none"),
        (['{"prompt": "a", "completion": "b"}'], {"client": "who"}, r"options\.client=who: .*line 1"),
        (['{"prompt": "a", "completion": "b", "who": null}'], {"client": "who"}, r"a name or a whole number; .*line 1"),
        (['{"prompt": "a", "completion": "b"}'], {"by": "kind"}, r"options\.by=kind: .*line 1"),
        (['{"prompt": "a", "completion": "b"}'] * 4, {"test": None}, r"test_fraction=0\.1: .*one prompt are on one"),
        (
            ['{"prompt": "a", "completion": "b"}'],
            {"empty": "skip"},
            r"with test\.jsonl, or dataset\.options\.test=null",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, lines: list[str], options: dict[str, Any], message: str
) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    if options.get("empty") is None:
        save(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b", "who": "x", "kind": 1}])
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_empty_completions_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "train.jsonl", [*ROWS, {"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "\n"}])
    save(tmp_path / "test.jsonl", ROWS)
    assert len(loaded(tmp_path, empty="skip").train) == len(ROWS)
    assert "2 texts without a completion are left out" in caplog.text
    assert "40 texts of train.jsonl have a prompt that test.jsonl has too" in caplog.text


def test_a_change_is_said_in_words(tmp_path: Path) -> None:
    def facts(rows: list[Any]) -> dict[str, Any]:
        save(tmp_path / "train.jsonl", rows)
        save(tmp_path / "test.jsonl", ROWS)
        return loaded(tmp_path).facts

    before = facts(ROWS)
    assert "training tokens to predict before" in str(
        changed(before, facts([{**ROWS[0], "completion": "x"}, *ROWS[1:]]))
    )
    assert "training texts are others" in str(
        changed(before, facts([{**ROWS[0], "completion": "answer!0"}, *ROWS[1:]]))
    )
    assert "tokenizer" in str(changed(before, {**before, "tokenizer": "gpt2, 0123"}))


def digest(data: Dataset) -> str:
    found = hashlib.sha256(str(data.facts).encode())
    draw = torch.Generator().manual_seed(1)
    for pair in data.train.batches(torch.arange(len(data.train)), batch_size=7, shuffle=True, generator=draw):
        for each in pair:
            found.update(each.numpy().tobytes())
    return found.hexdigest()


def test_a_large_file_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "train.jsonl", ROWS)
    save(tmp_path / "test.jsonl", ROWS[:9])
    expected = digest(loaded(tmp_path))
    assert not (tmp_path / "tokens").exists()
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 0)
    for storage in ("stream", "auto", "device"):
        data = loaded(tmp_path, {"storage": storage})
        assert isinstance(data.train, TextSource)
        assert isinstance(data.train.texts.tokens, MappedTokens)
        assert digest(data) == expected
    files = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert [name.partition(".")[2] for name in files] == ["npz", "tokens"] * 2, "made once"
    save(tmp_path / "train.jsonl", ROWS[1:])
    assert digest(loaded(tmp_path)) != expected, "of another content"
    assert len(list((tmp_path / "tokens").iterdir())) == 6
    assert len(loaded(tmp_path, client="client").info.class_names) == 3, "read in another way"


@pytest.mark.parametrize("damage", ["shorter", "no index", "no tokens"])
def test_tokens_that_are_not_whole_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 0)
    save(tmp_path / "train.jsonl", ROWS)
    expected = digest(loaded(tmp_path / "train.jsonl"))
    (tokens,), (index,) = (list((tmp_path / "tokens").glob(f"*.{kind}")) for kind in ("tokens", "npz"))
    if damage == "shorter":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif damage == "no index":
        index.write_bytes(b"PK nothing")
    else:
        tokens.unlink()
    assert digest(loaded(tmp_path / "train.jsonl")) == expected


def test_several_may_make_them_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 0)
    save(tmp_path / "train.jsonl", ROWS * 50)
    with ThreadPoolExecutor(6) as pool:
        found = {*pool.map(lambda _: digest(loaded(tmp_path / "train.jsonl")), range(6))}
    assert len(found) == 1
    assert len(list((tmp_path / "tokens").iterdir())) == 2, "nothing is left beside them"


def test_what_cannot_be_kept_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 0)
    save(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "tokens").write_text("a file where the folder would be")
    with pytest.raises(ConfigError, match=r"train\.jsonl: expected in a folder that can be written to"):
        loaded(tmp_path / "train.jsonl")


_LARGE = """
import json, resource, sys
from pathlib import Path
import torch
from cutlayer.datasets import DatasetConfig, load

file = Path(sys.argv[1])
text = "To be read from a file, and not to be held in memory. " * 45
with file.open("w") as out:
    for number in range(85_000):
        out.write(json.dumps({"prompt": f"number {number}", "completion": text, "client": number % 50}) + "\\n")
size = file.stat().st_size
config = DatasetConfig("jsonl", root=file, storage="stream", options={"client": "client", "length": 3000})
data_now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
limit = data_now + size // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
data = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
draw = torch.Generator().manual_seed(0)
samples = torch.randperm(len(data.train), generator=draw)[:8000]
seen = sum(int((y != -100).sum()) for _, y in data.train.batches(samples, batch_size=64))
assert seen == data.train.texts.subset(samples.numpy()).predicted
try:
    torch.zeros(size // 2, dtype=torch.uint8)
except RuntimeError:
    print(size, data.facts["training tokens to predict"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")
def test_what_is_larger_than_memory_is_read_from_its_tokens(tmp_path: Path) -> None:
    """Half of the file's size may be allocated, and the tokens take twice the file's."""
    command = [sys.executable, "-c", _LARGE, str(tmp_path / "large.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, tokens = map(int, done.stdout.split())
    assert size > 200 << 20
    assert tokens > 170 << 20
