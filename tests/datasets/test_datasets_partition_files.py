"""The table and the picture of a partition."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.figure import Figure
from PIL import Image

from cutlayer.datasets import DatasetConfig, Partition, partition, partition_files
from cutlayer.datasets.partition_files import PICTURE_COLUMNS, columns, csv_lines, save_partition


@pytest.mark.parametrize("clients", [1, 7, 399, 5000])
def test_table_and_picture(tmp_path: Path, clients: int) -> None:
    labels = np.arange(10_000) % 5
    config = DatasetConfig("synthetic", distribution="dirichlet", alpha=0.2)
    parts = partition(labels, clients, config, seed=0)
    save_partition(tmp_path, parts, labels, 5, ["a", "b,c", "$d", "client", "é"])
    frame = pd.read_csv(tmp_path / "partition.csv")
    assert frame.iloc[:, 1].tolist() == parts.sizes.tolist()
    assert np.array_equal(frame.iloc[:, 2:].to_numpy(), parts.table(labels, 5))
    assert frame.iloc[:, 2:].to_numpy().sum() == 10_000
    with Image.open(tmp_path / "partition.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_names_of_classes_are_no_formulas(tmp_path: Path) -> None:
    labels = np.arange(20) % 2
    parts = partition(labels, 2, DatasetConfig("synthetic"), seed=0)
    save_partition(tmp_path, parts, labels, 2, ["=1+1", "a\x1b[31m"])
    assert pd.read_csv(tmp_path / "partition.csv").columns.tolist() == ["client", "samples", "'=1+1", "a\\x1b[31m"]


def test_picture_is_of_shares_whether_binned_or_not() -> None:
    labels = np.repeat([0, 1], [3000, 9000])
    few = Partition.from_owner(np.repeat(np.arange(4), 3000), 4)
    shares, sizes = columns(few, labels, 2)
    assert shares.tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert sizes.tolist() == [3000] * 4
    many = Partition.from_owner(np.random.default_rng(0).permutation(1200)[np.arange(12_000) // 10], 1200)
    shares, sizes = columns(many, labels, 2)
    assert shares.shape == (2, PICTURE_COLUMNS)
    assert shares[0].tolist() == [1] * 100 + [0] * 300
    assert set(sizes) == {10}


def test_table_of_a_range_of_clients() -> None:
    labels = np.arange(100) % 3
    parts = partition(labels, 10, DatasetConfig("synthetic"), seed=0)
    assert np.array_equal(parts.table(labels, 3, 2, 5), parts.table(labels, 3)[2:5])


def test_samples_without_owner_and_clients_without_samples() -> None:
    parts = Partition.from_owner(np.array([2, -1, 0, 2]), 3)
    assert [parts.indices(i).tolist() for i in range(3)] == [[2], [], [0, 3]]
    assert parts.sizes.tolist() == [1, 0, 2]
    with pytest.raises(IndexError):
        parts.indices(3)


def test_a_picture_is_drawn_once_for_runs_whose_clients_have_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, drawn, draw = np.arange(60) % 3, list[int](), partition_files.draw

    def counted(*arguments: object) -> None:
        drawn.append(1)
        draw(*arguments)

    monkeypatch.setattr(partition_files, "draw", counted)
    for number, (clients, names) in enumerate([(4, "abc"), (4, "abc"), (5, "abc"), (4, "abd"), (4, "abc")]):
        parts = partition(labels, clients, DatasetConfig("synthetic"), seed=0)
        for place, shared in (("own", None), ("shared", tmp_path / "drawn")):
            (tmp_path / place / str(number)).mkdir(parents=True)
            save_partition(tmp_path / place / str(number), parts, labels, 3, names, shared)
        for file in ("partition.csv", "partition.png"):
            paths = [tmp_path / place / str(number) / file for place in ("own", "shared")]
            assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(drawn) == 5 + 3
    assert sorted(path.suffix for path in (tmp_path / "drawn").iterdir()) == [".png"] * 3


@given(arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.integers(0, 2**62)))
def test_lines_are_what_str_writes(rows: np.ndarray) -> None:
    expected = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
    assert csv_lines(rows).decode() == expected


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_counts_can_be_read_on_their_colour(classes: int) -> None:
    """White on the darkest, dark on the lightest, however few classes there are."""
    axes = Figure().subplots()
    shares = np.zeros((classes, 3))
    shares[0] = [1.0, 0.9, 0.1]
    partition_files._write_counts(axes, shares, np.array([10, 10, 10]))
    assert [text.get_color() for text in axes.texts] == ["white", "white", "#333333"]
