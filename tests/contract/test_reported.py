"""Every column that a run reports, computed again from the data, the models and the messages by other means."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from cutlayer.runtime.experiment import run
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.settings import RunConfig
from tests.algorithms.drawing import Drawn

ROUNDS, EVALUATED = 5, [2, 4, 5]
SETTING = (
    *("num_clients=5", "frac=0.5", f"rounds={ROUNDS}", "eval_interval=2", "batch_size=60", "lr=0.01"),
    *("dataset.distribution=dirichlet", "dataset.alpha=1.0", "dataset.min_samples=100", "progress=none"),
)
MEASURED = ("algorithm=fed_avg", "dataset.validation=0.2", "dataset.local_test=true", *SETTING)
SENT = ("algorithm=cse_fsl", "algorithm.upload_interval=2", *SETTING)
Folder = tuple[Path, RunConfig]


@pytest.fixture(scope="module")
def measured(configure, tmp_path_factory) -> Folder:
    """A run with all that can be measured of it."""
    return ran(configure(*MEASURED), tmp_path_factory.mktemp("measured") / "run")


@pytest.fixture(scope="module")
def sent(configure, tmp_path_factory) -> Folder:
    """A run whose messages differ by direction."""
    return ran(configure(*SENT), tmp_path_factory.mktemp("sent") / "run")


def ran(config: RunConfig, path: Path) -> Folder:
    with RunFolder.claim(path) as folder:
        run(config, folder)
    return path, config


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a csv file, numbers as numbers, an empty field as None."""

    def plain(text: str) -> Any:
        try:
            return None if text == "" else json.loads(text)
        except json.JSONDecodeError:
            return text

    with (folder / name).open() as file:
        return [{key: plain(value) for key, value in row.items()} for row in csv.DictReader(file)]


class Perceptron:
    """The model of the runs by numpy, from its weights."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.layers = [
            (state[f"fc{i}.weight"].double().numpy(), state[f"fc{i}.bias"].double().numpy()) for i in (1, 2, 3)
        ]

    def scores(self, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        """Accuracy and mean cross-entropy by scikit-learn."""
        h = x.reshape(len(x), -1)
        for number, (weight, bias) in enumerate(self.layers):
            h = h @ weight.T + bias
            h = np.maximum(h, 0) if number < 2 else h
        p = np.exp(h - h.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return float(accuracy_score(y, h.argmax(1))), float(log_loss(y, p, labels=range(10)))


def pixels(federation: Federation, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as scikit-learn has them, normalised by the mean and the deviation of the training images, and labels."""
    found = {}
    for name in ("train", part):
        source = getattr(federation.setup.dataset, name)
        found[name] = source._store._images.numpy().astype(float) / 255, source.labels.numpy()
    x, y = found[part]
    return (x - found["train"][0].mean()) / found["train"][0].std(), y


@pytest.fixture(scope="module")
def replayed(measured: Folder) -> tuple[Federation, dict[int, dict[str, torch.Tensor]]]:
    """The measured run again, with the model after each evaluated round."""
    federation, models = Federation(measured[1]), {}
    while not federation.done:
        federation.step()
        model = federation.full_model()
        assert model is not None
        models[federation.round] = model
    return federation, models


def test_the_images_are_scikit_learns_own(replayed) -> None:
    """Train, validation and test together are the digits, each once."""
    federation, _ = replayed
    parts = [getattr(federation.setup.dataset, name) for name in ("train", "validation", "test")]
    found = np.concatenate([part._store._images.numpy().reshape(len(part), -1) for part in parts])
    labels = np.concatenate([part.labels.numpy() for part in parts])
    data: Any = load_digits()
    expected = np.round(data.data * 255 / 16)

    def rows(images: np.ndarray, of: np.ndarray) -> list[list[int]]:
        return sorted([*map(int, image), int(label)] for image, label in zip(images, of, strict=True))

    assert rows(found, labels) == rows(expected, data.target)


