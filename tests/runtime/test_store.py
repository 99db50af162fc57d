"""The per-client store behaves like a dictionary of rows, whatever its memory, and survives a kill at any point."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import digest_of
from cutlayer.runtime.ground.serial import encode_tensors
from cutlayer.runtime.parties.store import Store

ROW_BYTES = 4 * 4
operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "drop", "discard", "commit", "checkpoint"]), st.integers(0, 4), st.sampled_from("ab")
    ),
    max_size=40,
)


def row(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), float(value))}


@given(operations)
def test_equals_a_dictionary_with_memory_for_two_rows(tmp_path_factory, steps) -> None:
    store = Store(tmp_path_factory.mktemp("store"), memory_limit=2 * ROW_BYTES)
    committed: dict[tuple[int, str], float | None] = {}
    staged: dict[tuple[int, str], float | None] = {}
    for number, (operation, client, name) in enumerate(steps):
        if operation == "put":
            store.put(client, name, row(number))
            staged[client, name] = number
        elif operation == "drop":
            store.drop(client, name)
            staged[client, name] = None
        elif operation == "discard":
            store.discard(client)
            staged = {key: value for key, value in staged.items() if key[0] != client}
        else:
            store.commit()
            committed |= staged
            staged = {}
            if operation == "checkpoint":
                store.checkpoint()
    for client in range(5):
        for name in "ab":
            expected = {**committed, **staged}.get((client, name))
            found = store.get(client, name)
            assert (found is None) == (expected is None)
            if found is not None:
                assert found["w"].tolist() == [expected] * 4
    assert store.memory_bytes <= 2 * ROW_BYTES or len(committed) <= 1


def play(store: Store, steps, offset: int = 0) -> None:
    for number, (operation, client, name) in enumerate(steps):
        if operation == "put":
            store.put(client, name, row(offset + number))
        elif operation == "drop":
            store.drop(client, name)
        elif operation == "discard":
            store.discard(client)
        else:
            store.commit()
            if operation == "checkpoint":
                store.checkpoint()


def rows_of(store: Store) -> dict[tuple[int, str], list[float] | None]:
    found = {(client, name): store.get(client, name) for client in range(5) for name in "ab"}
    return {key: None if value is None else value["w"].tolist() for key, value in found.items()}


def values(store: Store, client: int) -> list[float]:
    found = store.get(client, "a")
    assert found is not None
    return found["w"].tolist()


@given(operations, operations)
def test_restore_discards_what_came_after_the_checkpoint(tmp_path_factory, before, after) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder, memory_limit=2 * ROW_BYTES)
    play(store, before)
    store.discard_all()
    segments = store.checkpoint()
    version = store.version
    expected = rows_of(store)
    after = [step for step in after if step[0] != "checkpoint"]
    play(store, after, 1000)
    store.commit()

    later = shutil.copytree(folder, tmp_path_factory.mktemp("later"), dirs_exist_ok=True)
    resumed = Store(later, memory_limit=2 * ROW_BYTES)
    resumed.restore(segments, version)
    assert rows_of(resumed) == expected
    # It continues as the other did, and a third restores what it leaves.
    play(resumed, after, 1000)
    resumed.commit()
    assert rows_of(resumed) == rows_of(store)
    last = Store(later)
    last.restore(resumed.checkpoint(), resumed.version)
    assert rows_of(last) == rows_of(store)


@given(operations, st.integers(0, 3))
def test_each_checkpoint_is_whole_until_its_files_are_removed(tmp_path_factory, steps, limit: int) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder, memory_limit=limit * ROW_BYTES)
    taken = []
    for step in [*steps, ("checkpoint", 0, "a")]:
        play(store, [step])
        if step[0] == "checkpoint":
            store.discard_all()
            taken.append((store._segments.values(), store.version, rows_of(store)))
            taken[-1] = ([*taken[-1][0]], *taken[-1][1:])
    for segments, version, expected in taken:
        for mark in segments:
            digest_of(folder, mark)
        earlier = Store(folder)
        earlier.restore(segments, version)
        assert rows_of(earlier) == expected


def test_few_files_hold_many_rows_and_little_that_is_out_of_date(tmp_path: Path) -> None:
    store = Store(tmp_path, memory_limit=20 * ROW_BYTES)
    live = 0
    for number in range(200):
        for client in range(number % 7 * 3, number % 7 * 3 + 3 + number // 20):
            store.put(client, "a", row(number))
            live = max(live, client + 1)
        store.commit()
        segments = store.checkpoint()
        assert len(segments) <= 2 + math.log2(live)
        row_bytes = len(encode_tensors(row(0)))
        assert sum(mark.bytes for mark in segments) <= 3 * live * row_bytes + len(segments) * (64 + 60 * live)


def test_a_segment_between_checkpoints_does_not_grow_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cutlayer.runtime.parties.store._STALE_BYTES", 4000)
    store = Store(tmp_path, memory_limit=2 * ROW_BYTES)
    for number in range(300):
        for client in range(5):
            store.put(client, "a", row(number + client))
        store.commit()
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size <= 4000 + 200
    assert [values(store, client) for client in range(5)] == [[299 + client] * 4 for client in range(5)]


def test_a_row_that_was_damaged_on_the_disk_is_reported(tmp_path: Path) -> None:
    store = Store(tmp_path, memory_limit=ROW_BYTES)
    for client in range(3):
        store.put(client, "a", row(client))
    store.commit()
    (mark,) = store.checkpoint()
    content = bytearray((tmp_path / mark.name).read_bytes())
    content[content.index(torch.tensor(0.0).numpy().tobytes() * 4) + 3] ^= 64
    (tmp_path / mark.name).write_bytes(content)
    with pytest.raises(ConfigError, match="has other bytes than were written"):
        store.get(0, "a")


def test_rows_are_copies(tmp_path: Path) -> None:
    store = Store(tmp_path)
    value = row(1)
    store.put(0, "a", value)
    value["w"].zero_()
    store.commit()
    assert values(store, 0) == [1] * 4


def test_an_absent_row_costs_nothing() -> None:
    store = Store(None)
    assert all(store.get(client, "a") is None for client in range(1_000_000))
    assert store.memory_bytes == 0
