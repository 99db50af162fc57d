"""The E2E data: both kinds of files, what is on which side, strata, and what is missing."""

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.datasets import Dataset, DatasetConfig, load, partition
from cutlayer.datasets.text_source import TextSource
from cutlayer.runtime.ground.config import ConfigError
from tests.places import SHARED

CPU = torch.device("cpu")
VALID = SHARED / "e2e" / "valid.txt"

MEANINGS = [
    {"name": name, "Type": "pub", "food": food, "near": near}
    for name in ("Aromi", "Cotto", "The Mill")
    for food in ("English", "Thai")
    for near in ("Ranch", "Café Brazil")
]
PUBLISHED = {"Type": "eatType"}


def sentences(meaning: dict[str, str], count: int = 3) -> list[str]:
    return [
        f"{meaning['name']} near {meaning['near']} has {meaning['food']} food{', it does' * i}" for i in range(count)
    ]


def save_spaced(file: Path, meanings: list[dict[str, str]]) -> None:
    """As LoRA's code has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{' | '.join(f'{key} : {value}' for key, value in each.items())}||{sentence} \n"
        for each in meanings
        for sentence in sentences(each)
    ]
    file.write_text("".join(lines), encoding="utf-8")


def save_published(file: Path, meanings: list[dict[str, str]]) -> None:
    """As the organisers have them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(["mr", "ref"])
        for each in meanings:
            mr = ", ".join(f"{PUBLISHED.get(key, key)}[{value}]" for key, value in each.items())
            table.writerows([mr, sentence] for sentence in sentences(each))


def loaded(root: Path, values: dict[str, Any] | None = None, **options: Any) -> Dataset:
    config = DatasetConfig("e2e", root=root, options=options, **(values or {}))
    return load(config, seed=0, device=CPU, dtype=torch.float32)


def texts_of(data: Dataset, source: object) -> list[tuple[str, str]]:
    """The prompts and the completions."""
    assert isinstance(source, TextSource)
    assert data.tokenizer is not None
    texts = source.texts
    for index in range(len(source)):
        assert texts.prompt(index)[-1] == texts.completion(index)[-1] == data.tokenizer.end
    decode = data.tokenizer.decode
    return [(decode(texts.prompt(index)), decode(texts.completion(index))) for index in range(len(source))]


@pytest.mark.parametrize(
    "saved", [(save_spaced, "train.txt", "test.txt"), (save_published, "trainset.csv", "testset_w_refs.csv")]
)
@pytest.mark.parametrize("folder", ["e2e", "."])
def test_both_kinds_of_files_are_read(tmp_path: Path, saved: tuple[Any, str, str], folder: str) -> None:
    save, train, test = saved
    save(tmp_path / folder / train, MEANINGS[:8])
    save(tmp_path / folder / test, MEANINGS[8:])
    data = loaded(tmp_path)
    assert data.info.class_names == ("Aromi", "Cotto", "The Mill")
    for source, meanings in ((data.train, MEANINGS[:8]), (data.test, MEANINGS[8:])):
        assert texts_of(data, source) == [
            (" | ".join(f"{key} : {value}" for key, value in each.items()), f" {sentence}")
            for each in meanings
            for sentence in sentences(each)
        ]
        names = [data.info.class_names[label] for label in source.labels.tolist()]
        assert names == [each["name"] for each in meanings for _ in range(3)]
        assert np.array_equal(source.groups, source.labels.numpy())


