"""Each benchmark runs on a tiny setting and prints its ratio; nothing here depends on how long anything takes."""

import argparse
import csv
import importlib
import itertools
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as listing
from benchmarks import (
    alignment,
    allocator,
    bare,
    checkpoint,
    cohort,
    evaluation,
    gpu,
    kernels,
    measure,
    memory,
    plotting,
    round_time,
    speed,
    step,
    sweep,
    together,
    traffic,
    workers,
)
from cutlayer.runtime.parties.graphs import PassRecorder
from cutlayer.runtime.parties.optim import PartOptimizer
from tests.runtime.stand_ins import TapeStream

DECIMAL = r"\d+\.\d+"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", bare.BARE)
@pytest.mark.parametrize(("optimizer", "workers"), [("sgd", 0), ("adam", 0), ("sgd", 2)])
def test_the_platform_and_the_bare_loop_end_a_round_with_the_same_weights(
    algorithm: str, optimizer: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # fp64, so that nothing but the order of a sum is left between the two
    keys = ["--case", "tiny", "--repeats", "2", "--precision", "fp64", "--optimizer", optimizer]
    assert round_time.main([*keys, "--algorithm", algorithm, "--workers", str(workers)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"  ratio {DECIMAL} \({DECIMAL} \.\. {DECIMAL}\), target none", shown)
    assert "weights agree" in shown


def test_different_weights_are_reported_and_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bare.WeightedSum, "add", lambda self, state, weight: self.state.update(state))
    assert round_time.main(["--case", "tiny", "--repeats", "1", "--algorithm", "fed_avg"]) == 1
    assert "weights DIFFER" in capsys.readouterr().out


def test_workers_give_the_weights_of_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--case", "tiny", "--repeats", "1", "--algorithm", "fed_avg", "sl_multi_server"]
    assert workers.main([*keys, "--ceiling"]) == 0
    shown = capsys.readouterr().out
    assert re.search(f"tiny: 2 runs at once give {DECIMAL} times the rounds of one", shown)
    given = rf"{DECIMAL} \({DECIMAL} \.\. {DECIMAL}\) \(processes\)"
    for algorithm in ("fed_avg", "sl_multi_server"):
        assert re.search(f"tiny {algorithm}: 2 workers give {given} times the rounds of one process, same bits", shown)
    assert workers.main([*keys[:-1], "--fine-tuning"]) == 0
    shown = capsys.readouterr().out
    assert re.search(f"tiny fed_avg: 2 workers give {given} times the fine-tuning of one process, same bits", shown)
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert workers.main(keys[:-1]) == 1
    assert "OTHER BITS" in capsys.readouterr().out


def test_a_recorded_round_writes_results_and_is_compared_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert round_time.main(["--case", "tiny", "--repeats", "1", "--algorithm", "fed_avg", "--record"]) == 0
    assert "ratio" in capsys.readouterr().out


def test_alignment_ends_with_the_weights_of_the_plain_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--case", "tiny", "--steps", "3", "--repeats", "1", "--precision", "fp64"]
    assert alignment.main(keys) == 0
    shown = capsys.readouterr().out
    spread = rf"{DECIMAL} \({DECIMAL} \.\. {DECIMAL}\)"
    assert re.search(rf"ratio {spread}, of processor time {spread}, a step takes {DECIMAL} ms", shown)
    assert "weights agree" in shown
    monkeypatch.setattr(alignment, "plain_step", lambda *_: None)
    assert alignment.main(keys) == 1
    assert "weights DIFFER" in capsys.readouterr().out


def test_what_surrounds_a_step_is_timed_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--times", "2", "--repeats", "1", "--model", "cnn2"]) == 0
    shown = capsys.readouterr().out
    for name in ("question and answer", "stream, precision, clock", "ledger", "copies", "message"):
        assert re.search(rf"  {name} +{DECIMAL} \({DECIMAL} \.\. {DECIMAL}\)", shown)
    assert re.search(r"  passes recorded +\d+ .*\n  steps too +\d+ ", shown)


def test_steps_on_recordings_that_do_nothing_are_replayed() -> None:
    made: list[bool] = []

    class Counting(step.Idle):
        def record(self, work: Callable[[], Any], *, large: bool = False) -> Any:
            made.append(large)
            return super().record(work, large=large)

    part = torch.nn.Linear(3, 2)
    recorder = PassRecorder(Counting)
    recorder.attach(part)
    optimizer = PartOptimizer([torch.optim.SGD(part.parameters(), 0.1)], recorder)
    step._settled(part, optimizer, torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    assert made == [True, False, False], "a forward pass, its backward pass, and the optimizer's step"


def test_every_way_to_compute_is_compared_with_the_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--case", "tiny", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"  {name} +{DECIMAL} \(", shown) for name in kernels.WAYS)


def test_memory_hands_each_population_to_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    populations: list[int] = []

    def run_once(algorithm: str, clients: int, disk: bool, options: argparse.Namespace) -> float:
        assert (algorithm, disk, options.samples, options.store_mb) == ("scaffold", True, 70, 0.5)
        populations.append(clients)
        return 200.0 if clients == 10 else 350.0

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        lines: list[str] = []
        assert memory.main(command[3:], lines.append) == 0
        return subprocess.CompletedProcess(command, 0, stdout="\n".join(lines))

    monkeypatch.setattr(memory, "run_once", run_once)
    monkeypatch.setattr(subprocess, "run", start)
    keys = ["--algorithm", "scaffold", "--disk", "yes", "--clients", "10", "40", "--samples", "70", "--store-mb", "0.5"]
    assert memory.main(keys) == 0
    assert populations == [10, 40]
    assert re.search(
        r"200 MB +350 MB +difference \+150 MB, ratio 1\.750, target 100 MB MISSED", capsys.readouterr().out
    )


@pytest.mark.parametrize(("algorithm", "disk"), [("fed_avg", "no"), ("scaffold", "yes"), ("fsl_sage", "yes")])
def test_one_run_prints_its_peak(algorithm: str, disk: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--one", "20", "--cohort", "2", "--rounds", "2", "--samples", "100", "--store-mb", "0.01"]
    assert memory.main([*keys, "--algorithm", algorithm, "--disk", disk]) == 0
    assert float(capsys.readouterr().out) > 50


def test_evaluation_prints_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main(["--case", "tiny"]) == 0
    assert re.search(rf"ratio {DECIMAL}% of a round", capsys.readouterr().out)


@pytest.mark.parametrize("algorithm", cohort.ALGORITHMS)
def test_a_round_of_a_cohort_has_the_bytes_of_its_clients(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--model", "mlp", "--clients", "20", "--cohort", "2", "--images", "20", "--repeats", "1"]
    assert cohort.main([*keys, "--algorithm", algorithm]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{algorithm} +ratio {DECIMAL} \({DECIMAL} \.\. {DECIMAL}\), bytes equal", shown)


def test_cohorts_of_different_bytes_are_reported_and_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = cohort.federation

    def one_more(algorithm: str, clients: int, options: argparse.Namespace) -> cohort.Federation:
        shown = argparse.Namespace(**{**vars(options), "cohort": 3 if clients == 20 else 2})
        return equal(algorithm, clients, shown)

    monkeypatch.setattr(cohort, "federation", one_more)
    keys = ["--model", "mlp", "--clients", "20", "--cohort", "2", "--images", "20", "--repeats", "1"]
    assert cohort.main([*keys, "--algorithm", "fed_avg"]) == 1
    assert "bytes DIFFER" in capsys.readouterr().out


def test_a_cohort_computed_as_one_ends_a_round_with_its_clients_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--clients", "3", "--batch", "2", "--chunks", "4", "--repeats", "1", "--model", "resnet20", "--precision"]
    assert together.main([*keys, "fp64"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"chunks of 4 +ratio {DECIMAL} \({DECIMAL} \.\. {DECIMAL}\)", shown)
    assert re.search(rf"in a round +ratio {DECIMAL}", shown)
    monkeypatch.setitem(together.TOLERANCE, "fp64", -1.0)
    assert together.main([*keys, "fp64"]) == 1


def test_the_allocators_sides_take_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sides: list[str] = []

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        side = command[command.index("--one") + 1]
        sides.append(side)
        return subprocess.CompletedProcess(command, 0, stdout="1.5 300.0" if side == "kept" else "2.0 290.0")

    monkeypatch.setattr(subprocess, "run", start)
    assert allocator.main(["--repeats", "2"]) == 0
    assert sides == ["kept", "default", "kept", "default"]
    assert "ratio of time 0.750 (0.750 .. 0.750), more memory 10 MB" in capsys.readouterr().out


def test_one_side_of_the_allocator_prints_seconds_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert allocator.main(["--one", "default", "--samples", "20", "--rounds", "1", "--batch", "5"]) == 0
    seconds, peak = capsys.readouterr().out.split()
    assert float(seconds) > 0
    assert float(peak) > 50


def test_traffic_of_the_papers_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: ResNet-18 has 11,181,642 parameters and 9,600 running statistics, as torchvision has it."""
    images = [f"dataset.options.{key}={value}" for key, value in {"channels": 3, "height": 32, "width": 32}.items()]
    traffic.main(["experiment=fsl_sage/cifar10_iid", "dataset=synthetic", "dataset.options.n_train=2000", *images])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    up = 10 * (4 * (11_181_642 + 9_600) + 8 * 20) / 1e6
    assert lines["fed_avg"][:2] == [f"{up:.1f}"] * 2
    smashed = 2000 * (8192 + 8) / 1e6
    client = 10 * (4 * (683_072 + 1_920) + 8 * 10) / 1e6
    assert lines["sl_single_server"][0] == f"{smashed + client:.1f}"


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main()
    shown = capsys.readouterr().out
    for name in listing.BENCHMARKS:
        assert f"python -m benchmarks.{name}" in shown
        module = importlib.import_module(f"benchmarks.{name}")
        program = importlib.import_module(f"benchmarks.{name}.__main__") if hasattr(module, "__path__") else module
        assert callable(program.main)


def test_a_spread_is_smallest_median_and_largest() -> None:
    assert measure.Spread.of([3.0, 1.0, 2.0]).show(1e3, 0, " ms") == "2000 ms (1000 .. 3000)"


def test_plotting_reads_and_draws_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    assert plotting.main(["--runs", "12", "--rounds", "3", "--alphas", "1"]) == 0
    shown = capsys.readouterr().out
    assert "12 runs of 3 rounds" in shown
    assert re.search(rf"reading +{DECIMAL} s  12 runs", shown)
    assert re.search(rf"plot_results.py +{DECIMAL} s  2 comparisons, \d+ files", shown)


def test_a_round_trip_is_measured_beside_the_echo(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("grpc", reason="the extra grpc is not installed")
    network = importlib.import_module("benchmarks.network")
    keys = ["--only", "time", "--mb", "0.01", "--steps", "1", "--repeats", "2", "--tls", "yes"]
    assert network.main(keys) == 0
    shown = capsys.readouterr().out
    assert "0.01 MB each way, with TLS" in shown
    for line in ("gRPC alone, sync client", "gRPC alone, aio client", "the platform"):
        assert re.search(rf"{line} +{DECIMAL} ms \({DECIMAL} \.\. {DECIMAL}\), processor {DECIMAL} ms", shown)
    for end in ("server", "client"):
        each = rf"main thread {DECIMAL} ms, Python's others {DECIMAL}, gRPC's {DECIMAL}"
        assert re.search(f"of it at the {end}: {each}", shown)
    assert re.search(rf"ratio to the (sync|aio) client {DECIMAL} ", shown)


def test_threads_are_told_apart_by_their_names() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sum, range(3_000_000)).result()
        found = measure.thread_seconds()
    assert found["main"] > 0
    assert found["others"] > 0
    assert sum(found.values()) <= 1.1 * time.process_time()


def test_a_crowd_is_served_and_the_servers_memory_told() -> None:
    pytest.importorskip("grpc", reason="the extra grpc is not installed")
    crowd = importlib.import_module("benchmarks.crowd")
    # each answer has the size of its question, so one of either is in memory; and the strays of both clients are read
    assert crowd.platform_mb(crowd.Crowd(clients=2, mb=20, steps=2, stray=True)) > 40
    assert crowd.echo_mb(crowd.Crowd(clients=2, mb=20, steps=1)) > 40


def test_methods_on_a_device_are_compared_with_the_processor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "DIGITS", (*gpu.DIGITS, "model=mlp", "rounds=2"))
    assert gpu.main(["methods", "--algorithm", "fed_avg"]) == 0
    (*_, line) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"fed_avg( +{DECIMAL}%){{2}} +{DECIMAL} s +same bits +{DECIMAL}% +{DECIMAL} s +same bits", line
    )
    monkeypatch.setattr(gpu, "learnt", lambda federation: {"weight": torch.rand(9)})
    assert "OTHER BITS" in gpu.method("fed_avg", "cpu")


def test_speed_is_measured_part_by_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a processor, whose passes are not recorded: these parts are one line each, and the others go on."""
    monkeypatch.setattr(speed, "QUICK", speed.TINY)
    monkeypatch.setattr(speed, "QUICK_SECONDS", float("inf"))  # on a busy machine too
    assert gpu.main(["speed", "--quick", "--seconds", "inf", "--set", "threads=1"]) == 1
    shown = capsys.readouterr().out
    assert re.search(rf"matmul of 64, tf32: {DECIMAL} TFLOP/s", shown)
    assert re.search(
        rf"two convolutions, 2 clients, eager: {DECIMAL} ms a round, bare {DECIMAL}, ratio {DECIMAL}", shown
    )
    assert re.search(rf"two convolutions, 2 clients, together: {DECIMAL} ms a round", shown)
    assert re.search(rf"resnet20, batch 4, bf16, eager: {DECIMAL} ms a step.* of the peak, weights apart \d", shown)
    assert re.search(rf"FSL-SAGE's alignment, eager: -?\d+ ms a client, -?{DECIMAL} ms a pass", shown)
    assert re.search(r"MocoSFL: \d+ ms a round of 3 clients", shown)
    refused = "FAILED, ConfigError: compile=true: expected false on a processor"
    assert shown.count(refused) == 2 + 2 * (1 + len(speed.PRECISIONS)) + len(speed.PAPER)
    data: list[speed.Dataset] = []
    for name, more in {"fed_avg": [], "fsl_sage": ["algorithm.align_epochs=1"]}.items():
        options = argparse.Namespace(device="cpu", set=["num_clients=2", *more])
        found = speed.paper(options, speed.TINY, name, ("memory_format=channels_last",), data)
        assert re.search(
            rf"{DECIMAL} s a round, the first {DECIMAL}(, aligned {DECIMAL})?, {DECIMAL} min for 200", found
        )
    (held,) = data
    assert len(held.train) == speed.TINY.images


def test_a_whole_step_of_a_bare_loop_is_timed_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(device="cpu", set=[])
    assert speed.whole_step(options, speed.TINY, "fp32", ()) == "no graphs on this device"
    monkeypatch.setitem(speed.STREAMS, "cpu", TapeStream)
    monkeypatch.setattr(TapeStream, "replayed", 0)
    assert re.fullmatch(rf"{DECIMAL} ms a step", speed.whole_step(options, speed.TINY, "fp32", speed.FAST[:1]))
    assert TapeStream.replayed == speed.TINY.steps


def test_speed_ends_when_its_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["speed", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("no time left") for line in lines[1:])
    by_precision = 1 + 5 + 1  # the peak, the ways to compute, a step as one graph
    assert len(lines) == 1 + by_precision * len(speed.PRECISIONS) + 5 + 5 + 2 * len(speed.PAPER)


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A folder of pictures of two classes."""
    for part, label, number in itertools.product(("train", "test"), ("bird", "cat"), range(10)):
        folder = tmp_path / "images" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (255 * (label == "cat"), 0, number)).save(folder / f"{number}.png")
    return str(tmp_path / "images")


TINY = ("--every", "2", "--set", "model=mlp", "rounds=3", "batch_size=2", "threads=1")


def test_the_papers_setting_runs_on_a_folder_of_images(
    tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["paper", "--data", images, "--saves", str(tmp_path / "saves"), "--algorithm", "fed_avg"]
    assert gpu.main([*where, *TINY]) == 0
    shown = capsys.readouterr().out
    assert "fed_avg: 3 rounds" in shown
    assert re.findall(r"  round +(\d+) ", shown) == ["2", "3"]
    with next((tmp_path / "saves").rglob("communication.csv")).open() as file:
        sent = sum(int(row["payload_bytes"]) for row in csv.DictReader(file) if row["kind"] == "model")
    assert gpu.curve(next((tmp_path / "saves").rglob("metrics.csv")))[-1][2] == sent
    assert re.search(r"fed_avg .* 70\.0 GiB, r\. 84$", shown.strip())
    assert gpu.main([*where, *TINY, "algorithm.nothing=1"]) == 1
    assert "it failed: see" in capsys.readouterr().out


def test_the_papers_runs_stop_when_their_time_is_over(
    tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["paper", "--data", images, "--saves", str(tmp_path / "saves"), "--algorithm", "fed_avg", "sl"]
    assert gpu.main([*where, "--together", "1", "--seconds", "0.5", *TINY, "rounds=1000000"]) == 1
    shown = capsys.readouterr().out
    assert "sl: 0 rounds in 0.5 s" in shown
    assert "it failed" not in shown
    assert [path.name for path in (tmp_path / "saves").glob("*.log")] == ["fed_avg.log"], "the second had no time"


def test_images_that_are_not_there_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["paper", "--data", str(tmp_path / "none"), "--saves", str(tmp_path / "saves")]) == 1
    assert "--data=" in capsys.readouterr().out.splitlines()[-1]


def test_what_the_papers_methods_needed() -> None:
    lines: list[str] = []
    points = [(1, 0.5, 2**30), (2, 0.76, 2 * 2**30), (3, 0.74, 3 * 2**30), (9, 0.81, 9 * 2**30)]
    gpu.show_levels({"cse_fsl": points, "fsl_sage": points[:2]}, lines.append)
    row = "cse_fsl 2.00 GiB, r. 2 2.00 GiB, r. 2 9.00 GiB, r. 9 9.00 GiB, r. 9 9.00 GiB, r. 9 26.0 GiB, r. 91"
    cse_fsl, fsl_sage = (" ".join(line.split()) for line in lines[1:])
    assert cse_fsl == row
    assert fsl_sage == "fsl_sage 2.00 GiB, r. 2 2.00 GiB, r. 2 - - - 12.2 GiB, r. 89"


def test_checkpoints_of_rows_in_one_file_and_in_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.main(["--clients", "20", "--values", "3", "--cohort", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"all rows: {DECIMAL} s in one file, {DECIMAL} s in a file each, \d+ times as long", shown)
    assert re.search(rf"2 rows more: {DECIMAL} s, 2 files in all", shown)


def test_jobs_of_a_sweep_are_counted_and_its_processes_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One real sweep; the others take a second for what they have in common, and a tenth of one for each job."""
    options = argparse.Namespace(device="cpu", threads=1, jobs=1)
    taken = sweep.sweep(1, 1, 1, options)
    assert 0 < taken.jobs < taken.wall
    assert taken.processor > 1, "the server of forks and its job are part of it"
    with pytest.raises(RuntimeError, match="a job failed"):
        sweep.sweep(1, 1, -1, options)

    def pretended(jobs: int, at_a_time: int, rounds: int, options: object, key: str = "lr") -> sweep.Taken:
        seconds = 0.1 * jobs * (2 if key == "seed" else 1)
        return sweep.Taken(seconds / at_a_time, 1 + seconds / at_a_time, 1 + seconds)

    monkeypatch.setattr(sweep, "sweep", pretended)
    assert sweep.main(["--jobs", "10", "--repeats", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2.00 (2.00 .. 2.00) times the jobs; whole commands, loading included, 1.33 (1.33 .. 1.33)" in shown
    assert "takes 0.20 s (0.20 .. 0.20) of a processor where the data of their clients differ" in shown
    assert "takes 0.10 s (0.10 .. 0.10) of a processor where their clients have the same data" in shown
    parts = re.findall(rf"^  ({DECIMAL}) s  (.+)$", shown, re.MULTILINE)
    assert {"picture of the run", "picture of the partition", "the round"} <= {what for _, what in parts}
    assert all(float(seconds) >= 0 for seconds, _ in parts)
