"""The per-client store behaves like a dictionary of rows, whatever its memory, and survives a kill at any point."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.store import Store

ROW_BYTES = 4 * 4
operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "drop", "discard", "commit", "checkpoint"]), st.integers(0, 4), st.sampled_from("ab")
    ),
    max_size=40,
)


def row(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), value)}


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
                store.clean()
    for client in range(5):
        for name in "ab":
            expected = {**committed, **staged}.get((client, name))
            found = store.get(client, name)
            assert (found is None) == (expected is None)
            if found is not None:
                assert found["w"].tolist() == [expected] * 4
    assert store.memory_bytes <= 2 * ROW_BYTES or len(committed) <= 1


@given(operations, operations)
def test_restore_discards_what_came_after_the_checkpoint(tmp_path_factory, before, after) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder, memory_limit=2 * ROW_BYTES)

    def play(steps, offset: int) -> None:
        for number, (operation, client, name) in enumerate(steps):
            if operation == "put":
                store.put(client, name, row(offset + number))
            elif operation == "drop":
                store.drop(client, name)
            elif operation == "commit":
                store.commit()

    play(before, 0)
    store.commit()
    manifest = store.checkpoint()
    version = store.version
    expected = {(c, n): store.get(c, n) for c in range(5) for n in "ab"}
    play(after, 1000)
    store.commit()

    resumed = Store(folder, memory_limit=2 * ROW_BYTES)
    resumed.restore(manifest, version)
    for (client, name), value in expected.items():
        found = resumed.get(client, name)
        assert (found is None) == (value is None)
        if found is not None:
            assert torch.equal(found["w"], value["w"])
    assert {path.name for path in folder.glob("*")} == {file for _, _, file in manifest}


def test_rows_are_copies(tmp_path: Path) -> None:
    store = Store(tmp_path)
    value = row(1)
    store.put(0, "a", value)
    value["w"].zero_()
    store.commit()
    assert store.get(0, "a")["w"].tolist() == [1] * 4


def test_an_absent_row_costs_nothing() -> None:
    store = Store(None)
    assert all(store.get(client, "a") is None for client in range(1_000_000))
    assert store.memory_bytes == 0