def test_accuracy_and_loss_of_test_and_validation(measured: Folder, replayed) -> None:
    folder, _ = measured
    federation, models = replayed
    lines = table(folder, "metrics.csv")
    extras = {(row["round"], row["name"]): row["value"] for row in table(folder, "extras.csv")}
    assert [row["round"] for row in lines] == list(range(1, ROUNDS + 1))
    test, validation = pixels(federation, "test"), pixels(federation, "validation")
    for row in lines:
        number = row["round"]
        if number not in EVALUATED:
            assert row["test_acc"] is row["test_loss"] is None
            assert not any(key == number for key, _ in extras)
            continue
        model = Perceptron(models[number])
        assert (row["test_acc"], row["test_loss"]) == pytest.approx(model.scores(*test), abs=1e-6)
        found = extras[number, "val_acc"], extras[number, "val_loss"]
        assert found == pytest.approx(model.scores(*validation), abs=1e-6)
        assert found[0] != row["test_acc"]
    saved = load_file(folder / "model.safetensors")
    assert Perceptron(saved).scores(*test) == pytest.approx((lines[-1]["test_acc"], lines[-1]["test_loss"]), abs=1e-6)


def test_accuracy_on_each_clients_share_of_the_test_set(measured: Folder, replayed) -> None:
    folder, _ = measured
    federation, models = replayed
    x, y = pixels(federation, "test")
    extras = {(row["round"], row["name"]): row["value"] for row in table(folder, "extras.csv")}
    shares = table(folder, "local_test/partition.csv")
    assert sum(row["samples"] for row in shares) == len(y)
    lists = [federation.evaluator.local_test.indices(client).numpy() for client in range(5)]
    for number in EVALUATED:
        found = [Perceptron(models[number]).scores(x[each], y[each])[0] for each in lists]
        expected = {"mean": np.mean(found), "std": np.std(found), "worst_decile": min(found)}
        for key, value in expected.items():
            assert extras[number, f"local_acc/{key}"] == pytest.approx(value, abs=1e-9)
    rows = table(folder, "client_accuracy.csv")
    assert [(row["metric"], row["client"], row["samples"]) for row in rows] == [
        ("local_acc", client, len(each)) for client, each in enumerate(lists)
    ]
    assert [row["accuracy"] for row in rows] == pytest.approx(found, abs=1e-9)


def test_partitions(measured: Folder, replayed) -> None:
    federation, _ = replayed
    for name, parts, source in (
        ("partition.csv", federation.setup.partition, federation.setup.dataset.train),
        ("local_test/partition.csv", federation.evaluator.local_test, federation.setup.dataset.test),
    ):
        rows = table(measured[0], name)
        assert [row["client"] for row in rows] == list(range(5))
        owned: list[int] = []
        for row in rows:
            samples = parts.indices(row["client"]).tolist()
            owned += samples
            counts = [sum(int(source.labels[sample]) == digit for sample in samples) for digit in range(10)]
            assert list(row.values()) == [row["client"], len(samples), *counts]
            assert list(row) == ["client", "samples", *map(str, range(10))]
        assert sorted(owned) == list(range(len(source)))


def test_bytes_by_round_direction_kind_field_and_client(sent: Folder) -> None:
    """Payload from the shapes; framed, the length of what the safetensors library makes of each message."""
    folder, config = sent
    federation = Federation(config)
    drawn = Drawn(federation)
    part = {name: federation.setup.blueprint.initial[name] for name in ("client", "auxiliary")}
    model = {f"{name}/{key}": value for name, state in part.items() for key, value in state.items()}
    payload: dict[tuple[Any, ...], int] = defaultdict(int)
    framed: dict[tuple[Any, ...], int] = defaultdict(int)

    def message(round: int, way: str, kind: str, client: int, tensors: dict[str, torch.Tensor], marks=None) -> None:
        framed[round, way, kind, client] += len(as_safetensors(tensors, marks))
        for name, tensor in tensors.items():
            key = round, way, kind, name.split("/")[0], client
            payload[key] += int(np.prod(tensor.shape)) * tensor.dtype.itemsize

    for number in range(ROUNDS):
        for client in drawn.cohort(number):
            where = number + 1
            message(where, "down", "model", client, model)
            for step, (_, y) in enumerate(drawn.batches(number, client)):
                if step % 2 == 0:
                    message(where, "up", "smashed", client, {"z": torch.zeros(len(y), 128), "y": y})
            report = {"samples": torch.tensor(1), "auxiliary_loss": torch.tensor(0.5, dtype=torch.float64)}
            message(where, "up", "metrics", client, report, {"samples": "int", "auxiliary_loss": "float"})
            message(where, "up", "model", client, model)
    lines = table(folder, "communication.csv")
    found = {tuple(row[key] for key in ("round", "direction", "kind", "field", "client")): row for row in lines}
    assert len(found) == len(lines)
    assert {key: row["payload_bytes"] for key, row in found.items()} == payload
    sums: dict[tuple[Any, ...], int] = defaultdict(int)
    for (number, way, kind, _, client), row in found.items():
        sums[number, way, kind, client] += row["framed_bytes"]
    assert sums == framed
    up = sum(row["payload_bytes"] for row in lines if row["direction"] == "up" and row["kind"] != "metrics")
    down = sum(row["payload_bytes"] for row in lines if row["direction"] == "down")
    assert up > 1.1 * down, "directions that differ"


