"""Language models: cut at every length, trained weights that no copy copies, adapters that plain PEFT reads."""

import copy
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cutlayer.algorithms.alignment import AlignmentBatch, alignment_batch
from cutlayer.datasets import DatasetInfo
from cutlayer.models import ModelConfig, build_auxiliary, build_model, split
from cutlayer.models.frozen import frozen_in
from cutlayer.models.lora import LoraConfig
from cutlayer.models.parts.auxiliary import AuxiliaryConfig
from cutlayer.models.pretrained import base_hash
from cutlayer.models.splitting import split_in_three
from cutlayer.runtime.after.saved import read_config, restore
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import ADAPTERS
from cutlayer.runtime.job import choose_folder, claim
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.tasks import task_of
from tests.conftest import play, same, weights

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
peft = pytest.importorskip("peft", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of both libraries, which say what they change by themselves

INFO = DatasetInfo("made", 0, 0, 0, 3, tuple("abc"), task="causal_lm", outputs=40, length=20)
GPT2: dict[str, Any] = {"n_layer": 4, "n_embd": 16, "n_head": 2, "n_positions": 24}
LLAMA = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 24}  # fmt: skip
NEOX = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "max_position_embeddings": 24}  # fmt: skip
OPT = {"num_hidden_layers": 3, "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16,
       "max_position_embeddings": 24}  # fmt: skip
KINDS = {
    "gpt2": (GPT2, "transformer.h.0", "transformer.h.2"),
    "llama": (LLAMA, "model.layers.0", "model.layers.1"),
    "qwen2": (LLAMA, "model.layers.0", "model.layers.1"),
    "gpt_neox": (NEOX, "gpt_neox.layers.0", "gpt_neox.layers.1"),
    "opt": (OPT, "model.decoder.layers.0", "model.decoder.layers.1"),
}


def config(kind: str = "gpt2", **more: Any) -> ModelConfig:
    options, cut, _ = KINDS[kind]
    return ModelConfig(f"huggingface/{kind}", **{"cut": cut, "options": options, "lora": LoraConfig(r=2), **more})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it, of weights that are no fresh ones."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gpt2", **GPT2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    )
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_model_at_every_length_with_the_same_gradients(kind: str) -> None:
    _, first, second = KINDS[kind]
    torch.manual_seed(0)
    model = build_model(config(kind), INFO).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # B begins at zero, which would hide what is before it
    both = [split(model, first, INFO.shape), split_in_three(model, first, second, INFO.shape)]
    for parts in both:
        for part in parts:
            part.eval()
        for b, length in ((1, 20), (3, 7), (2, 1)):
            x = torch.randint(40, (b, length))
            outcomes = []
            for modules in ((model,), parts):
                model.zero_grad(set_to_none=True)
                z = x
                for module in modules:
                    z = module(z)
                z.square().sum().backward()
                outcomes.append((z, {name: p.grad for name, p in model.named_parameters()}))
            (whole, gradients), (cut, others) = outcomes
            assert torch.equal(whole, cut)
            assert whole.shape == (b, length, 40)
            assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_our_gpt_is_gpt2() -> None:
    options = {"hidden": 16, "heads": 2, "depth": 2}
    ours = build_model(ModelConfig("gpt", options=options), INFO).eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**GPT2, "n_layer": 2, "n_positions": 20}, vocab_size=40, tie_word_embeddings=False)
    ).eval()
    names = {"embedding.token": "transformer.wte", "embedding.position": "transformer.wpe", "norm": "transformer.ln_f"}
    names |= {"head": "lm_head"}
    inner = {"norm1": "ln_1", "norm2": "ln_2", "attention": "attn.c_attn", "project": "attn.c_proj"}
    inner |= {"widen": "mlp.c_fc", "narrow": "mlp.c_proj"}
    names |= {f"block{i + 1}.{one}": f"transformer.h.{i}.{other}" for i in range(2) for one, other in inner.items()}
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        module, _, kind = name.rpartition(".")
        found = state[f"{names[module]}.{kind}"]
        tensor.copy_(found.T if kind == "weight" and module.startswith("block") and "norm" not in module else found)
    for length in (20, 5, 1):
        x = torch.randint(40, (2, length))
        torch.testing.assert_close(ours(x), theirs(x).logits)


