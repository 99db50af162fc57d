"""The list of cuts: parameters and operations by hand, bytes as a run of that cut has them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cutlayer.runtime.costs.cuts import _each, list_cuts, prepared
from cutlayer.runtime.costs.metering import measure_costs
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching import launch
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.setup import load_data
from cutlayer.runtime.settings import RunConfig
from tests.conftest import play, same, weights

Configure = Callable[..., RunConfig]


def test_two_convolutions_by_hand(configure: Configure) -> None:
    """cnn2 on 8x8 digits: 320 + 18,496 parameters of convolutions, 32,896 + 1,290 of dense layers."""
    found = {cut.name: cut for cut in list_cuts(configure("algorithm=sl", "model=cnn2"))}
    assert list(found) == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "flatten", "fc1", "relu3"]
    assert (found["conv1"].client_parameters, found["conv1"].server_parameters) == (320, 18_496 + 32_896 + 1_290)
    assert (found["pool2"].client_parameters, found["pool2"].server_parameters) == (320 + 18_496, 32_896 + 1_290)
    conv1, conv2, fc1, fc2 = 2 * 64 * 9 * 32, 2 * 16 * 9 * 32 * 64, 2 * 256 * 128, 2 * 128 * 10
    assert (found["pool1"].client_flops, found["pool1"].server_flops) == (conv1, conv2 + fc1 + fc2)
    assert (found["fc1"].client_flops, found["fc1"].server_flops) == (conv1 + conv2 + fc1, fc2)
    assert [found[name].shapes for name in ("conv1", "pool1", "flatten")] == [((32, 8, 8),), ((32, 4, 4),), ((256,),)]


@pytest.mark.parametrize(
    ("name", "model", "cut"),
    [
        ("sl_single_server", "cnn2", "conv1"),
        ("sl_multi_server", "cnn2", "pool1"),
        ("cse_fsl", "cnn2", "fc1"),
        ("sl", "import/tests.contract.elsewhere.Skipping", "inner"),
    ],
)
def test_bytes_are_those_of_a_run(configure: Configure, name: str, model: str, cut: str) -> None:
    given = (f"algorithm={name}", f"model={model}")
    (listed,) = (each for each in list_cuts(configure(*given)) if each.name == cut)
    federation = play(Federation(configure(*given, f"model.cut={cut}")), 1)
    totals = federation.ledger.totals()
    assert listed.bytes == sum(count.payload for _, kind, _, count in totals if kind not in CONTROL_KINDS)


def test_every_listed_cut_is_one(configure: Configure) -> None:
    """What the list leaves uncompared passes the comparison of a run."""
    given = ("algorithm=sl", "model=import/tests.contract.elsewhere.Skipping")
    names = [cut.name for cut in list_cuts(configure(*given))]
    assert names == ["stem", "inner", "drop", "outer"]
    for name in names:
        Federation(configure(*given, f"model.cut={name}"))


GPT2 = ("model=huggingface/gpt2", "model.options={n_layer: 2, n_embd: 16, n_head: 2, tie_word_embeddings: false}")
LLAMA = (
    "model=huggingface/llama",
    "model.options={num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 4, num_key_value_heads: 2, "
    "intermediate_size: 32, tie_word_embeddings: false}",
)
TEXT = (
    *("dataset=shakespeare", "dataset.options.length=20", "dataset.fraction=0.01", "dataset.distribution=iid"),
    *("algorithm=sl_single_server", "num_clients=2", "batch_size=8"),
)
IMAGES = ("algorithm=sl_single_server", "batch_size=16")


@pytest.mark.parametrize(
    "given",
    [
        (*IMAGES, "model=cnn2"),
        (*IMAGES, "model=cnn2", "precision=bf16", "optimizer=sgd", "optimizer.momentum=0.9"),
        (*IMAGES, "model=cnn4", "model.options.width=4", "optimizer.name=adagrad"),
        (*IMAGES, "model=vit", "model.options={depth: 2, hidden: 16}"),
        (*TEXT, "model=gpt", "model.options={hidden: 16, heads: 2, depth: 2}"),
        (*TEXT, *GPT2),
        (*TEXT, *GPT2, "model.lora.r=2"),
        (*TEXT, *LLAMA),
    ],
    ids=["cnn2", "half precision", "cnn4", "vit", "gpt", "gpt2", "gpt2 with adapters", "llama"],
)
def test_memory_is_what_a_step_of_a_client_takes(configure: Configure, given: tuple[str, ...]) -> None:
    """Worked out from shapes, measured by `--costs` while a client takes a step: the same number of bytes."""
    listed = list(list_cuts(configure(*given)))
    for cut in listed[:: max(1, len(listed) // 4)]:
        assert cut.memory == measure_costs(configure(*given, f"model.cut={cut.name}")).memory


def test_a_model_of_text_is_cut_at_its_blocks(configure: Configure) -> None:
    """From passes that all cuts share, without memory: the rows of each cut recorded and computed by itself."""
    config = configure(*TEXT, *GPT2)
    found = list(list_cuts(config))
    assert [cut.name for cut in found] == [f"transformer.h.{block}" for block in range(2)]
    every = list(list_cuts(config, every=True))
    assert len(every) > 14
    assert [cut for cut in every if cut.name.rpartition(".")[0] == "transformer.h"] == found
    dataset = load_data(config)
    assert every[::5] == [*_each(config, dataset, [cut.name for cut in every[::5]], sketched=False)]


def test_where_no_cut_is_possible_it_says_why(configure: Configure) -> None:
    tied = "model.options={n_layer: 2, n_embd: 16, n_head: 2}"
    with pytest.raises(
        ConfigError, match=r"model\.cut=.*wte\.weight and lm_head\.weight, on either side, are one tensor"
    ):
        list(list_cuts(configure(*TEXT, "model=huggingface/gpt2", tied)))


def test_a_method_that_cuts_nothing_is_reported(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="algorithm=fed_avg: expected a method that cuts the model in two"):
        list(list_cuts(configure("algorithm=fed_avg")))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def main() -> None:
        raise AssertionError("nothing is to run")

    command = ["main.py", "model=mlp", "--cuts", "algorithm=sl", f"save_dir={tmp_path / 'saves'}"]
    monkeypatch.setattr("sys.argv", command)
    for name in (launch.TRACEBACKS, launch.LAUNCHER, "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # to be put back afterwards
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    launch.launch(main)
    shown = capsys.readouterr().out
    assert shown.startswith("sl, mlp, digits: 4 cuts\n")
    assert "| relu1     |              8,320 |" in shown
    assert not (tmp_path / "saves").exists()
    monkeypatch.setattr("sys.argv", [*command, "lr=fast"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as left:
        launch.launch(main)
    assert left.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("budget", "cut"),
    [  # of four clients: within 20,000 parameters the round after pool2 has the fewest bytes
        ("client_params<=20000", "pool2"),
        ("client_params<=319.5", None),
        ("client_mflop<=0.1", "pool1"),
        ("round_mb<=0.2", None),
    ],
)
def test_a_cut_within_a_budget(configure: Configure, budget: str, cut: str | None) -> None:
    given = ("algorithm=fsl_sage", "model=cnn2", "algorithm.align_epochs=2", f"model.cut=auto:{budget}")
    if cut is None:
        with pytest.raises(ConfigError, match="expected a budget that some cut keeps; the least is .*, after "):
            prepared(configure(*given))
        return
    config, dataset = prepared(configure(*given))
    chosen = Federation(config, dataset=dataset)
    assert chosen.setup.config.model.cut == cut
    explicit = play(Federation(configure(*given[:3], f"model.cut={cut}")), 1)
    assert same(weights(play(chosen, 1)), weights(explicit))


def test_a_limit_of_bytes_leaves_the_client_the_least_work(configure: Configure) -> None:
    given = ("algorithm=sl", "model=cnn2")
    listed = list(list_cuts(configure(*given)))
    limit = sorted(cut.bytes for cut in listed)[3] / 1e6
    chosen = prepared(configure(*given, f"model.cut=auto:round_mb<={limit:f}"))[0].model.cut
    affordable = [cut for cut in listed if cut.bytes <= limit * 1e6]
    assert chosen == min(affordable, key=lambda cut: cut.client_flops).name


@pytest.mark.parametrize("text", ["auto", "auto:params<=3", "auto:client_params<=", "auto:client_params<=-1"])
def test_a_budget_that_cannot_be_read_gives_one_line(configure: Configure, text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.cut=.*expected a budget.*auto:client_params<=20000") as error:
        configure("algorithm=sl", f"model.cut='{text}'")
    assert "\n" not in str(error.value)


def test_a_federation_takes_no_budget_but_the_cut_that_it_leads_to(configure: Configure) -> None:
    config = configure("algorithm=fsl_sage", "model=cnn2", "model.cut=auto:client_params<=20000")
    with pytest.raises(ConfigError, match=r"^model\.cut=auto:client_params<=20000: expected the name of a module; "):
        Federation(config)
    chosen, dataset = prepared(config)
    assert Federation(chosen, dataset=dataset).setup.config.model.cut == chosen.model.cut