@pytest.mark.parametrize("which", ["measured", "sent"])
def test_sums_over_messages_and_clients(which: str, request: pytest.FixtureRequest) -> None:
    folder, _ = request.getfixturevalue(which)
    lines = [row for row in table(folder, "communication.csv") if row["kind"] != "metrics"]
    for row in table(folder, "metrics.csv"):
        before = [line for line in lines if line["round"] <= row["round"]]
        ways = {way: [line for line in before if line["direction"] == way] for way in ("up", "down")}
        assert row["comm_up"] == sum(line["payload_bytes"] for line in ways["up"])
        assert row["comm_down"] == sum(line["payload_bytes"] for line in ways["down"])
        assert row["comm_load"] == sum(line["payload_bytes"] for line in before)
        assert row["comm_framed"] == sum(line["framed_bytes"] for line in before)
        assert row["clients"] == len({line["client"] for line in before if line["round"] == row["round"]}) == 3
        assert row["round_trips"] == 3 * row["round"], "no client waits but for what opens its round"
        assert row["time_wall"] >= row["time_client"] + row["time_server"] + row["time_eval"] > 0


@pytest.mark.parametrize("which", ["measured", "sent"])
def test_results_are_those_of_the_tables(which: str, request: pytest.FixtureRequest) -> None:
    folder, _ = request.getfixturevalue(which)
    results = json.loads((folder / "results.json").read_text())
    rows = {row["round"]: row for row in table(folder, "metrics.csv")}
    assert results["rounds"] == EVALUATED
    assert results["finished"] is True
    assert results["in_turn"] is False
    for name in rows[1].keys() - {"round", "clients"}:
        assert results[name] == [rows[number][name] for number in EVALUATED], name
    assert results["client_rounds"] == [sum(rows[n]["clients"] for n in rows if n <= number) for number in EVALUATED]
    lines = table(folder, "communication.csv")
    keys = {"/".join(row[key] for key in ("direction", "kind", "field")) for row in lines}
    assert results["traffic"] == {
        key: [
            sum(row["payload_bytes"] for row in lines if row["round"] <= number
                and key == "/".join(row[name] for name in ("direction", "kind", "field")))
            for number in EVALUATED
        ]
        for key in keys
    }  # fmt: skip
    extras = table(folder, "extras.csv")
    for name, series in results["metrics"].items():
        for value, before, number in zip(series, [0, *EVALUATED], EVALUATED, strict=False):
            since = [row["value"] for row in extras if row["name"] == name and before < row["round"] <= number]
            assert value == (since[-1] if since else None)
    assert {row["name"] for row in extras} == results["metrics"].keys()


def test_the_integer_statistics_of_a_round_are_those_of_its_busiest_client(configure) -> None:
    """Batches that BatchNorm has seen: as many as the client with most of them made, whoever came last."""
    federation = Federation(
        configure(*SETTING, "algorithm=fed_avg", "model=import/tests.contract.elsewhere.Net", "model.cut=norm",
                  "batch_size=20", "rounds=3", "frac=1.0")
    )  # fmt: skip
    drawn, seen, last = Drawn(federation), 0, []
    for number in range(3):
        federation.step()
        counts = [len(drawn.batches(number, client)) for client in drawn.cohort(number)]
        last.append(counts[-1] == max(counts))
        seen += max(counts)
        (found,) = (
            m.num_batches_tracked
            for m in federation.server.ctx.part("model").modules()
            if isinstance(m, nn.BatchNorm2d)
        )
        assert found.dtype == torch.int64
        assert int(found) == seen
    assert not all(last)
