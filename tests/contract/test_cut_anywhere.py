"""Methods that cut the model, where no sequence is: bytes, equality to the whole model, resuming, what is saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.boundary import pack, unpack
from runtime.config import ConfigError
from runtime.experiment import run
from runtime.federation import Federation
from runtime.files import MODEL_FILE
from runtime.ledger import CONTROL_KINDS
from runtime.run_folder import RunFolder
from runtime.settings import RunConfig
from runtime.traffic import expected_bytes
from tests.conftest import play, same, weights
from tests.contract.elsewhere import Net, Skipping

Configure = Callable[..., RunConfig]
NET = ("model=import/tests.contract.elsewhere.Net", "model.cut=norm")
SKIPPING = ("model=import/tests.contract.elsewhere.Skipping", "model.cut=inner")
INSIDE = ("model=resnet20", "model.options.width=4", "model.cut=layer1.0.conv1")
MODELS = (NET, SKIPPING, INSIDE)
SPLIT = ("sl", "sl_single_server", "sl_multi_server")
CROSSING = {NET: 6 * 64, SKIPPING: 2 * 6 * 64, INSIDE: 2 * 4 * 64}  # values of a sample of 8x8 pixels


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SPLIT)
def test_bytes_of_several_values_equal_the_closed_form(configure: Configure, name: str, model: tuple[str, ...]) -> None:
    federation = play(Federation(configure(f"algorithm={name}", *model, "num_clients=2", "rounds=1")))
    measured: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[direction, kind] = measured.get((direction, kind), 0) + count.payload
    assert measured == expected_bytes(federation, range(1))
    samples = int(federation.partition.sizes.sum())
    assert measured["down", "smashed"] == samples * CROSSING[model] * 4
    assert measured["up", "smashed"] == samples * (CROSSING[model] * 4 + 8)


@pytest.mark.parametrize("model", MODELS)
def test_one_client_is_centralized_training(configure: Configure, model: tuple[str, ...]) -> None:
    one = (*model, "num_clients=1", "rounds=2", "precision=fp64", "optimizer=sgd", "lr=0.05")
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
def test_an_interrupted_run_goes_on_to_the_same_bits(
    configure: Configure, tmp_path: Path, model: tuple[str, ...]
) -> None:
    config = configure("algorithm=sl_multi_server", *model, "rounds=4", "num_clients=2")
    through = play(Federation(config))
    first = play(Federation(config, tmp_path), 2)
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
    test = Federation(config).dataset.test
    x, y = next(test.batches(torch.arange(len(test)), batch_size=len(test)))
    with torch.no_grad():
        assert float((plain(x).argmax(1) == y).double().mean()) == summary.final_acc
    assert list((tmp_path / "run").glob("personalized/*/summary.json"))


@pytest.mark.parametrize("name", ["cse_fsl", "fsl_sage"])
def test_auxiliary_models_at_cuts_of_one_value(configure: Configure, name: str) -> None:
    for size in ("linear", "full"):
        federation = play(
            Federation(
                configure(f"algorithm={name}", *NET, f"model.auxiliary.size={size}", "num_clients=2", "rounds=1")
            )
        )
        assert federation.round == 1
    with pytest.raises(ConfigError, match=r"model\.auxiliary\.size=default: expected linear or full"):
        Federation(configure(f"algorithm={name}", *NET))
    with pytest.raises(ConfigError, match=r"model\.cut=inner: expected a cut that one value crosses, as 2 do here"):
        Federation(configure(f"algorithm={name}", *SKIPPING))


@pytest.mark.parametrize(
    ("model", "cut", "line"),
    [
        (NET, "stam", r"model\.cut=stam: expected a module of the model; did you mean stem\?"),
        (
            NET,
            "out",
            r"expected a cut that leaves weights to the client and to the server \(choices: stem, norm\)",
        ),
        (NET, "null", "expected a module of the model, as import/tests.contract.elsewhere.Net has no cut of its own"),
        (INSIDE, "layer1.0.relu", "it runs 2 times in a forward pass"),
    ],
)
def test_a_cut_that_is_none_gives_one_line(configure: Configure, model: tuple[str, ...], cut: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        Federation(configure("algorithm=sl", *model, f"model.cut={cut}"))
    assert "\n" not in str(error.value)


def test_values_that_cross_are_packed_and_unpacked() -> None:
    one, several = torch.ones(2), (torch.zeros(1), torch.ones(3))
    assert pack("z", one).keys() == {"z"}
    assert pack("z", several).keys() == {"z/0", "z/1"}
    payload = {**pack("z", several), **pack("grad", one), "y": torch.arange(2)}
    assert unpack(payload, "grad") is one
    assert unpack(payload, "z") == several
    with pytest.raises(KeyError, match="message has no field 'x'"):
        unpack(payload, "x")
