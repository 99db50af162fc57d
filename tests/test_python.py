"""`cutlayer.run` and its like: the results of `main.py` as Python objects, in a process that stays as it was."""

import csv
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

import cutlayer
from cutlayer.datasets import load as load_dataset
from cutlayer.interface import sweeping
from cutlayer.interface.overrides import overrides_of, settings_in
from cutlayer.runtime.ground import process
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR
from cutlayer.runtime.rounds.federation import Federation
from tests.forked import Forks
from tests.places import ROOT, checkout

SMALL = ("dataset=digits", "num_clients=2", "batch_size=100", "device=cpu", "progress=none")


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def result(saves: Path) -> cutlayer.RunResult:
    return cutlayer.run("algorithm=fsl_sage", *SMALL, rounds=2, eval_interval=1, save_dir=saves, lr=0.01)


def python(code: str, *arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), path])}
    command = [sys.executable, *arguments, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------- the result


def test_the_curves_are_those_of_the_run_s_files(result: cutlayer.RunResult) -> None:
    content = json.loads((result.folder / "results.json").read_text())
    assert result.metrics["round"].tolist() == content["rounds"] == [1, 2]
    for name in ("test_acc", "test_loss", "comm_load", "comm_up", "comm_down"):
        assert result.metrics[name].tolist() == content[name]
    assert result.metrics["align/target"].notna().any()
    with open(result.folder / "communication.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert result.communication.columns.tolist() == list(rows[0])
    assert result.communication["payload_bytes"].tolist() == [int(row["payload_bytes"]) for row in rows]
    training = result.communication[result.communication["kind"] != "metrics"]
    assert training["payload_bytes"].sum() == result.summary["comm_load"] == content["comm_load"][-1]
    assert result.summary["final_acc"] == content["test_acc"][-1]
    assert result.summary["best_acc"] == max(content["test_acc"])
    assert (result.config.rounds, result.config.lr, result.config.algorithm_name) == (2, 0.01, "fsl_sage")


def accuracy(forward: object, result: cutlayer.RunResult) -> float:
    data = load_dataset(result.config.dataset, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    assert callable(forward)
    samples = torch.arange(len(data.test.labels))
    with torch.no_grad():
        batches = data.test.batches(samples, batch_size=500)
        right = [(forward(images).argmax(1) == labels).sum() for images, labels in batches]
    return float(sum(right)) / len(data.test.labels)


@pytest.mark.parametrize("algorithm", ["fed_avg", "fsl_sage", "sl_u_shape"])
def test_the_model_and_its_parts_reach_the_accuracy_that_the_run_measured(algorithm: str, saves: Path) -> None:
    result = cutlayer.run(*SMALL, algorithm=algorithm, rounds=2, eval_interval=1, save_dir=saves, lr=0.01)
    whole = result.model()
    assert not whole.training
    measured = result.summary["final_acc"]
    assert measured > 0.2
    assert accuracy(whole, result) == pytest.approx(measured, abs=1e-6)
    parts = result.parts()

    def through(x: torch.Tensor) -> torch.Tensor:
        for part in parts.values():
            x = part(x)
        return x

    assert list(parts) == {"fed_avg": ["model"], "fsl_sage": ["client", "server"]}.get(
        algorithm, ["client", "server", "tail"]
    )
    assert accuracy(through, result) == pytest.approx(measured, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, which say what they change by themselves
@pytest.mark.parametrize("train", ["both", "B"])
def test_what_no_file_has_is_as_the_run_drew_it(train: str, saves: Path) -> None:
    """Frozen weights below adapters, and of adapters those that nothing trains."""
    pytest.importorskip("peft", reason="the extra huggingface is not installed")
    keys: dict[str, Any] = {"dataset.options": {"plays": ["Macbeth"], "length": 16}, "dataset.fraction": 0.5}
    keys |= {"model.options": {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}, "model": "huggingface/gpt2"}
    keys |= {"model.lora.r": 2, "model.lora.train": train, "lr": 0.05, "progress": "none", "num_clients": 2}
    keys["dataset.distribution"] = "iid"
    result = cutlayer.run(algorithm="fed_avg", dataset="shakespeare", rounds=1, save_dir=saves, **keys)
    assert result.config.model.lora.train == train
    x = torch.randint(200, (2, 9))
    (part,) = result.parts().values()
    torch.rand(3)
    with torch.no_grad():
        assert torch.equal(result.model()(x), part(x))
        assert torch.equal(result.model()(x), part(x))


def test_where_each_client_has_a_model_of_its_own_there_is_no_one_model(saves: Path) -> None:
    result = cutlayer.run(*SMALL, algorithm="local_only", rounds=1, save_dir=saves)
    with pytest.raises(cutlayer.ConfigError, match="each client has its own"):
        result.model()


# ---------------------------------------------------------------------- the same run


def test_a_finished_run_is_given_back_and_never_means_another(result: cutlayer.RunResult, saves: Path) -> None:
    given = ("algorithm=fsl_sage", *SMALL, "rounds=2", "eval_interval=1", f"save_dir={saves}", "lr=0.01")
    assert cutlayer.run(*given).folder == result.folder
    assert cutlayer.run(*given, resume="never").folder != result.folder
    measured = cutlayer.run(*given, **{"personalize.part": "head", "personalize.epochs": 1, "resume": "auto"})
    assert list(measured.folder.glob("personalized/*/summary.json"))


def test_the_bits_are_those_of_main_whatever_the_process_did_before(forks: Forks, tmp_path: Path) -> None:
    given = ("algorithm=fsl_sage", *SMALL, "rounds=2", "model.client.optimizer.lr=0.002")
    done = forks([*given, f"save_dir={tmp_path / 'program'}"])
    assert done.returncode == 0, done.stderr
    (program,) = (mark.parent for mark in (tmp_path / "program").rglob("identity"))
    torch.manual_seed(7)
    np.random.seed(7)
    cutlayer.run(*given, save_dir=tmp_path / "python", seed=1)
    here = cutlayer.run(*given, save_dir=tmp_path / "python")
    for name in ("model.safetensors", "communication.csv", "partition.csv"):
        assert (here.folder / name).read_bytes() == (program / name).read_bytes(), name
    assert (here.folder / "identity").read_text() == (program / "identity").read_text()
    assert here.folder.parent.name == program.parent.name
    assert "round 2/2" not in (here.folder / "run.log").read_text()  # progress=none, as main.py
    assert "in " in (here.folder / "run.log").read_text()


def test_an_interrupted_run_is_resumed_by_the_same_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*SMALL, "algorithm=fed_avg", "rounds=3", "checkpoint_interval=1", f"save_dir={tmp_path}")
    step = Federation.step

    def interrupted(self: Federation) -> object:
        if self.round == 2:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Federation, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cutlayer.run(*given)
    (begun,) = (mark.parent for mark in tmp_path.rglob("identity"))
    result = cutlayer.run(*given)
    assert (result.folder, result.summary["rounds"]) == (begun, 3)
    assert "resumed after round 2" in (begun / "run.log").read_text()


# ---------------------------------------------------------------------- the process


def state() -> dict[str, object]:
    root, own = logging.getLogger(), logging.getLogger("cutlayer")
    return {
        "signals": {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "folder": Path.cwd(),
        "logging": ([*root.handlers], root.level, [*own.handlers], own.level, logging.getLogRecordFactory()),
        "filters": [[*each.filters] for each in root.handlers],
        "hydra": (GlobalHydra.instance().hydra, VersionBase.instance().getbase()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "grad": torch.is_grad_enabled(),
        "default": torch.get_default_dtype(),
        "random": (torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "environment": dict(os.environ),
        "argv": [*sys.argv],
        "streams": (sys.stdout, sys.stderr),
    }


def test_the_process_stays_as_it_was(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.2"):  # the caller's own Hydra
            before = state()
            cutlayer.run(*SMALL, algorithm="fed_avg", rounds=1, save_dir=tmp_path, threads=1)
            with pytest.raises(cutlayer.ConfigError):
                cutlayer.run(*SMALL, algorithm="fed_avg", rounds=0, save_dir=tmp_path)
            after = state()
            assert compose("config").rounds == 200
        assert {key for key in before if before[key] != after[key]} == set()
    finally:
        torch.set_num_threads(threads)


def test_what_a_gpu_s_run_sets_is_put_back() -> None:
    def read() -> list[object]:
        switches = [getattr(each, "fp32_precision") for each in process._in_float32()]  # noqa: B009
        return [
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            *switches,
            dict(os.environ),
        ]

    before = read()
    with process.settings_kept():
        process.prepare_process(torch.device("cuda"), process.Arithmetic(deterministic=True, tf32=True))
        assert read() != before
    assert read() == before


def test_progress_is_printed_and_none_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    given = (*SMALL[:-1], "algorithm=fed_avg", "rounds=1", f"save_dir={tmp_path}")
    cutlayer.run(*given, progress="none")
    assert capfd.readouterr() == ("", "")
    cutlayer.run(*given, resume="never")
    shown = capfd.readouterr()
    assert "round 1/1, accuracy" in shown.out
    assert "final accuracy" in shown.out
    assert caplog.records == []  # the caller's own handlers see warnings only, as before


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("given", "values", "said"),
    [
        (("algorithm=fed_avgg",), {}, "algorithm=fed_avgg: .*did you mean fed_avg"),
        ((), {"roundz": 3}, "roundz: no such key; did you mean rounds"),
        ((), {"rounds": "many"}, "rounds='?many'?: "),
        ((), {"rounds": object()}, "rounds=.*expected a number"),
        (("-m", "seed=1,2"), {}, "run=-m: expected settings"),
        (("seed",), {}, "run=seed: expected settings"),
        (("seed=0,1",), {}, "seed=0,1: expected one value; cutlayer.sweep"),
        (("transport=grpc", "role=server"), {}, "role=server: expected null"),
        (("device=cuda:77",), {}, "device=cuda:77: expected a device"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    given: tuple[str, ...], values: dict[str, object], said: str, tmp_path: Path
) -> None:
    saves = tmp_path / "saves"
    with pytest.raises(cutlayer.ConfigError, match=said) as caught:
        cutlayer.run(*given, **{"save_dir": saves, **values})
    assert "\n" not in str(caught.value)
    assert not saves.exists()


@pytest.mark.parametrize(
    "value",
    [
        *(1, -2.5, 1e-05, True, None, "cnn2", "true", "null", "1e3", "", "a b", "it's", 'say "so"', "back\\slash"),
        *(
            "ends\\",
            "\\'",
            "a=b,c",
            "[x]",
            "$x",
            "torchvision/resnet18",
            "nan",
            [1, "a,b", None],
            {"lr": 0.1, "n": "x"},
        ),
    ],
)
def test_a_python_value_is_read_back_as_it_was(value: object) -> None:
    found = settings_in(overrides_of([], {"model.options.x": value}))["model.options.x"]
    assert (found, type(found)) == (value, type(value))


# ---------------------------------------------------------------------- load


def test_a_saved_run_is_the_same_result(result: cutlayer.RunResult) -> None:
    loaded = cutlayer.load(result.folder)
    assert loaded.metrics.equals(result.metrics)
    assert loaded.communication.equals(result.communication)
    assert (loaded.folder, loaded.summary) == (result.folder, result.summary)
    assert loaded.config.algorithm == result.config.algorithm
    assert all(
        torch.equal(*pair) for pair in zip(loaded.model().parameters(), result.model().parameters(), strict=True)
    )


def test_what_would_run_code_is_taken_only_if_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["from torch import nn", "class Net(nn.Sequential):", "    def __init__(self):"]
    lines.append("        super().__init__(nn.Flatten(), nn.Linear(64, 10))")
    (tmp_path / "own_net_of_a_test.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    model = "import/own_net_of_a_test.Net"
    result = cutlayer.run(*SMALL, algorithm="fed_avg", rounds=1, model=model, save_dir=tmp_path / "saves")
    assert sum(each.numel() for each in result.model().parameters()) == 650  # one's own, which this process named
    with pytest.raises(cutlayer.ConfigError, match=f"model={model}"):
        cutlayer.load(result.folder)
    named = cutlayer.load(result.folder, model=model)
    assert sum(each.numel() for each in named.model().parameters()) == 650


def test_what_is_no_finished_run_is_not_loaded(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(cutlayer.ConfigError, match="run"):
            cutlayer.load(folder)


# ---------------------------------------------------------------------- all runs


def test_all_runs_are_one_table(tmp_path: Path) -> None:
    saves, given = tmp_path / "saves", (*SMALL, "model=mlp", "rounds=2", "eval_interval=1")
    first = [cutlayer.run(*given, algorithm="fed_avg", seed=seed, save_dir=saves) for seed in (0, 1)]
    again = cutlayer.run(*given, algorithm="fed_avg", seed=1, save_dir=saves, resume="never")
    split = cutlayer.run(*given, "dataset.distribution=noniid_dirichlet", algorithm="sl", lr=0.1, save_dir=saves)
    begun = cutlayer.run(*given, algorithm="fed_avg", seed=2, save_dir=saves).folder
    content = json.loads((begun / "results.json").read_text())
    (begun / "results.json").write_text(json.dumps({**content, "finished": False}))
    table = cutlayer.runs(saves)
    assert table.columns[:5].tolist() == ["algorithm", "model", "dataset", "distribution", "seed"]
    assert {"optimizer.lr", "round", "comm_up"} <= {*table.columns}
    assert not {"rounds", "batch_size", "save_dir", "progress", "optimizer.name"} & {
        *table.columns
    }  # the same, or no matter
    assert len(table) == 2 * 5
    assert {*table["algorithm"]} == {"fed_avg", "sl"}
    assert table[table["algorithm"] == "sl"]["distribution"].str.startswith("noniid_dirichlet-alpha=").all()
    for result in (*first, again, split):
        rows = table[table["folder"] == str(result.folder)]
        assert rows["test_acc"].tolist() == result.metrics["test_acc"].tolist()
        assert rows["comm_load"].tolist() == result.metrics["comm_load"].tolist()
        assert rows["optimizer.lr"].eq(result.config.lr).all()
        assert rows["finished"].all()
        assert rows["latest"].all() == (result is not first[1])
    assert not table[table["folder"] == str(begun)]["finished"].any()
    assert len(cutlayer.runs(split, again.folder)) == 4


def test_damaged_runs_are_left_out_with_one_warning(result: cutlayer.RunResult, tmp_path: Path) -> None:
    for name in ("good", "bad", "worse"):
        shutil.copytree(result.folder, tmp_path / name)
    (tmp_path / "bad" / "results.json").write_text("{")
    (tmp_path / "worse" / "results.json").write_text('{"finished": false}')
    with pytest.warns(UserWarning, match="left out, damaged: ") as caught:
        table = cutlayer.runs(tmp_path)
    assert {*table["folder"]} == {str(tmp_path / "good")}
    (warning,) = caught
    assert "\n" not in str(warning.message)
    assert all(str(tmp_path / name) in str(warning.message) for name in ("bad", "worse"))
    assert warning.filename == __file__


def test_where_there_are_no_runs_the_table_is_empty_and_no_folder_is_a_mistake(tmp_path: Path) -> None:
    assert cutlayer.runs(tmp_path).empty
    assert "algorithm" in cutlayer.runs(tmp_path)
    with pytest.raises(cutlayer.ConfigError, match="runs=.*: expected a folder with runs"):
        cutlayer.runs(tmp_path / "savse")


# ---------------------------------------------------------------------- a sweep


def test_a_sweep_gives_a_result_for_each_job_and_runs_nothing_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saves = tmp_path / "a b,c=d"
    given = (*SMALL[:-1], "model=mlp", "rounds=1", "hydra.launcher.n_jobs=1", f"save_dir='{saves}'")
    before = cutlayer.run(*given[:-2], algorithm="sl", seed=1, save_dir=saves, progress="none")
    found = cutlayer.sweep("algorithm=fed_avg,sl", *given, seed=1)
    shown = capfd.readouterr().out
    assert "2 jobs" in shown
    assert [(each.config.algorithm_name, each.config.seed) for each in found] == [("fed_avg", 1), ("sl", 1)]
    assert found[1].folder == before.folder
    assert all(each.folder.is_relative_to(saves) for each in found)
    assert len(cutlayer.runs(*found)) == 2
    (table,) = saves.glob("multirun/*/jobs.csv")
    assert [row["state"] for row in csv.DictReader(table.read_text().splitlines())] == ["finished", "skipped"]


def test_a_job_that_fails_is_told_and_the_others_are_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = (*SMALL, "algorithm=fed_avg", "model=mlp", "rounds=1", "hydra.launcher.n_jobs=1")
    with pytest.raises(cutlayer.ConfigError, match=r"sweep: 1 of 2 jobs are not done; lr=-1: lr=-1: expected"):
        cutlayer.sweep(*given, "lr=0.1,-1", save_dir=tmp_path)
    assert len(cutlayer.runs(tmp_path)) == 1
    assert capfd.readouterr().out == ""  # progress=none


def test_an_interrupt_of_this_process_alone_ends_the_sweep_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = (*SMALL[:-1], "algorithm=fed_avg", "model=mlp", "rounds=5000", "hydra.launcher.n_jobs=1")
    shown = list[str]()

    def interrupted(line: str) -> None:
        shown.append(line)
        if len(shown) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "print_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cutlayer.sweep(*given, "seed=0,1", save_dir=tmp_path)
    assert any("the same command resumes" in line for line in shown)
    (table,) = tmp_path.glob("multirun/*/jobs.csv")
    assert not {"finished", "failed"} & {row["state"] for row in csv.DictReader(table.read_text().splitlines())}


@pytest.mark.parametrize("wrong", ["algorithm=fed_avgg,sl", "roundz=1,2", "seed=", "seed=[", "rounds=0,1"])
def test_a_mistake_in_a_sweep_starts_nothing(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(cutlayer.ConfigError, match=wrong.partition("=")[0]) as caught:
        cutlayer.sweep(*SMALL, wrong, save_dir=tmp_path / "saves")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saves").exists()


# ---------------------------------------------------------------------- the package


def test_importing_the_package_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    code = "import sys, cutlayer; print({'torch', 'pandas', 'hydra', 'numpy'} & {*sys.modules}, dir(cutlayer))"
    shown = python(code, "-S", cwd=tmp_path).stdout
    assert shown.startswith("set()")
    assert all(f"'{name}'" in shown for name in cutlayer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        cutlayer.runn  # noqa: B018


def test_it_runs_from_another_directory_beside_hugging_face_s_datasets(tmp_path: Path) -> None:
    work, theirs = tmp_path / "work", tmp_path / "theirs"
    work.mkdir()
    if importlib.util.find_spec("datasets") is None:
        (theirs / "datasets").mkdir(parents=True)
        (theirs / "datasets" / "__init__.py").write_text("class Dataset: ...\n")
    code = "import datasets; theirs = datasets.Dataset\nimport cutlayer\n"
    code += f"r = cutlayer.run('algorithm=fed_avg', *{SMALL!r}, rounds=1)\n"
    code += "import datasets; assert datasets.Dataset is theirs\nprint(r.folder, len(r.metrics))"
    done = python(code, cwd=work, path=str(theirs))
    assert done.returncode == 0, done.stderr
    folder, rows = done.stdout.split()
    assert Path(folder).is_relative_to(work.resolve() / "saves")
    assert rows == "1"


# ---------------------------------------------------------------------- the document


def test_the_example_of_the_document_runs(tmp_path: Path) -> None:
    document = checkout() / "docs" / "python.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    done = python(
        "\n".join([*blocks, "assert model(__import__('torch').zeros(1, 1, 8, 8)).shape == (1, 10)"]), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"smashed +\d+", done.stdout), done.stdout
