"""Folders in the format of FSL-SAGE's own code, with made-up figures."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from cutlayer import plot_results
from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.runs import find_runs
from tests.plotting.conftest import WriteRun

SETTINGS = {
    "client": {"align": 10, "batch_size": 128, "dataset": "cifar", "epoch": 2, "lr": 0.01},
    "server": {"align": 10, "client": 3, "round": 200},
    "u_args": {"batch_round": 5, "batch_size": 128, "client": 3, "dataset": "cifar", "method": "FSL-Approx"},
}


def write_theirs(folder: Path, rounds: int = 4, **content: Any) -> Path:
    """A results.json as they write it: bytes from a float, losses, and a step."""
    folder.mkdir(parents=True)
    results = {
        "test_loss": [2.0 / number for number in range(1, rounds + 1)],
        "test_acc": [0.2 * number for number in range(1, rounds + 1)],
        "comm_load": [1000.0 * number for number in range(1, rounds + 1)],
        "step": 4,
        **content,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_settings(folder: Path, **user: Any) -> None:
    """A settings.yml of the first versions, a device as a Python object included."""
    text = yaml.safe_dump({**SETTINGS, "u_args": {**SETTINGS["u_args"], "sample": "iid", "seed": 200, **user}})
    device = "device: &id001 !!python/object/apply:torch.device\n- cuda\nother: *id001\n"
    (folder / "settings.yml").write_text(text + device)


def test_what_ran_is_read_from_the_names_of_the_folders(tmp_path: Path) -> None:
    names = "fsl_sage/resnet18/cifar10-noniid_dirichlet/R200m3E1B128q5l10-alp1.00e-01-seed201/241223-003938"
    folder = write_theirs(tmp_path / names)
    (run,) = find_runs(tmp_path).runs
    assert (run.folder, run.code) == (folder, "FSL-SAGE")
    assert run.config == {
        "algorithm": {"name": "fsl_sage", "upload_interval": 5, "align_interval": 10},
        "model": {"name": "resnet18"},
        "dataset": {"name": "cifar10", "distribution": "noniid_dirichlet", "alpha": 0.1},
        "rounds": 200,
        "num_clients": 3,
        "local_epochs": 1,
        "batch_size": 128,
        "seed": 201,
    }
    assert run.distribution == "noniid_dirichlet-alpha=0.1"
    assert run.results["rounds"] == [1, 2, 3, 4]
    assert run.bytes() == run.bytes(("y",)) == [1000, 2000, 3000, 4000]
    assert list(run.series("test_acc")) == [0.2, 0.4, 0.2 * 3, 0.8]
    assert list(run.series("test_loss")) == [2.0, 1.0, 2 / 3, 0.5]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            "fed_avg/simple_conv/cifar10-iid/R9m10E1B256-seed1/250102-151728",
            ("fed_avg", "simple_conv", "cifar10", "iid", 1),
        ),
        (
            "cse_fsl/resnet18/cifar100-noniid/R9m10E1B2q5-seed2/d/" + "0af" * 9,
            ("cse_fsl", "resnet18", "cifar100", "noniid", 2),
        ),
        ("fed_avg/gpt2/nlg_ft-iid/R9m3E1B8-seed3", ("fed_avg", "gpt2", "nlg_ft", "iid", 3)),
    ],
)
def test_names_of_other_algorithms_and_depths(tmp_path: Path, names: str, expected: tuple[Any, ...]) -> None:
    write_theirs(tmp_path / names)
    (run,) = find_runs(tmp_path).runs
    keys = ("algorithm.name", "model.name", "dataset.name", "dataset.distribution", "seed")
    assert tuple(run.get(key) for key in keys) == expected


def test_a_run_in_another_runs_folder_is_found_too(tmp_path: Path) -> None:
    folder = tmp_path / "fed_avg/simple_conv/cifar10-iid/R9m10E1B256-seed1/250102-151728"
    write_theirs(folder)
    write_theirs(folder / "5f3a", test_acc=[0.5], test_loss=[1.0], comm_load=[7])
    found = find_runs(tmp_path)
    assert len(found.runs + found.older) == 2


@pytest.mark.parametrize(
    ("name", "user", "expected"),
    [
        ("FSL-SAGE_h5", {}, {"name": "fsl_sage", "upload_interval": 5, "align_interval": 10}),
        ("CSE-FSL_h1", {"batch_round": 1}, {"name": "cse_fsl", "upload_interval": 1}),
        ("cifar-iid-K3U3E1BR5-200-241121-001549", {}, {"name": "fsl_sage", "upload_interval": 5, "align_interval": 10}),
        ("baselines/fed_avg", {"method": "fed_avg"}, {"name": "fed_avg"}),
    ],
)
def test_the_first_versions_left_a_settings_file(
    tmp_path: Path, name: str, user: dict[str, Any], expected: dict[str, Any]
) -> None:
    write_settings(write_theirs(tmp_path / name), **user)
    (run,) = find_runs(tmp_path).runs
    assert run.config["algorithm"] == expected
    assert run.config["dataset"] == {"name": "cifar10", "distribution": "iid"}
    keys = ("model.name", "rounds", "num_clients", "local_epochs", "batch_size", "seed", "lr")
    assert [run.get(key) for key in keys] == ["unknown", 200, 3, 2, 128, 200, 0.01]


def test_a_settings_file_runs_no_code(tmp_path: Path) -> None:
    folder, trace = write_theirs(tmp_path / "FSL-SAGE_h5"), tmp_path / "trace"
    (folder / "settings.yml").write_text(
        f"a: !!python/object/apply:pathlib.Path.touch [{trace}]\nu_args: {{seed: 1}}\n"
    )
    assert len(find_runs(tmp_path).runs) == 1
    assert not trace.exists()


def test_newer_results_call_accuracy_by_its_name(tmp_path: Path) -> None:
    folder = write_theirs(tmp_path / "fed_avg/simple_conv/cifar10-iid/R9m10E1B256-seed1/250102-151728")
    (folder / "results.json").write_text(json.dumps({"loss": [1, 2], "accuracy": [0.1, 0.2], "comm_load": [0.0, 8.0]}))
    (run,) = find_runs(tmp_path).runs
    assert list(run.series("test_acc")) == [0.1, 0.2]
    assert run.metrics == ("test_acc",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"comm_load": [1, 2]}, "results.json: comm_load has 2 entries, rounds 4"),
        ({"comm_load": [1.5] * 4}, "results.json: comm_load is no running count"),
        ({"comm_load": [4, 3, 2, 1]}, "results.json: comm_load is no running count"),
        ({"test_acc": ["0.5"] * 4}, "results.json: test_acc holds '0.5', which is no number"),
        ({"test_acc": [], "test_loss": [], "comm_load": []}, "results.json: no evaluated round"),
        ({"test_loss": [1]}, "results.json: test_loss has 1 entries, rounds 4"),
        ({"comm_load": None}, "config.yaml is missing, and results.json is not one of FSL-SAGE's code"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    folder = write_theirs(tmp_path / "fed_avg/simple_conv/cifar10-iid/R9m10E1B256-seed1/250102-151728", **content)
    assert find_runs(tmp_path).damaged == {folder: reason}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "no folder of FSL-SAGE's code: neither its name nor a settings.yml says what ran"),
        ("- 1", "settings.yml: it holds no mapping"),
        ("u_args: 1", "settings.yml has no u_args"),
        ("u_args: {method: 3}", "settings.yml: u_args.method is 3, expected one of fed_avg, "),
        ("a: [", "settings.yml: while parsing"),
    ],
)
def test_folders_that_tell_nothing_are_named(tmp_path: Path, settings: str | None, reason: str) -> None:
    folder = write_theirs(tmp_path / "somewhere")
    if settings is not None:
        (folder / "settings.yml").write_text(settings)
    found = find_runs(tmp_path)
    assert found.damaged[folder].startswith(reason)
    assert found.runs == []


def test_both_codes_in_one_comparison(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saves = tmp_path / "saves"
    for seed in (0, 1):
        write_run("fsl_sage", seed=seed, rounds=4)
        write_theirs(saves / f"fsl_sage/resnet18/cifar10-iid/R4m3E1B128q5l10-seed{seed}/241223-003938")
    write_theirs(saves / "fed_avg/resnet18/cifar10-iid/R4m3E1B128-seed0/241223-003938")
    curves = make_curves(find_runs(saves).runs)
    assert [(curve.method, curve.label, len(curve.runs)) for curve in curves] == [
        ("fed_avg", "FSL-SAGE's code", 1),
        ("fsl_sage", "", 2),
        ("fsl_sage", "FSL-SAGE's code", 2),
    ]
    config = tmp_path / "config.yaml"
    config.write_text("{formats: [svg], report: true}")
    assert plot_results.main(["--saves", str(saves), "--out", str(tmp_path / "out"), "--config", str(config)]) == 0
    assert capsys.readouterr().err == ""
    (folder,) = (tmp_path / "out").iterdir()
    assert "Runs of FSL-SAGE's code count no labels." in (folder / "table.md").read_text()
    assert pd.read_csv(folder / "table.csv", keep_default_na=False)["code"].tolist() == ["FSL-SAGE", "", "FSL-SAGE"]
    assert "FSL-SAGE's code" in (folder / "accuracy_communication.svg").read_text().replace("&apos;", "'")


def test_their_runs_alone_need_no_mark(tmp_path: Path) -> None:
    for interval in (1, 10):
        write_theirs(tmp_path / f"fsl_sage/resnet18/cifar10-iid/R4m3E1B128q5l{interval}-seed0/241223-003938")
    curves = make_curves(find_runs(tmp_path).runs)
    assert [curve.label for curve in curves] == ["align_interval=1", "align_interval=10"]