def test_only_adapters_are_in_a_state_and_all_copies_have_one_memory_for_the_rest(base: Path) -> None:
    model = build_model(config(base=base), INFO)
    assert all(".lora_" in name for name in model.state_dict())
    assert all(".lora_" in name for name, _ in model.named_parameters())
    places = {id(buffer): buffer.data_ptr() for _, _, buffer in frozen_in(model)}
    assert len(places) > 20
    twins: list[nn.Module] = [copy.deepcopy(model), build_model(config(base=base), INFO)]
    twins += [*split(model, "transformer.h.0", INFO.shape), build_auxiliary(config(base=base), INFO, model)]
    for twin in twins:
        found = {buffer.data_ptr() for _, _, buffer in frozen_in(twin)}
        assert found
        assert found <= {*places.values()}
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    x = torch.randint(40, (2, 9))
    assert torch.equal(model.eval()(x), plain(x).logits[..., :40]), "it begins as its base"


def test_parts_of_a_run_share_it_too(configure, base: Path) -> None:
    federation = Federation(configure("algorithm=fsl_sage", *run_settings(base)))
    blueprint = federation.setup.blueprint
    copies = [blueprint.parts(blueprint.initial) for _ in range(2)]
    memory = [{b.data_ptr() for part in parts.values() for _, _, b in frozen_in(part)} for parts in copies]
    assert memory[0] == memory[1]
    whole = {
        b.data_ptr() for _, _, b in frozen_in(build_model(federation.setup.config.model, federation.setup.dataset.info))
    }
    assert memory[0] <= whole


def run_settings(base: Path, *more: str) -> tuple[str, ...]:
    return (
        *("dataset=shakespeare", "dataset.options.length=16", "dataset.fraction=0.005", "dataset.distribution=iid"),
        *("model=huggingface/gpt2", f"model.base={base}", "model.cut=transformer.h.0", "model.lora.r=2"),
        *("num_clients=2", "batch_size=8", "rounds=2", *more),
    )


