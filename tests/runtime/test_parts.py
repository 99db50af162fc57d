"""Parts are registrations: what is made of them, in which order, from which random numbers, and how each learns."""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutlayer import algorithms
from cutlayer.algorithms.base import Algorithm, cross_entropy
from cutlayer.models import AuxiliaryHeads, Making, in_order, make_parts, part, part_registry, refinable
from cutlayer.models.config import ModelConfig
from cutlayer.models.part_registry import MODEL_KEYS
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching import hydra_errors, hydra_support
from cutlayer.runtime.launching.hydra_support import load_config, preprocess
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.records.results import Results
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.trust import part_rules
from tests.conftest import SMALL, play, same, weights
from tests.places import checkout

ROOT = checkout()
ONE_STEP = ("num_clients=1", "batch_size=2000", "optimizer=sgd", "lr=0.02", "rounds=2", "eval_interval=100")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for name in ("_PARTS", "_DIVISIONS", "_CONFIGS"):
        monkeypatch.setattr(part_registry, name, copy.copy(getattr(part_registry, name)))
    monkeypatch.setattr(algorithms, "ALGORITHMS", copy.copy(algorithms.ALGORITHMS))


# ---------------------------------------------------------------------- what is made, and from which random numbers

# Sums of the absolute initial weights with seed 0, as they were when each part was built by name.
STATED: dict[tuple[str, ...], dict[str, float]] = {
    ("algorithm=fsl_sage",): {"auxiliary": 57.21368620646899, "client": 521.432736412, "server": 403.317646053},
    ("algorithm=fsmkd",): {
        "client": 521.432736412,
        "personal": 360.727914008,
        "server": 363.768210021,
        "tail": 39.5494360328,
    },
    ("algorithm=mhmd",): {"auxiliary_heads": 62.7836719336, "body": 885.200946432, "head": 39.5494360328},
    ("algorithm=fl_moco", "model=cnn2"): {
        "model": 1680.02719968,
        "model_momentum": 1680.02719968,
        "projector": 122.559712771,
        "projector_momentum": 122.559712771,
    },
    ("algorithm=ressfl", "algorithm.attacker_width=4"): {
        "attacker": 381.113639571,
        "client": 521.432736412,
        "server": 403.317646053,
    },
    ("algorithm=fed_avg", "model=cnn2", "seed=3"): {"model": 1685.51033222},
}


@pytest.mark.parametrize("overrides", STATED)
def test_initial_weights_are_those_that_runs_began_with_before(configure, overrides: tuple[str, ...]) -> None:
    initial = Federation(configure(*overrides)).setup.blueprint.initial
    found = {name: sum(float(each.double().abs().sum()) for each in state.values()) for name, state in initial.items()}
    assert found == pytest.approx(STATED[overrides], rel=1e-6)


def made(names: tuple[str, ...], config: RunConfig) -> dict[str, dict[str, torch.Tensor]]:
    info = Federation(config).setup.dataset.info
    parts = make_parts(config.model, info, names, seed=config.seed)
    return {name: module.state_dict() for name, (module, *_) in parts.items()}


def test_a_part_has_the_same_weights_whatever_stands_beside_it(configure) -> None:
    config = configure("algorithm=fed_avg")
    alone = made(("client", "server", "attacker"), config)
    beside = made(("server", "auxiliary", "attacker", "client", "attacker_momentum"), config)
    assert alone.keys() <= beside.keys()
    assert all(same(alone[name], beside[name]) for name in alone)
    assert same(beside["attacker"], beside["attacker_momentum"])


# ---------------------------------------------------------------------- what a part needs


def nothing(_: Making) -> nn.Module:
    return nn.Linear(1, 1)


@pytest.mark.usefixtures("registry")
def test_what_is_needed_is_made_before_and_though_no_party_has_it() -> None:
    part("last", needs=("middle", "server"))(nothing)
    part("middle", needs=("early_momentum",))(nothing)
    part("early")(nothing)
    order = in_order(("last", "server", "client"))
    assert {*order} == {"model", "client", "server", "early", "early_momentum", "middle", "last"}
    for after, before in (("last", "middle"), ("middle", "early_momentum"), ("early_momentum", "early")):
        assert order.index(before) < order.index(after)
    assert order[0] == "model"


