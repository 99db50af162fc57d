"""Methods that cut the model, where no sequence is: bytes, equality to the whole model, resuming, what is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cutlayer import algorithms
from cutlayer.algorithms.base import SplitServer
from cutlayer.algorithms.splitfed import SplitFedV2
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import MODEL_FILE
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, ask
from cutlayer.runtime.messages.crossing import tensor
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.settings import RunConfig
from tests.conftest import play, same, weights
from tests.contract.elsewhere import Net, Skipping

Configure = Callable[..., RunConfig]
NET = ("model=import/tests.contract.elsewhere.Net", "model.cut=norm")
SKIPPING = ("model=import/tests.contract.elsewhere.Skipping", "model.cut=inner")
INSIDE = ("model=resnet20", "model.options.width=4", "model.cut=layer1.0.conv1", "batch_size=100")
SOME = "dataset.fraction=0.25"
MODELS = (NET, SKIPPING, INSIDE)
SPLIT = ("sl", "sl_single_server", "sl_multi_server")
CROSSING = {NET: 6 * 64, SKIPPING: 2 * 6 * 64, INSIDE: 2 * 4 * 64}  # values of a sample of 8x8 pixels


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SPLIT)
def test_bytes_of_several_values_equal_the_closed_form(configure: Configure, name: str, model: tuple[str, ...]) -> None:
    federation = play(Federation(configure(f"algorithm={name}", *model, SOME, "num_clients=2", "rounds=1")))
    measured: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[direction, kind] = measured.get((direction, kind), 0) + count.payload
    assert measured == expected_bytes(federation.setup, range(1))
    samples = int(federation.setup.partition.sizes.sum())
    assert measured["down", "smashed"] == samples * CROSSING[model] * 4
    assert measured["up", "smashed"] == samples * (CROSSING[model] * 4 + 8)


@pytest.mark.parametrize("model", MODELS)
def test_one_client_is_centralized_training(configure: Configure, model: tuple[str, ...]) -> None:
    one = (*model, SOME, "num_clients=1", "rounds=2", "precision=fp64", "optimizer=sgd", "lr=0.05")
    # Dropout draws from each party's own stream of randomness, so without it.
    one = (*one, "model.options.dropout=0") if model is SKIPPING else one
    expected = play(Federation(configure("algorithm=centralized", *one))).full_model()
    assert expected is not None
    for name in SPLIT:
        found = play(Federation(configure(f"algorithm={name}", *one))).full_model()
        assert found is not None
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_run_resumes_to_the_same_bits(
    configure: Configure, tmp_path: Path, model: tuple[str, ...]
) -> None:
    config = configure("algorithm=sl_multi_server", *model, SOME, "rounds=2", "num_clients=2")
    through = play(Federation(config))
    first = play(Federation(config, tmp_path), 1)
    first.checkpoint({})
    second = Federation(config, tmp_path)
    assert second.resume() is not None
    assert same(weights(play(second)), weights(through))


@pytest.mark.parametrize(("model", "kind"), [(NET, Net), (SKIPPING, Skipping)])
def test_the_saved_model_is_the_plain_module(
    configure: Configure, tmp_path: Path, model: tuple[str, ...], kind: type[Net | Skipping]
) -> None:
    config = configure("algorithm=sl_single_server", *model, "rounds=2", "progress=none", "personalize.part=full")
    with RunFolder.claim(tmp_path / "run") as folder:
        summary = run(config, folder)
    plain = kind(10, 1).eval()
    plain.load_state_dict(load_file(tmp_path / "run" / MODEL_FILE), strict=True)
    test = Federation(config).setup.dataset.test
    x, y = next(test.batches(torch.arange(len(test)), batch_size=len(test)))
    with torch.no_grad():
        assert float((plain(x).argmax(1) == y).double().mean()) == summary.final_acc
    assert list((tmp_path / "run").glob("personalized/*/summary.json"))


@pytest.mark.parametrize("name", ["cse_fsl", "fsl_sage"])
def test_auxiliary_models_at_cuts_of_one_value(configure: Configure, name: str) -> None:
    for size in ("linear", "full", "default"):
        federation = play(
            Federation(
                configure(f"algorithm={name}", *NET, f"model.auxiliary.size={size}", "num_clients=2", "rounds=1")
            )
        )
        assert federation.round == 1
    with pytest.raises(ConfigError, match=r"model\.cut=inner: expected a cut that one value crosses, as 2 do here"):
        Federation(configure(f"algorithm={name}", *SKIPPING))


@pytest.mark.parametrize(
    ("model", "cut", "line"),
    [
        (NET, "stam", r"model\.cut=stam: expected a module of the model; did you mean stem\?"),
        (
            NET,
            "out",
            r"expected a cut that leaves weights to each part \(choices: stem, norm\)",
        ),
        (NET, "null", "expected a module of the model, as import/tests.contract.elsewhere.Net has no cut of its own"),
        (INSIDE, "layer1.0.relu", "it runs 2 times in a forward pass"),
    ],
)
def test_a_cut_that_is_none_gives_one_line(configure: Configure, model: tuple[str, ...], cut: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        Federation(configure("algorithm=sl", *model, f"model.cut={cut}"))
    assert "\n" not in str(error.value)


# What each method that cuts is run with here; those with an auxiliary model are refused, as it takes one tensor.
EVERY_CUT = {
    "fsmkd": ("model.cut=[inner,outer]",),
    "sl_u_shape": ("model.cut=[inner,outer]",),
    "moco_sfl": ("algorithm.loss_threshold=1000", "algorithm.loss_interval=1", "rounds=4"),
    "ressfl": ("algorithm.attacker_width=4",),
}
CUTTING = [name for name in algorithms.names() if algorithms.get(name).layout.cut]


@pytest.mark.parametrize("name", CUTTING)
def test_every_method_that_cuts_runs_where_several_tensors_cross(configure: Configure, name: str) -> None:
    """Or it is one with an auxiliary model, which takes one tensor, and says so in one line."""
    setting = (f"algorithm={name}", *SKIPPING, *EVERY_CUT.get(name, ()))
    if "auxiliary" in algorithms.get(name).layout.parts:
        with pytest.raises(ConfigError, match=r"model\.cut=inner: expected a cut that one value crosses, as 2 do here"):
            Federation(configure(*setting))
        return
    federation = Federation(configure(*setting))
    start = weights(federation)
    end = weights(play(federation))
    assert not any(same({"": end[key]}, {"": value}) for key, value in start.items() if key.startswith("client/"))
    assert all(bool(value.isfinite().all()) for value in end.values())


class Naive(SplitFedV2):
    """A client that treats what crosses as one tensor, each time in another way."""

    use: Callable[[Any], Any]

    @classmethod
    def client(cls, ctx: ClientContext, down: Payload) -> ClientProgram:  # type: ignore[override]
        ctx.load(down)
        for x, y in ctx.batches():
            z = ctx.part("client")(x)
            yield ask("smashed", z=cls.use(z), y=y)
        return ctx.dump("client")


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z + 1.0,
        lambda z: 2 * z,
        lambda z: -z,
        lambda z: z.detach(),
        lambda z: z.grad,
        lambda z: z + torch.randn_like(z),
        lambda z: z.requires_grad_(),
        F.relu,
        lambda z: torch.empty_like(z).exponential_(),
        nn.Linear(2, 2),
    ],
)
def test_what_treats_several_tensors_as_one_gives_one_line(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], Any]
) -> None:
    """And runs at a cut of one, if it is right at all: no method gives other figures without a word."""
    monkeypatch.setattr(Naive, "use", staticmethod(use), raising=False)
    monkeypatch.setitem(algorithms.ALGORITHMS, "sl_single_server", Naive)
    with pytest.raises(ConfigError, match=r"^model\.cut: expected another cut, as 2 tensors cross this one") as error:
        play(Federation(configure("algorithm=sl_single_server", *SKIPPING, "rounds=1")))
    assert "\n" not in str(error.value)


class OneTensor(SplitServer):
    def on_smashed(self, client: int, message: Payload) -> Fields:
        return {"grad": tensor(message, "z")}


def test_a_server_that_takes_one_tensor_gives_one_line(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitFedV2, "Server", OneTensor)
    with pytest.raises(ConfigError, match=r"2 tensors cross .* takes one \(tensor\(message, 'z'\)\)"):
        play(Federation(configure("algorithm=sl_single_server", *SKIPPING, "rounds=1")))


# ------------------------------------------------------------------ in three

THIRDS = {
    # Values of a sample of 8x8 pixels that cross at either cut.
    (NET[0], "model.cut=[stem,norm]"): (6 * 64, 6 * 64),
    (SKIPPING[0], "model.cut=[stem,inner]"): (6 * 64, 2 * 6 * 64),
    (SKIPPING[0], "model.cut=[inner,outer]"): (2 * 6 * 64, 2 * 6 * 64),
    (*INSIDE, "model.cut=[layer1.0.conv1,layer3.2]"): (2 * 4 * 64, 16 * 4),
}


@pytest.mark.parametrize("model", THIRDS)
def test_three_parts_of_any_model_train_and_resume(
    configure: Configure, tmp_path: Path, model: tuple[str, ...]
) -> None:
    config = configure("algorithm=fsmkd", *model, SOME, "num_clients=2", "rounds=2")
    federation = play(Federation(config))
    measured: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[direction, kind] = measured.get((direction, kind), 0) + count.payload
    assert measured == expected_bytes(federation.setup, range(2))
    samples, (first, second) = 2 * int(federation.setup.partition.sizes.sum()), THIRDS[model]
    assert measured["up", "smashed"] == measured["down", "gradient"] == samples * first * 4
    assert measured["down", "smashed"] == measured["up", "gradient"] == samples * second * 4
    interrupted = play(Federation(config, tmp_path), 1)
    interrupted.checkpoint({})
    second_half = Federation(config, tmp_path)
    assert second_half.resume() is not None
    assert same(weights(play(second_half)), weights(federation))


@pytest.mark.parametrize("model", THIRDS)
@pytest.mark.parametrize("shared", ["global", "both"])
def test_a_body_that_is_the_servers_teaches_nothing(configure: Configure, model: tuple[str, ...], shared: str) -> None:
    """One client whose body starts as the server's: both paths have the same logits, and no divergence, in a step.

    The global path's gradients are then those of the whole model under cross-entropy, and with both paths twice those.
    """
    one = (*model, SOME, "num_clients=1", "rounds=1", "batch_size=2000", "precision=fp64", "optimizer=sgd", "lr=0.05")
    one = (*one, "model.options.dropout=0") if SKIPPING[0] in model else one
    federation = Federation(configure("algorithm=fsmkd", *one, f"algorithm.shared_gradient={shared}"))
    start = {**federation.setup.blueprint.initial}
    alike = {key: start["server"][key].clone() for key in start["personal"]}
    assert alike.keys() == start["server"].keys()
    federation.setup.blueprint.initial["personal"] = alike
    federation.setup.blueprint._parts["personal"].load_state_dict(alike)
    found = play(federation).full_model()
    expected = play(Federation(configure("algorithm=centralized", *one))).full_model()
    assert found is not None
    assert expected is not None
    assert found.keys() == expected.keys()
    before = {key: value for part in ("client", "server", "tail") for key, value in start[part].items()}
    doubled = {*start["client"], *start["tail"]} if shared == "both" else set[str]()
    for key, value in expected.items():
        if "running" in key or "tracked" in key:
            continue
        times = 2 if key in doubled else 1
        torch.testing.assert_close(found[key] - before[key], times * (value - before[key]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ((NET[0], "model.cut=[stem,stam]"), r"model\.cut=stam: expected a module of the model; did you mean stem\?"),
        ((NET[0], "model.cut=[norm,stem]"), r"model\.cut=stem: expected .*; it ends before the cut named before it"),
        ((NET[0], "model.cut=[norm,out]"), r"model\.cut=\[norm,out\]: expected a cut that leaves weights to each part"),
        ((NET[0], "model.cut=stem"), r"model\.cut=stem: expected \[first,second\].*two of stem, norm, out$"),
        ((NET[0], "model.cut=null"), r"model\.cut=null: expected \[first,second\].*two of stem, norm, out$"),
        (
            (NET[0], "model.cut=[stem,norm]", "model.personal.variants=[{width: 4}]"),
            r"model\.personal\.variants\.0=\{width:4\}: .* from \[6, 8, 8\] to \[6, 8, 8\].*takes no such input$",
        ),
        (
            (NET[0], "model.cut=[stem,norm]", "model.personal.variants=[{cut: [stem]}]"),
            r"model\.personal\.variants\.0\.cut=\[stem\]: expected two modules as \[first,second\]",
        ),
    ],
)
def test_cuts_in_three_that_are_none_give_one_line(configure: Configure, model: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        Federation(configure("algorithm=fsmkd", *model))
    assert "\n" not in str(error.value)


def test_a_variant_of_another_depth_says_where_it_is_cut(configure: Configure) -> None:
    deep = ("model=vit", "model.options.depth=4", "model.options.hidden=8", "model.cut=[block1,block3]")
    federation = Federation(configure("algorithm=fsmkd", *deep, "num_clients=2", "rounds=1",
        "model.personal.variants=[{depth: 6, cut: [block2, block3]}, {cut: [block1, block4]}]"))  # fmt: skip
    keys = [{key.split(".")[0] for key in twin.initial["personal"]} for twin in federation.setup.blueprint.variants]
    assert keys == [{"block3"}, {"block2", "block3", "block4"}]
    play(federation)