@pytest.mark.parametrize("train", ["both", "B"])
def test_plain_peft_reads_what_a_run_has_learnt(configure, base: Path, tmp_path: Path, train: str) -> None:
    setting = (*run_settings(base), "algorithm=sl_multi_server", f"model.lora.train={train}", "lr=0.05")
    made = configure(*setting, f"save_dir={tmp_path}", "progress=none")
    with claim(made, setting) as folder:
        run(made, folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(plain, folder.path / ADAPTERS).eval()
    federation = Federation(configure(*setting))
    federation = play(federation)
    parts = [federation.learnt.held[name].eval() for name in ("client", "server")]
    x = torch.randint(200, (3, 11))
    with torch.no_grad():
        assert torch.equal(parts[1](parts[0](x)), loaded(x).logits[..., :257])
        loaded.disable_adapter_layers()
        assert not torch.allclose(parts[1](parts[0](x)), loaded(x).logits[..., :257]), "the adapters have learnt"
    sent = load_file(folder.path / "model.safetensors").keys()
    assert {"lora_A" in name for name in sent} == ({True, False} if train == "both" else {False})


def changed(base: Path, to: Path, change: Any) -> Path:
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"), "missing transformer.h.1.mlp.c_fc.weight"),
        (lambda t: t.update(other=torch.ones(2)), "unexpected other"),
        (lambda t: t.update({"transformer.ln_f.weight": torch.ones(3)}), "mismatched_sizes"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_weights_that_are_not_the_models_are_refused(base: Path, tmp_path: Path, change: Any, reason: str) -> None:
    """They would else be drawn anew without a word."""
    folder = changed(base, tmp_path / "changed", change)
    with pytest.raises(ConfigError) as caught:
        build_model(config(base=folder), INFO)
    assert str(caught.value).startswith(f"model.base={folder}: expected ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bases_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.base=.*expected weights of a llama; these are of a gpt2"):
        build_model(config("llama", base=base, options={}), INFO)
    with pytest.raises(ConfigError, match=r"model\.base=.*expected a folder with config\.json"):
        build_model(config(base=tmp_path), INFO)
    many = DatasetInfo("made", 0, 0, 0, 3, tuple("abc"), task="causal_lm", outputs=301, length=20)
    with pytest.raises(ConfigError, match="expected a model of at least the 301 tokens of the tokenizer; it has 300"):
        build_model(config(base=base), many)
    long = DatasetInfo("made", 0, 0, 0, 3, tuple("abc"), task="causal_lm", outputs=40, length=25)
    with pytest.raises(ConfigError, match=r"dataset\.options\.length=25: expected at most 24, the positions"):
        build_model(config(base=base), long)
    with pytest.raises(ConfigError, match=r"base=.*: expected null with model=gpt"):
        ModelConfig("gpt", base=base)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets=.*c_attn"):
        build_model(config(lora=LoraConfig(r=2, targets=("nowhere",))), INFO)


def test_what_a_run_has_trained_is_a_base(configure, base: Path, tmp_path: Path) -> None:
    """Plain transformers reads the run's folder, and adapters begin where the run ended."""
    setting = (*run_settings(base, "model.lora.r=0", "algorithm=fed_avg", "lr=0.01"), f"save_dir={tmp_path}")
    made = configure(*setting, "progress=none")
    with claim(made, setting) as folder:
        summary = run(made, folder)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(folder.path, output_loading_info=True)
    assert not any(told.values())
    assert not torch.equal(
        loaded.transformer.wte.weight, transformers.AutoModelForCausalLM.from_pretrained(base).transformer.wte.weight
    )
    later = Federation(configure(*run_settings(folder.path), "algorithm=fed_avg"))
    begun = later.evaluator.evaluate(lambda: later.clients.scores(later.evaluator))
    assert begun.loss == pytest.approx(summary.final_loss, rel=1e-6)


def test_first_weights_of_xavier_leave_adapters_and_a_base_alone(base: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(40, (2, 9))
    model = build_model(config("llama", initialisation="xavier"), INFO).eval()
    drawn = model(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.zero_()
    assert torch.equal(model(x), drawn), "B is zero"
    with pytest.raises(ConfigError, match=r"initialisation=xavier: expected own with model\.base"):
        config(base=base, initialisation="xavier")


def test_a_base_is_known_by_what_is_in_it(base: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    assert base_hash(elsewhere) == base_hash(base)
    other = changed(base, tmp_path / "other", lambda t: t["transformer.ln_f.weight"].add_(1))
    assert base_hash(other) != base_hash(base)
    configured = shutil.copytree(base, tmp_path / "configured")
    settings = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps({**settings, "activation_function": "relu"}))
    assert base_hash(configured) != base_hash(base)


def test_a_run_is_the_same_wherever_its_base_lies(configure, base: Path, tmp_path: Path) -> None:
    """It is found and goes on, and is measured with the base named where it is now; on other weights it is another."""
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    other = changed(base, tmp_path / "other", lambda t: t["transformer.ln_f.weight"].add_(1))
    common = ("algorithm=fed_avg", f"save_dir={tmp_path / 'saves'}", "progress=none")

    def made(folder: Path, *more: str) -> Any:
        return configure(*run_settings(folder), *common, *more)

    first, moved = made(base), made(elsewhere)
    assert first.identity() == moved.identity()
    assert len({first.identity(), made(other).identity(), made(tmp_path / "gone").identity()}) == 3
    with suppress(KeyboardInterrupt), claim(first, []) as folder:
        federation = Federation(first, folder.path)
        federation.step()
        federation.checkpoint({})
        raise KeyboardInterrupt
    assert choose_folder(made(other), []) != choose_folder(moved, []) == folder.path
    resumed = Federation(moved, folder.path)
    assert resumed.resume() == {}
    assert same(weights(play(resumed)), weights(play(Federation(first))))
    with pytest.raises(ConfigError, match=r"another configuration|same configuration"):
        Federation(made(other), folder.path).resume()


def test_a_finished_run_is_measured_on_the_weights_that_it_was_trained_on(
    configure, base: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    other = changed(base, tmp_path / "other", lambda t: t["transformer.ln_f.weight"].add_(1))
    setting = (*run_settings(base), "algorithm=fed_avg", "rounds=1", f"save_dir={tmp_path / 'saves'}", "progress=none")
    config = configure(*setting)
    with claim(config, setting) as folder:
        run(config, folder)
    for where in (base, elsewhere):
        named = {"model": "huggingface/gpt2", "model.base": str(where), "personalize.part": "full"}
        federation = restore(folder.path, read_config(folder.path, named))
        assert federation.setup.config.model.base == where
    with pytest.raises(ConfigError, match=r"model\.base=.*other: .*weights that the run began from"):
        restore(folder.path, read_config(folder.path, {**named, "model.base": str(other)}))


@pytest.mark.parametrize(("size", "blocks"), [("half", 1), ("default", 1), ("transformer.h.2", 2), ("full", 3)])
def test_auxiliary_models_are_the_server_part_with_fewer_blocks(base: Path, size: str, blocks: int) -> None:
    made = config(base=base, parts={"auxiliary": AuxiliaryConfig(size=size)})
    model = build_model(made, INFO).eval()
    client, _ = split(model, "transformer.h.0", INFO.shape)
    auxiliary = build_auxiliary(made, INFO, model).eval()
    assert len(auxiliary.state_dict()) == 2 * blocks
    x = torch.randint(40, (2, 9))
    shorter = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    shorter.transformer.h = shorter.transformer.h[: 1 + blocks]
    torch.testing.assert_close(auxiliary(client(x)), shorter(x).logits[..., :40])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_the_gradient_of_alignment_is_that_of_attention_step_by_step(kind: str) -> None:
    """Fused attention has no second derivative; of GPT-2 beside finite differences too, as others round within."""
    options, *_ = KINDS[kind]
    still = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}.get(kind, {})
    y = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    y[0, :4] = -100
    found: list[AlignmentBatch] = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        made = config(kind, options={**options, **still}, parts={"auxiliary": AuxiliaryConfig(size="full")})
        model: Any = build_model(made, INFO)
        model.config._attn_implementation = attention
        auxiliary = build_auxiliary(made, INFO, model).double()
        for parameter in auxiliary.parameters():
            nn.init.normal_(parameter, std=0.3)
        z = torch.randn(2, 9, 16, dtype=torch.float64)
        found.append(alignment_batch(auxiliary, z, y, torch.randn_like(z), task_of(INFO).loss(0)))
        found[-1].differentiate()
    one, other = ([*batch.model.parameters()] for batch in found)
    for a, b in zip(one, other, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    if kind == "gpt2":
        direction = [torch.randn_like(weight) for weight in one]
        slope = sum(float((way * weight.grad).sum()) for way, weight in zip(direction, one, strict=True))  # type: ignore[operator]
        errors = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for weight, way in zip(one, direction, strict=True):
                    weight += step * way
            errors.append(float(found[0].error()))
        assert slope == pytest.approx((errors[0] - errors[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("cut", ["embedding", "block1", "block2", "block3", "norm"])
@pytest.mark.parametrize("training", [True, False])
def test_our_gpt_is_cut_anywhere(cut: str, training: bool) -> None:
    torch.manual_seed(0)
    made = ModelConfig("gpt", options={"hidden": 16, "heads": 2, "depth": 3, "dropout": 0.2})
    model = build_model(made, INFO).train(training)
    client, server = split(model, cut, INFO.shape)
    assert client.state_dict().keys() | server.state_dict().keys() == model.state_dict().keys()
    assert not client.state_dict().keys() & server.state_dict().keys()
    for length in (20, 3):
        x = torch.randint(40, (2, length))
        torch.manual_seed(1)
        whole = model(x)
        torch.manual_seed(1)
        assert torch.equal(server(client(x)), whole)
    later = model.eval()(x)
    assert torch.allclose(model(x[:, :2]), later[:, :2], atol=1e-6), "a place knows nothing of what comes after it"