@pytest.mark.usefixtures("registry")
def test_what_cannot_be_made_is_one_line() -> None:
    part("first", needs=("second",))(nothing)
    part("second", needs=("third",))(nothing)
    part("third", needs=("second",))(nothing)
    for parts, line in (
        (("model", "first"), r"^parts=second -> third -> second: expected parts that do not need each other$"),
        (("model", "attackr"), r"^part=attackr: expected a registered part; did you mean attacker\? \(choices: "),
        (("model", "attackr_momentum"), r"^part=attackr: .* did you mean attacker\?"),
        (
            ("model", "auxiliary_heads"),
            r"a model that is divided into body and others, which auxiliary_heads needs$",
        ),
        (("model", "tail"), r"expected a model that is divided into tail and others$"),
        (("client", "tail"), r"^parts=\[client,tail\]: expected all parts of a model"),
    ):
        with pytest.raises(ConfigError, match=line):
            in_order(parts)


@pytest.mark.usefixtures("registry")
def test_a_name_is_registered_once_and_is_no_other_key() -> None:
    for name in ("attacker", "client", "cut", "own_momentum"):
        with pytest.raises(ValueError, match=f"{name}"):
            part(name)(nothing)
    assert {*MODEL_KEYS} == {*ModelConfig.__dataclass_fields__}


# ---------------------------------------------------------------------- how a part learns


def train_all(ctx: ClientContext, down: Payload) -> Payload:
    """Everything that the client has learns, and travels."""
    ctx.load(down)
    optimizer = ctx.optimizer("body", "head", "auxiliary_heads")
    body, head, heads = ctx.part("body"), ctx.part("head"), ctx.part("auxiliary_heads")
    assert isinstance(heads, AuxiliaryHeads)
    for x, y in ctx.batches():
        z, outputs = heads.attached(body, x)
        optimizer.update(cross_entropy(head(z), y) + sum(cross_entropy(each, y) for each in outputs))
    return ctx.dump("body", "head", "auxiliary_heads")


class Heads(Algorithm):
    """FedAvg of a model whose auxiliary heads learn too."""

    layout = Layout(*[("body", "head", "auxiliary_heads")] * 2)
    shared = ("body", "head", "auxiliary_heads")
    client = staticmethod(train_all)


# A method in which the part learns, in one step a round that no other part's step comes before.
LEARNS = {
    "attacker": ("algorithm=ressfl", "algorithm.attacker_width=4", "algorithm.alpha=0.0"),
    "auxiliary": ("algorithm=cse_fsl",),
    "auxiliary_heads": ("algorithm.name=heads", "algorithm=fed_avg"),
    "body": ("algorithm=fed_per",),
    "client": ("algorithm=sl_single_server",),
    "head": ("algorithm=fed_per",),
    "personal": ("algorithm=fsmkd",),
    "projector": ("algorithm=fl_moco", "dataset.fraction=0.2"),
    "server": ("algorithm=sl_single_server",),
    "tail": ("algorithm=fsmkd",),
}
# What is refined, beside what, and the round whose step is another by it.
REFINED = (
    ("optimizer=rmsprop", (), 1),
    ("optimizer.lr=0.25", (), 1),
    ("optimizer={name:rmsprop,lr:0.25}", (), 1),
    ("scheduler=polynomiallr", (), 2),
    ("scheduler.step_size=1", ("scheduler.name=steplr",), 2),
)


def test_each_part_is_tried_and_has_its_section() -> None:
    assert LEARNS.keys() == {*refinable()} == {*hydra_errors.parts()}


