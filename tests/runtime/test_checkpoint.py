"""A checkpoint is restored as it was written, or is refused in one line; nothing outside its folder is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.serial import load_state, save_state, save_tensors
from cutlayer.runtime.records.results import Results
from cutlayer.runtime.rounds.federation import Federation
from tests import damage, full_disk
from tests.conftest import same, weights
from tests.forked import Forks
from tests.full_disk import disk

SETTING = ("algorithm=scaffold", "model=mlp", "num_clients=3", "rounds=3", "lr=0.05")


def train(federation: Federation, folder: Path, rounds: int, results: Results | None = None) -> Results:
    results = results or Results(folder)
    for _ in range(rounds):
        results.record(*federation.step())
        federation.checkpoint(results.state())
    return results


@pytest.fixture
def run(configure, tmp_path: Path) -> tuple[Any, Path]:
    """The configuration and the folder of a run of three rounds, with a checkpoint after each of the first two."""
    config = configure(*SETTING)
    folder = tmp_path / "run"
    train(Federation(config, folder), folder, 2)
    return config, folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "manifest.json") -> None:
    """Change a manifest's body, with the sum that goes with it, as one who means harm would."""
    path = folder / "checkpoint" / file
    content = json.loads(path.read_text())
    change(content["body"])
    content["sha256"] = hashlib.sha256(json.dumps(content["body"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def resume(config: Any, folder: Path) -> Federation:
    federation = Federation(config, folder)
    results = Results(folder)
    federation.resume(results.restore)
    train(federation, folder, 3 - federation.round, results)
    return federation


def refusal(config: Any, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        resume(config, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def whole(config: Any) -> dict[str, torch.Tensor]:
    federation = Federation(config)
    while not federation.done:
        federation.step()
    return weights(federation)


def test_a_damaged_checkpoint_falls_back_on_the_one_before_and_ends_alike(run, caplog) -> None:
    config, folder = run
    expected = whole(config)
    for file in ("manifest.json", "server-1.safetensors", "clients-1.rows"):
        copy = shutil.copytree(folder, folder.with_name(file))
        path = copy / "checkpoint" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        caplog.clear()
        federation = resume(config, copy)
        assert same(weights(federation), expected)
        (line,) = [record.getMessage() for record in caplog.records if "resumes from" in record.getMessage()]
        assert file in line
        assert line.endswith("resumes from the checkpoint before, of round 1")
        # Both of the last two checkpoints are whole again, and nothing else is left.
        names = {mark["name"] for each in ("manifest", "previous") for mark in named(copy, f"{each}.json")}
        assert {path.name for path in (copy / "checkpoint").iterdir()} == names | {"manifest.json", "previous.json"}


def named(folder: Path, file: str) -> list[dict[str, Any]]:
    body = json.loads((folder / "checkpoint" / file).read_text())["body"]
    return [body["server"], *(mark for marks in body["rows"].values() for mark in marks)]


def test_both_checkpoints_damaged_is_one_line_that_says_what_can_be_done(run) -> None:
    config, folder = run
    for name in ("manifest.json", "previous.json"):
        (folder / "checkpoint" / name).write_text("{")
    line = refusal(config, folder)
    assert "manifest.json" in line
    assert "previous.json" in line
    assert line.endswith("resume=never begins a new run")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "clients-1.rows/../x", "manifest.json"])
@pytest.mark.parametrize("where", ["server", "rows", "obsolete"])
def test_names_that_lead_elsewhere_are_refused(run, name: str, where: str) -> None:
    config, folder = run
    outside = folder / "outside.safetensors"
    outside.write_bytes(b"kept")
    for file in ("manifest.json", "previous.json"):
        if where == "obsolete":
            edit(folder, lambda body: body["obsolete"].append(name), file)
        elif where == "rows":
            edit(folder, lambda body: body["rows"]["clients"][0].update(name=name), file)
        else:
            edit(folder, lambda body: body["server"].update(name=name), file)
    assert "no file of a checkpoint" in refusal(config, folder)
    assert outside.read_bytes() == b"kept"
    assert Path("/etc/hostname").exists()


def test_a_newer_format_is_left_alone_and_told(run) -> None:
    config, folder = run
    path = folder / "checkpoint" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    line = refusal(config, folder)
    assert "a newer version of the platform wrote it (format 3; this one reads up to 2)" in line
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()} == before


@pytest.mark.parametrize("what", ["checkpoint", "clients-1.rows", "manifest.json", "metrics.csv"])
def test_links_are_not_followed(run, what: str) -> None:
    config, folder = run
    path = folder / what if (folder / what).exists() else folder / "checkpoint" / what
    target = path.rename(folder.with_name("elsewhere"))
    path.symlink_to(target)
    if target.is_dir():
        before = {file.name: file.read_bytes() for file in target.iterdir()}
        assert "is a link" in refusal(config, folder)
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before
        return
    before = target.read_bytes()
    if what == "metrics.csv":
        assert "is a link" in refusal(config, folder)
    else:
        assert same(weights(resume(config, folder)), whole(config))
        assert not path.is_symlink()
    assert target.read_bytes() == before


def test_only_files_that_a_manifest_named_are_removed(run) -> None:
    config, folder = run
    checkpoint = folder / "checkpoint"
    kept = [checkpoint / "mine.safetensors", checkpoint / "server-77.safetensors", checkpoint / "clients-77.rows"]
    for path in kept:
        path.write_bytes(b"mine")
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "a.safetensors").write_bytes(b"mine")
    (checkpoint / "clients").symlink_to(elsewhere)
    resume(config, folder)
    assert all(path.read_bytes() == b"mine" for path in [*kept, elsewhere / "a.safetensors"])


def as_first_format(folder: Path, federation: Federation, results: Results) -> None:
    """The checkpoint of a federation as the first versions of the platform wrote it."""
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint)
    rows: dict[str, list[Any]] = {"clients": [], "server": []}
    for name, store in federation.stores.items():
        (checkpoint / name).mkdir(parents=True)
        for client, row in store.all():
            file = f"{row}-{client}-1.safetensors"
            save_tensors(checkpoint / name / file, store.get(client, row) or {})
            rows[name].append([client, row, file])
    save_state(checkpoint / "server-2.safetensors", federation.server.state_dict())
    history = vars(results._history)
    sizes = {name: (folder / name).stat().st_size for name in ("metrics.csv", "extras.csv", "communication.csv")}
    manifest = {
        "identity": federation.setup.config.identity(),
        "round": federation.round,
        "server": "server-2.safetensors",
        "rows": rows,
        "version": 1,
        "ledger": federation.ledger.state_dict(),
        "results": {"offsets": sizes, "history": history},
        "seconds": federation.seconds,
        "clients": {},
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (folder / "history.jsonl").unlink()


def test_a_checkpoint_of_the_first_format_still_opens(configure, tmp_path: Path) -> None:
    config = configure(*SETTING)
    federation = Federation(config, tmp_path)
    results = train(federation, tmp_path, 2)
    journal = (tmp_path / "history.jsonl").read_bytes()
    as_first_format(tmp_path, federation, results)
    resumed = Federation(config, tmp_path)
    again = Results(tmp_path)
    resumed.resume(again.restore)
    assert (tmp_path / "history.jsonl").read_bytes() == journal
    assert vars(again._history) == vars(results._history)
    train(resumed, tmp_path, 1, again)
    assert same(weights(resumed), whole(config))
    # What is of the first format goes with the checkpoint after the next.
    assert (tmp_path / "checkpoint" / "clients").is_dir()
    resumed.checkpoint(again.state())
    resumed.checkpoint(again.state())
    assert not (tmp_path / "checkpoint" / "clients").exists()


def test_the_manifest_does_not_grow_with_the_rounds(configure, tmp_path: Path) -> None:
    config = configure(*SETTING)
    federation, results = Federation(config, tmp_path), Results(tmp_path)
    record, traffic = federation.step()
    sizes: list[int] = []
    for number in range(1, 30):
        record.round = number
        results.record(record, [(number, *line[1:]) for line in traffic])
        federation.checkpoint(results.state())
        sizes.append((tmp_path / "checkpoint" / "manifest.json").stat().st_size)
    assert max(sizes) - min(sizes[10:]) < 200  # digits of counts


def test_a_state_with_a_flipped_bit_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"w": torch.arange(5.0), "n": 3, "flags": (True, None)})
    content = path.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            state = load_state(path)
        except ConfigError:
            continue
        # A space of the header's that became another one, or a name that JSON reads alike.
        assert state["n"] == 3
        assert state["flags"] == (True, None)
        assert torch.equal(state["w"], torch.arange(5.0))


# ------------------------------------------------------------------ the same from outside, in a process of its own


def test_damaged_files_end_in_the_same_bits_or_in_one_line(forks: Forks) -> None:
    done = forks(["1", "25", "fsl_sage"], damage.__file__)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "25 damages: 0 wrong"


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(forks: Forks, tmp_path: Path) -> None:
    try:
        with disk(tmp_path / "disk", 1):
            pass
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    done = forks(["4"], full_disk.__file__)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("full 4 times")
