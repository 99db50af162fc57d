"""An embedding that is the head too, all weights trained: sent, averaged, saved and counted once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cutlayer.models import build_model
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.job import claim
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same, weights

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")

GPT2 = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 24,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TEXT = (
    *("dataset=shakespeare", "dataset.options.length=24", "dataset.fraction=0.01", "dataset.distribution=iid"),
    *("model=huggingface/gpt2", "model.options={" + ", ".join(f"{k}: {v}" for k, v in GPT2.items()) + "}"),
    *("algorithm=fed_avg", "batch_size=16", "rounds=1", "num_clients=2", "optimizer=sgd", "lr=0.1"),
)


def plain(tokens: int) -> torch.nn.Module:
    """Transformers' own model."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, vocab_size=tokens))


@pytest.mark.parametrize("name", ["fed_avg", "scaffold"])
def test_a_round_has_the_bytes_of_each_weight_once(configure, name: str) -> None:
    federation = play(Federation(configure(*TEXT, f"algorithm={name}")))
    parameters = plain(federation.setup.dataset.info.outputs).num_parameters()
    states = 1 if name == "fed_avg" else 2  # with the control variates
    assert federation.setup.parameters == parameters
    assert federation.ledger.training("down").payload == federation.ledger.training("up").payload
    assert federation.ledger.training().payload == 2 * 2 * states * 4 * parameters
    assert sum(expected_bytes(federation.setup, range(1)).values()) == 2 * 2 * states * 4 * parameters


def test_training_is_that_of_transformers_own_model(configure) -> None:
    """Two clients' steps on the tied weight, and their average, computed beside."""
    federation = Federation(configure(*TEXT, "precision=fp64"))
    setup, ends = federation.setup, list[dict[str, torch.Tensor]]()
    for client in range(2):
        model = plain(setup.dataset.info.outputs).double().train()
        assert model.load_state_dict(setup.blueprint.initial["model"], strict=False).missing_keys == ["lm_head.weight"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in setup.data(client).batches(rng.torch_generator(0, round=0, client=client, stream="batches")):
            optimizer.zero_grad()
            F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=-100).backward()
            optimizer.step()
        ends.append({key: value.detach().clone() for key, value in model.state_dict().items()})
    play(federation)
    part = federation.server.ctx.part("model")
    assert part.lm_head.weight is part.transformer.wte.weight
    sizes = setup.partition.sizes
    for name, value in part.state_dict().items():
        expected = sum(float(n) / sizes.sum() * end[name] for n, end in zip(sizes, ends, strict=True))
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14), name
    assert not torch.equal(part.lm_head.weight, setup.blueprint.initial["model"]["transformer.wte.weight"])


def test_the_saved_model_is_read_by_transformers_and_by_another_run(configure, tmp_path: Path) -> None:
    config = configure(*TEXT, f"save_dir={tmp_path}")
    with claim(config, []) as folder:
        run(config, folder)
    file = folder.path / "model.safetensors"
    saved = load_file(file)
    tokens = Federation(config).setup.dataset.info.outputs
    model = plain(tokens)
    assert saved.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert model.load_state_dict(saved, strict=False).missing_keys == ["lm_head.weight"]
    model.config.save_pretrained(folder.path / "plain")
    save_file(saved, folder.path / "plain" / "model.safetensors", {"format": "pt"})
    read = transformers.AutoModelForCausalLM.from_pretrained(folder.path / "plain").eval()
    x = torch.arange(20)[None] % tokens
    again = configure(*TEXT, f"model.init={folder.path}")
    info = Federation(again).setup.dataset.info
    ours = build_model(again.model, info).eval()
    assert torch.equal(model.eval()(x).logits, ours(x))
    assert torch.equal(read(x).logits, ours(x))
    both = {**saved, "lm_head.weight": saved["transformer.wte.weight"].clone()}  # as earlier versions saved them
    save_file(both, file)
    assert torch.equal(build_model(again.model, info).eval()(x), ours(x))
    save_file({**both, "lm_head.weight": both["lm_head.weight"] + 1}, file)
    with pytest.raises(ConfigError, match="in which transformer.wte.weight and lm_head.weight are one tensor"):
        build_model(again.model, info)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, for attention
@pytest.mark.parametrize("more", [("cohort.together=2",), ("algorithm=local_only",), ("algorithm=fed_prox",)])
def test_ways_to_keep_and_to_compute(configure, more: tuple[str, ...], tmp_path: Path) -> None:
    keys = (*TEXT, "rounds=2", "precision=fp64", "optimizer.momentum=0.9", "optimizer.keep=run", *more)
    alone = tuple(key for key in keys if not key.startswith("cohort."))
    expected = weights(play(Federation(configure(*alone))))
    federation = Federation(configure(*keys), tmp_path)
    federation.step()
    federation.checkpoint({})
    resumed = Federation(configure(*keys), tmp_path)
    resumed.resume()
    found = weights(play(resumed))
    assert not any("lm_head" in name for name in found)
    if "together" in more[0]:
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key].double(), expected[key].double(), rtol=1e-9) for key in found)
    else:
        assert same(found, expected)


def test_a_state_with_both_names_is_still_loaded(configure) -> None:
    """As a run that was begun by an earlier version has kept it."""
    part = Federation(configure(*TEXT)).server.ctx.part("model")
    state = {name: value.detach() + 1 for name, value in part.state_dict().items()}
    part.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    assert torch.equal(part.lm_head.weight, state["transformer.wte.weight"])
    with pytest.raises(RuntimeError, match="Missing key"):
        part.load_state_dict({name: value for name, value in state.items() if "wte" not in name})