def learnt(config: RunConfig) -> list[dict[str, dict[str, torch.Tensor]]]:
    """After each of two rounds, by part what its copies at the server and at the clients have come to."""
    federation = Federation(config)
    rounds: list[dict[str, dict[str, torch.Tensor]]] = []
    for _ in range(2):
        found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in federation.setup.algorithm.layout.parts}
        for key, value in weights(play(federation, 1)).items():
            owner = next((name for name in key.split("/")[:3] if name in found), None)
            if owner is not None:
                found[owner][key] = value
        rounds.append(found)
    return rounds


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", LEARNS)
def test_a_refinement_reaches_the_part_and_no_other(name: str) -> None:
    algorithms.register("heads")(Heads)
    plain = load_config([*SMALL, *ONE_STEP, *LEARNS[name]])
    before = learnt(plain)
    assert all(found[name] for found in before), "the part is somewhere"
    for text, beside, first in REFINED:
        overrides = (*LEARNS[name], *(f"model.{name}.{each}" for each in (*beside, text)))
        config = load_config([*SMALL, *ONE_STEP, *overrides])
        assert (config.optimizer_for(name) != plain.optimizer_for(name)) == text.startswith("optimizer"), text
        assert (config.scheduler_for(name) is not None) == text.startswith("scheduler"), text
        after = learnt(config)
        for round in range(first):
            changed = {part for part in before[round] if not same(after[round][part], before[round][part])}
            assert changed == ({name} if round == first - 1 else set()), (text, round)


# ---------------------------------------------------------------------- before anything is imported, and what is saved


def test_the_names_of_parts_need_no_torch() -> None:
    line = "model.attacker.optimizer=sgd"
    code = "import sys; from cutlayer.runtime.launching.hydra_support import preprocess; "
    code += f"assert preprocess(['{line}']) == ['++model.attacker.optimizer.name=sgd']; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", refinable())
@pytest.mark.parametrize("below", ["optimizer", "optimizer.lr", "scheduler", "scheduler.step_size"])
def test_the_nearest_part_is_named(name: str, below: str) -> None:
    wrong = f"model.{name}x.{below}=1"
    assert preprocess([wrong]) == [wrong]
    with pytest.raises(ConfigError, match=rf"^model\.{name}x: no such key; did you mean model\.{name}\? \(choices: "):
        load_config([wrong])
    with pytest.raises(ConfigError, match=rf"^model\.{name}x: no such key; did you mean model\.{name}\? \(choices: "):
        ModelConfig.from_mapping({"name": "mlp", f"{name}x": {}})


def test_what_is_as_by_default_is_not_part_of_a_run_s_identity(configure) -> None:
    config = configure("algorithm=fed_avg")
    model = config.to_mapping()["model"]
    assert "attacker" not in model
    assert model["auxiliary_heads"] == {"blocks": None}
    assert model["client"] == {"freeze": False, "optimizer": {}, "scheduler": {}}
    refined = configure("algorithm=fed_avg", "model.attacker.optimizer.lr=0.5")
    assert refined.to_mapping()["model"]["attacker"] == {"optimizer": {"lr": 0.5}}
    assert refined.identity() == config.identity(), "the method has no such part"
    pre = [configure("algorithm=ressfl", *more).identity() for more in ((), ("model.attacker.optimizer.lr=0.5",))]
    assert pre[0] != pre[1]
    assert RunConfig.from_mapping(refined.to_mapping()) == refined


# ---------------------------------------------------------------------- a part of one's own: that of the document


