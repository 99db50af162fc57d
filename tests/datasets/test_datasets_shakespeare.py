"""Shakespeare's roles: which there are, how they are divided, and batches that are the same in every process."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer.datasets import Dataset, DatasetConfig, load, partition, partition_by_group
from cutlayer.datasets.facts import changed
from cutlayer.datasets.shakespeare import _plays  # pyright: ignore[reportPrivateUsage]
from cutlayer.datasets.text_source import TextSource
from cutlayer.runtime.ground.config import ConfigError

CPU = torch.device("cpu")


def loaded(seed: int = 0, values: dict[str, Any] | None = None, **options: Any) -> Dataset:
    config = DatasetConfig("shakespeare", options=options, **(values or {}))
    return load(config, seed=seed, device=CPU, dtype=torch.float32)


def text_of(source: object, data: Dataset, samples: np.ndarray) -> str:
    """What samples that come one after another say."""
    assert isinstance(source, TextSource)
    assert data.tokenizer is not None
    tokens: list[int] = []
    for index in samples.tolist():
        own = source.texts.prompt(index) + source.texts.completion(index)
        tokens += own[1:] if tokens else own
    return data.tokenizer.decode(tokens)


@pytest.mark.parametrize("length", [32, 500])
def test_every_role_has_all_that_it_says_and_its_end_is_tested(length: int) -> None:
    data = loaded(length=length, by="role")
    said = {": ".join(role): text for role, text in _plays().items() if len(text) >= 2000}
    assert data.info.class_names == tuple(sorted(said))
    assert data.groups is not None
    assert np.array_equal(data.groups, data.train.labels.numpy())
    for number, (role, text) in enumerate(sorted(said.items())):
        train, test = (
            text_of(each, data, np.flatnonzero(each.labels.numpy() == number)) for each in (data.train, data.test)
        )
        assert f"{train}\n\n{test}" == text, role
        assert 0.1 * len(text) <= len(test) + 2, "at least a tenth"
        longest = max(map(len, text.split("\n\n")))
        assert len(test) < 0.1 * len(text) + longest + 2, "and no more than whole speeches need"


def test_what_there_is() -> None:
    data = loaded()
    assert (data.info.task, data.info.outputs, data.info.shape) == ("causal_lm", 257, (128,))
    assert data.info.class_names == ("Macbeth", "Othello", "Romeo and Juliet", "Twelfth Night")
    assert data.groups is not None
    assert len(np.unique(data.groups)) == 40
    assert data.test.groups is not None
    assert set(data.test.groups) == set(data.groups)


def test_roles_and_plays_are_chosen_by_name() -> None:
    data = loaded(roles=["Macbeth", "Othello: Clown"], by="role", least=500)
    assert data.info.class_names == ("Macbeth: Macbeth", "Othello: Clown")
    assert loaded(plays=["Othello"]).info.class_names == ("Othello",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": ["Fleance"]}, r"dataset\.options\.roles=Fleance: expected a role that has 2000 characters"),
        ({"roles": ["Macbth"]}, r"Macbth.*did you mean.*Macbeth"),
        ({"roles": ["Clown"], "least": 0}, r"Clown.*Othello: Clown.*Twelfth Night: Clown"),
        ({"roles": ["Macbeth"], "plays": ["Othello"]}, r"dataset\.options\.roles=Macbeth"),
        ({"plays": ["Hamlet"]}, r"dataset\.options\.plays=Hamlet: expected a play"),
        ({"plays": []}, r"options\.plays=\[\]"),
        ({"least": 0}, r"dataset\.options\.least=0: expected roles with test text; .* has too little"),
        ({"length": 0}, r"options\.length=0: expected an integer >= 1"),
    ],
)
def test_what_is_not_there_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augment": "flip"}, r"dataset\.augment=flip: expected nothing that is for images"),
        ({"resize": 8}, r"dataset\.resize=8"),
        ({"normalize": "imagenet"}, r"dataset\.normalize=imagenet"),
    ],
)
def test_what_is_for_images_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(values=values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 64}, "training samples before"),
        ({"by": "role"}, "classes 4 before, 40 now"),
        ({"least": 4000}, "training samples before"),
    ],
)
def test_a_change_is_said_in_words(options: dict[str, Any], words: str) -> None:
    before, now = loaded().facts, loaded(**options).facts
    assert changed(before, before) is None
    assert words in str(changed(before, now))


_DIGESTS = """
import hashlib, torch
from cutlayer.datasets import DatasetConfig, load, partition
for distribution in ("natural", "noniid_dirichlet", "iid"):
    config = DatasetConfig("shakespeare", distribution=distribution, validation=0.1, alpha=0.3)
    data = load(config, seed=3, device=torch.device("cpu"), dtype=torch.float32)
    parts = partition(data.train.labels, 12, config, seed=3, groups=data.groups)
    for client in range(12):
        found = hashlib.sha256()
        draw = torch.Generator().manual_seed(client)
        for pair in data.train.batches(parts.indices(client), batch_size=8, shuffle=True, augment=True, generator=draw):
            for each in pair:
                found.update(each.numpy().tobytes())
        print(distribution, client, found.hexdigest())
    print(data.facts)
"""


def test_clients_batches_are_the_same_in_every_process() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", _DIGESTS], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].splitlines()) == 3 * 13
    clients = [line.split()[2] for line in runs[0].splitlines() if len(line.split()) == 3]
    assert len(set(clients)) == len(clients), "no two clients have the same"


def test_clients_are_roles_and_together_have_all_of_the_text() -> None:
    data = loaded()
    config = DatasetConfig("shakespeare", distribution="natural")
    parts = partition(data.train.labels, 40, config, seed=0, groups=data.groups)
    assert data.groups is not None
    assert all(len(np.unique(data.groups[parts.indices(client).numpy()])) == 1 for client in range(40))
    assert data.test.groups is not None
    tested = partition_by_group(parts, data.groups, data.test.groups)
    assert tested.sizes.min() >= 1, "each has text of its own to be tested on"
    assert tested.sizes.sum() == len(data.test)
    predicted = 0
    for client in range(40):
        predicted += sum(int((y != -100).sum()) for _, y in data.train.batches(parts.indices(client), batch_size=5))
    assert predicted == data.facts["training tokens to predict"]