def test_no_meaning_that_is_tested_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_spaced(tmp_path / "train.txt", MEANINGS)
    save_spaced(tmp_path / "test.txt", MEANINGS[:2])
    data = loaded(tmp_path)
    assert len(data.train) == 3 * len(MEANINGS[2:])
    assert "6 sentences are not trained on" in caplog.text


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.25, 0.5, 0.8]), by=st.sampled_from(["restaurant", "food", "near", "length"]))
def test_one_file_is_divided_by_meaning(tmp_path_factory: pytest.TempPathFactory, share: float, by: str) -> None:
    root = tmp_path_factory.mktemp("e2e")
    save_spaced(root / "valid.txt", MEANINGS)
    data = loaded(root, train="valid", test=None, test_fraction=share, by=by)
    train, test = ({prompt for prompt, _ in texts_of(data, each)} for each in (data.train, data.test))
    assert not train & test
    assert len(train | test) == len(MEANINGS)
    assert len(data.test) <= share * 3 * len(MEANINGS)
    again = loaded(root, train="valid", test=None, test_fraction=share)
    assert texts_of(again, again.test) == texts_of(data, data.test), "whatever the classes are"


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("food", ("English", "Thai")),
        ("near", ("Café Brazil", "Ranch")),
        ("type", ("pub",)),
        ("area", ("no area",)),
        ("length", None),
    ],
)
def test_classes_are_what_was_asked_for(tmp_path: Path, by: str, names: tuple[str, ...] | None) -> None:
    save_spaced(tmp_path / "train.txt", MEANINGS[:8])
    save_spaced(tmp_path / "test.txt", MEANINGS[8:])
    data = loaded(tmp_path, by=by)
    if names is not None:
        assert data.info.class_names == names
        return
    assert [name.partition(":")[0] for name in data.info.class_names] == ["1", "2", "3", "4"][: data.info.classes]
    for number, length in zip(data.train.labels.tolist(), texts_of(data, data.train), strict=True):
        bound = int(data.info.class_names[number].split()[-2])
        assert (len(length[1].encode()) > bound) == ("over" in data.info.class_names[number])


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], {}, r"dataset\.root=.*e2e: expected a folder with train\.txt or trainset\.csv"),
        (["valid.txt"], {}, r"it has valid\.txt: dataset\.options\.train=valid dataset\.options\.test=null divides"),
        (["train.txt"], {}, r"a folder with test\.txt or testset_w_refs\.csv; it has train\.txt"),
        (["valid.txt"], {"train": "valid"}, r"a folder with test\.txt"),
        (["valid.txt"], {"train": "valid", "test": "valid"}, r"test=valid: expected another set"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, files: list[str], options: dict[str, Any], message: str) -> None:
    for file in files:
        save_spaced(tmp_path / file, MEANINGS)
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.txt", "name : Aromi||It is.\nname : Cotto It is.\n", "; not line 2"),
        ("train.txt", "name Aromi||It is.\n", "; not line 1"),
        ("train.txt", "name : Aromi|| \n", "a sentence in each line; line 1 has none"),
        ("train.txt", "food : Thai||It is.\n", "a name in each line; line 1 has none"),
        ("trainset.csv", "mr,text\n", "columns mr and ref"),
        ("trainset.csv", "mr,ref\nname[Aromi],\n", "a sentence in each line; line 2 has none"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=rf"{file}.*{message}") as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_spaced(tmp_path / "train.txt", MEANINGS[:8])
    save_spaced(tmp_path / "test.txt", MEANINGS[8:])
    caplog.set_level(logging.WARNING)
    whole = loaded(tmp_path)
    assert "cut" not in caplog.text
    data = loaded(tmp_path, length=60)
    assert "dataset.options.length=60 are cut: 36 of 36" in caplog.text
    assert isinstance(data.train, TextSource)
    for (prompt, completion), (all_of_prompt, all_of_completion) in zip(
        texts_of_cut(data), texts_of(whole, whole.train), strict=True
    ):
        assert all_of_prompt.endswith(prompt) or all_of_prompt.startswith(prompt)
        assert completion
        assert all_of_completion.startswith(completion)


def texts_of_cut(data: Dataset) -> list[tuple[str, str]]:
    assert isinstance(data.train, TextSource)
    assert data.tokenizer is not None
    texts, decode = data.train.texts, data.tokenizer.decode
    return [(decode(texts.prompt(index)), decode(texts.completion(index))) for index in range(len(texts))]


@pytest.mark.skipif(not VALID.is_file(), reason="the published data are not on every machine")
def test_the_published_validation_set(tmp_path: Path) -> None:
    data = loaded(VALID.parents[1], train="valid", test=None, length=600)
    lines = [line.rstrip("\n").partition("||") for line in VALID.read_text(encoding="utf-8").splitlines()]
    texts = texts_of(data, data.train) + texts_of(data, data.test)
    assert sorted(texts) == sorted((meaning.strip(), f" {sentence.strip()}") for meaning, _, sentence in lines)
    assert not {prompt for prompt, _ in texts_of(data, data.train)} & {
        prompt for prompt, _ in texts_of(data, data.test)
    }
    for distribution in ("natural", "noniid_dirichlet"):
        config = DatasetConfig("e2e", root=tmp_path, distribution=distribution)
        parts = partition(data.train.labels, 5, config, seed=0, groups=data.groups)
        assert sum(len(x) for i in range(5) for x, _ in data.train.batches(parts.indices(i), batch_size=64)) == 3813


def test_restaurants_are_taken_by_name(tmp_path: Path) -> None:
    save_spaced(tmp_path / "valid.txt", MEANINGS)
    one: dict[str, Any] = {"train": "valid", "test": None, "test_fraction": 0.5}
    whole = loaded(tmp_path, **one)
    names = whole.info.class_names
    parts = [loaded(tmp_path, **one, restaurants=chosen) for chosen in ([names[0]], [*names[1:]])]
    assert [each.info.class_names for each in parts] == [names[:1], names[1:]]
    both = [text for each in parts for side in (each.train, each.test) for text in texts_of(each, side)]
    assert sorted(both) == sorted(texts_of(whole, whole.train) + texts_of(whole, whole.test))
    with pytest.raises(
        ConfigError, match=r"restaurants=The Mil: expected a restaurant in valid\.txt; did you mean The"
    ):
        loaded(tmp_path, **one, restaurants=["Cotto", "The Mil"])
    with pytest.raises(ConfigError, match=r"restaurants=\[\]: expected null, or names of restaurants"):
        loaded(tmp_path, **one, restaurants=[])
    save_spaced(tmp_path / "train.txt", MEANINGS)
    save_spaced(tmp_path / "test.txt", [each for each in MEANINGS if each["name"] != names[0]])
    with pytest.raises(ConfigError, match=r"expected a restaurant in test\.txt, to test on"):
        loaded(tmp_path, restaurants=[names[0]])