def written(language: str) -> str:
    """The example in the section of the document on parts."""
    text = (ROOT / "docs" / "adding_your_own.md").read_text(encoding="utf-8")
    section = text.partition("\n## A part\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return found


@dataclass(frozen=True)
class TurnedConfig:
    """weight: of the loss of the turned images."""

    weight: float = 1.0


class Turned(Algorithm):
    """FedAvg whose body also learns by how much images were turned; each client keeps its own head for that."""

    Config = TurnedConfig
    layout = Layout(client=("body", "head", "rotation"), server=("body", "head"))
    shared = ("body", "head")

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Both losses at once."""
        ctx.load(down)
        optimizer = ctx.optimizer("body", "head", "rotation")
        ctx.restore("rotation")
        body, head, rotation = (ctx.part(name) for name in ("body", "head", "rotation"))
        for x, y in ctx.batches():
            turns = torch.randint(4, (1,)).item()
            turned = F.cross_entropy(rotation(body(x.rot90(int(turns), (2, 3)))), torch.full_like(y, int(turns)))
            optimizer.update(cross_entropy(head(body(x)), y) + ctx.config.weight * turned)
        ctx.keep("rotation")
        return ctx.dump("body", "head")


@pytest.fixture
def own(registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The part and a method that has it are there, as by two files, and a section and a file of values."""
    folder = tmp_path / "hydra_config"
    shutil.copytree(hydra_errors.CONFIG_DIR, folder)
    with (folder / "model" / "_base.yaml").open("a") as file:
        file.write("\n" + written("yaml"))
    (folder / "algorithm" / "turned.yaml").write_text("name: turned\nweight: 1.0\n")
    for module in (hydra_errors, hydra_support):
        monkeypatch.setattr(module, "CONFIG_DIR", folder)
    namespace: dict[str, Any] = {"__name__": "models.parts.rotation"}
    monkeypatch.setitem(sys.modules, "models.parts.rotation", sys.modules[__name__])
    exec(compile(written("python"), "rotation.py", "exec"), namespace)
    algorithms.register("turned")(Turned)
    return lambda *overrides: load_config([*SMALL, "algorithm=turned", "rounds=3", *overrides])


def test_a_part_of_ones_own_learns_as_the_command_line_says(own) -> None:
    plain, hidden = Federation(own()), Federation(own("model.rotation.hidden=5"))
    assert plain.setup.blueprint.initial["rotation"]["1.weight"].shape[0] == 32
    assert hidden.setup.blueprint.initial["rotation"]["1.weight"].shape[0] == 5
    config = own("model.rotation.optimizer=sgd", "model.rotation.optimizer.lr=0.5", "lr=0.01")
    assert (config.optimizer_for("rotation").name, config.optimizer_for("rotation").options["lr"]) == ("sgd", 0.5)
    assert config.optimizer_for("body").name == "adam"
    one = [dict(play(Federation(each), 1).stores["clients"].get(0, "rotation") or {}) for each in (own(), config)]
    start = plain.setup.blueprint.initial["rotation"]
    assert all(not torch.equal(each["3.weight"], start["3.weight"]) for each in one)
    assert not torch.equal(one[0]["3.weight"], one[1]["3.weight"])
    with pytest.raises(ConfigError, match=r"^model\.rotation\.hiden: .* did you mean model\.rotation\.hidden"):
        own("model.rotation.hiden=5")
    with pytest.raises(ConfigError, match=r"^model\.rotatio: no such key; did you mean model\.rotation"):
        own("model.rotatio.optimizer=sgd")


def test_a_part_of_ones_own_is_taken_up_from_a_checkpoint(own, tmp_path: Path) -> None:
    config = own("model.rotation.optimizer.lr=0.5")
    whole = play(Federation(config))
    folder = tmp_path / "run"
    first, results = Federation(config, folder), Results(folder)
    results.record(*first.step())
    first.checkpoint(results.state())
    again = Federation(config, folder)
    again.resume(Results(folder).restore)
    assert again.round == 1
    assert same(weights(play(again)), weights(whole))
    assert any("/rotation/" in key for key in weights(whole))


def test_a_part_of_ones_own_has_rules_and_leaves_other_runs_their_identity(own, configure) -> None:
    rules = part_rules()
    assert {key for key in rules if key.startswith("model.rotation.")} == {
        f"model.rotation.{key}" for key in ("hidden", "optimizer.*", "scheduler.*")
    }
    assert all(key.endswith((".optimizer.*", ".scheduler.*")) for key in rules if "rotation" not in key)
    saved = configure("algorithm=fed_avg")
    assert RunConfig.from_mapping(saved.to_mapping()).identity() == saved.identity()
    assert load_config([*SMALL, "algorithm=fed_avg"]).identity() == saved.identity()
