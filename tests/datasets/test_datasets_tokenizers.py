"""Tokenizers: bytes, and one of Hugging Face that is made here, from its files."""

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer import train_tokenizer
from cutlayer.datasets import DatasetConfig, load
from cutlayer.datasets.tokenizer import ByteTokenizer, find_tokenizer
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.network.agreement import compare_data, data_facts

TEXTS = ["the cat sat on the mat", "a cat can't sit on £ 20 notes", "  two  spaces\nand a line"] * 5


def save_tokenizer(folder: Path, *, end: str | None = "<end>", merges: int = 320) -> Any:
    """Make a byte-level BPE tokenizer of the texts and save it as transformers does."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=merges, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end)
    wrapped.save_pretrained(folder)
    return made


@given(text=st.text(max_size=40))
def test_bytes_give_the_text_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens == [*text.encode()]
    assert tokenizer.decode([*tokens, tokenizer.end]) == text
    assert max(tokens, default=0) < tokenizer.end < tokenizer.size


def test_half_a_character_is_shown_as_such() -> None:
    assert ByteTokenizer().decode([*"é".encode()][:1]) == "\ufffd"
    assert ByteTokenizer().encode("\ud800") == [ord("?")], "what JSON may have and UTF-8 does not"


def test_a_folder_s_tokens_are_those_of_its_tokenizer(tmp_path: Path) -> None:
    made = save_tokenizer(tmp_path)
    found = find_tokenizer(str(tmp_path))
    assert found.size == made.get_vocab_size() + 1
    assert found.end == found.size - 1
    for text in TEXTS[:3]:
        assert found.encode(text) == made.encode(text).ids
        assert found.decode([*found.encode(text), found.end]) == text
    assert found.encode_all(TEXTS) == [made.encode(text).ids for text in TEXTS]
    assert found.encode_all([]) == []
    assert pickle.loads(pickle.dumps(found)).encode(TEXTS[0]) == found.encode(TEXTS[0]), "as workers get it"


def test_the_hash_is_of_what_the_tokenizer_does(tmp_path: Path) -> None:
    for name, values in {"one": {}, "same": {}, "other": {"merges": 262}, "end": {"end": "."}}.items():
        save_tokenizer(tmp_path / name, **values)
    one, same, other, end = (find_tokenizer(str(tmp_path / name)).hash for name in ("one", "same", "other", "end"))
    assert one == same
    assert len({one, other, end, ByteTokenizer().hash}) == 4


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "endless", end=None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, message in {
        "endless": "a token that ends a text",
        "empty": "files are on this machine",
        "broken": "files are on this machine",
        "nowhere": "files are on this machine",
    }.items():
        with pytest.raises(ConfigError, match=rf"dataset\.options\.tokenizer=.*{name}.*{message}") as caught:
            find_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_bytes_need_no_package_and_others_name_it() -> None:
    program = """
import sys
sys.modules["transformers"] = None
from cutlayer.datasets import DatasetConfig, load
from cutlayer.datasets.tokenizer import find_tokenizer
print(find_tokenizer("bytes").size)
try:
    find_tokenizer("gpt2")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, line = done.stdout.splitlines()
    assert size == "257"
    assert "dataset.options.tokenizer=gpt2" in line
    assert "huggingface" in line


def test_parties_with_other_tokenizers_do_not_work_together(tmp_path: Path) -> None:
    """Also where each has data of its own, of which neither knows the other's."""
    for name, merges in (("one", 320), ("same", 320), ("other", 262)):
        save_tokenizer(tmp_path / name, merges=merges)

    def facts(tokenizer: str) -> dict[str, Any]:
        config = DatasetConfig("shakespeare", options={"tokenizer": tokenizer, "plays": ["Macbeth"], "length": 16})
        data = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
        assert data.info.outputs == find_tokenizer(tokenizer).size
        return data_facts(data, divided=False)

    one, same, other = (facts(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert compare_data(one, same) is None, "wherever it lies"
    assert "the client's data have tokenizer" in str(compare_data(one, other))
    assert "the client's data have tokenizer" in str(compare_data(one, facts("bytes")))


def trained(folder: Path, *given: str) -> int:
    return train_tokenizer.main([str(folder), "dataset=shakespeare", "dataset.options.plays=[Macbeth]", *given])


def test_a_tokenizer_is_trained_on_what_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of as many tokens as asked for, in fewer of which the text is told, and all of it comes back."""
    pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    role = "dataset.options.roles=[Macbeth]"
    assert trained(tmp_path / "made", role, "tokens=400") == 0
    assert "400 tokens from" in capsys.readouterr().out
    assert trained(tmp_path / "again", role, "tokens=400") == 0
    assert find_tokenizer(str(tmp_path / "made")).hash == find_tokenizer(str(tmp_path / "again")).hash
    assert trained(tmp_path / "other", "dataset.options.roles=[Lady Macbeth]", "tokens=400") == 0
    assert find_tokenizer(str(tmp_path / "made")).hash != find_tokenizer(str(tmp_path / "other")).hash
    options = {"plays": ["Macbeth"], "roles": ["Macbeth"], "length": 64}
    texts: list[str] = []
    counts: list[int] = []
    for name in ("bytes", str(tmp_path / "made")):
        config = DatasetConfig("shakespeare", options={**options, "tokenizer": name})
        data = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
        assert data.tokenizer is not None
        own = [data.train.texts.completion(i) for i in range(len(data.train.texts))]  # pyright: ignore
        texts.append(data.tokenizer.decode([token for part in own for token in part[:-1]]))
        counts.append(sum(map(len, own)))
    assert counts[1] < 0.7 * counts[0]
    assert texts[0][:500] == texts[1][:500]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["tokens=256"], "tokens=256: expected an integer >= 257"),
        (["tokens=many"], "tokens=many: expected an integer >= 257"),
        (["other"], "folder=.*,other: expected one folder"),
        (["dataset.options.plays=[Hamlet]"], "dataset.options.plays=Hamlet: expected a play"),
        (["dataset=digits"], "dataset.options.tokenizer: no such key"),
    ],
)
def test_what_no_tokenizer_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], line: str
) -> None:
    pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    folder = tmp_path / "made"
    start = [] if given == ["dataset=digits"] else ["dataset=shakespeare"]
    assert train_tokenizer.main([str(folder), *start, *given]) == 1
    assert re.match(line, capsys.readouterr().err)
    assert not folder.exists()
    folder.mkdir()
    assert train_tokenizer.main([str(folder)]) == 1
    assert "expected a folder that does not exist yet" in capsys.readouterr().err
