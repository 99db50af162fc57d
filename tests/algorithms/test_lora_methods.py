"""FedSA-LoRA, FLoRA and FFA-LoRA beside PEFT, bare loops, sums written out, and what the authors' functions gave."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutlayer.algorithms.flora as flora
from cutlayer.models.folding import adapted, fold, stacked_adapters, weights_below
from cutlayer.models.lora import ADAPTER, LoraConfig, add_lora, is_adapter, is_second
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import FOLDED
from cutlayer.runtime.job import claim
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same
from tests.contract.adapting import prepare

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
peft = pytest.importorskip("peft", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of both libraries, which say what they change by themselves

SGD = ("optimizer=sgd", "lr=0.3", "model.lora.alpha=8")
METHODS = ("fed_sa_lora", "flora")
# B A and the sum of A's rows, as the authors' function gave them in float32.
AUTHORS = [
    [0.68666667, 0.50833333, 0.33, 0.15166666, -0.02666665, -0.20499998],
    [0.01333339, 0.18666664, 0.36, 0.53333336, 0.70666671, 0.88000011],
    [-0.65999985, -0.13499999, 0.38999999, 0.91499996, 1.44000006, 1.96500015],
    [-1.33333313, -0.45666665, 0.41999996, 1.29666674, 2.17333341, 3.05000019],
    [-2.00666642, -0.77833331, 0.44999987, 1.67833328, 2.90666699, 4.13500023],
]
AUTHORS_A = [-0.81999993, -0.59000003, -0.35999998, -0.13, 0.1, 0.32999998]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def keys(folder: Path) -> tuple[str, ...]:
    return prepare(folder)


class Watched:
    """What each client's adapters were, as a round of FLoRA began for it and as it ended: A, B and alpha / r."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, tuple[Tensor, Tensor, float]]] = []
        self._train = flora.train
        patch.setattr(flora, "train", self.train)

    def train(self, ctx: Any) -> None:
        model = ctx.part("model")
        self.begun.append({name: tensor.clone() for name, tensor in model.state_dict().items() if is_adapter(name)})
        self._train(ctx)
        self.ended.append(
            {
                name: (
                    layer.lora_A[ADAPTER].weight.detach().double(),
                    layer.lora_B[ADAPTER].weight.detach().double(),
                    layer.lora_alpha[ADAPTER] / layer.r[ADAPTER],
                )
                for name, layer in adapted(model).items()
            }
        )


# ------------------------------------------------------------------ FLoRA


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "more", [(), ("algorithm.ranks=[2,3,7]",), ("algorithm.ranks=[4,2]", "algorithm.alphas=[8,5]")]
)
def test_a_round_adds_the_weighted_sum_of_the_clients_products(
    configure, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], precision: str
) -> None:
    weights = (0.5, 0.2, 0.3)
    setting = ("algorithm=flora", *keys, *SGD, *more, f"precision={precision}", f"aggregate.weights={[*weights]}")
    federation = Federation(configure(*setting, "cohort_order=fixed"))
    model, transposed = federation.server.ctx.part("model"), ("c_attn", "c_fc")
    for _ in range(2):
        before = {name: layer.get_base_layer().weight.double() for name, layer in adapted(model).items()}
        with monkeypatch.context() as patch:
            seen = Watched(patch)
            federation.step()
        assert len(seen.ended) == 3
        for name, layer in adapted(model).items():
            own = [each[name] for each in seen.ended]
            change = torch.stack([w * s * (b @ a) for w, (a, b, s) in zip(weights, own, strict=True)]).sum(0)
            assert change.abs().max() > 1e-3
            expected = before[name] + (change.T if name.endswith(transposed) else change)
            torch.testing.assert_close(layer.get_base_layer().weight.double(), expected, rtol=1e-6, atol=1e-6)
    shapes = {tuple(each["transformer.h.0.attn.c_attn"][0].shape) for each in seen.ended}
    assert shapes == {(rank, 16) for rank in federation.setup.config.algorithm.ranks or (4,)}


def test_what_the_authors_function_gives() -> None:
    """ATP-1010/FederatedLLM 7bea158, `FedAvg` with `stacking` and `heter`: ranks 2, 3, 1 with 3, 5, 2 samples."""
    ranks, counts, adapters = (2, 3, 1), (3, 5, 2), list[dict[str, Tensor]]()
    for k, rank in enumerate(ranks):
        a = torch.arange(rank * 6.0).view(rank, 6) / 10 - k
        b = (torch.arange(5.0 * rank).view(5, rank) - 2) / (k + 1)
        adapters.append({"x.lora_A.default.weight": a, "x.lora_B.default.weight": b})
    stack = stacked_adapters(adapters, [count / sum(counts) for count in counts])
    product = stack["x.lora_B.default.weight"] @ stack["x.lora_A.default.weight"]
    torch.testing.assert_close(product, torch.tensor(AUTHORS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack["x.lora_A.default.weight"].sum(0), torch.tensor(AUTHORS_A), rtol=1e-5, atol=1e-6)


class Convolution(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 4))


@pytest.mark.parametrize("kind", ["gpt2", "convolution"])
def test_a_stack_is_folded_as_peft_merges_it(kind: str) -> None:
    """PEFT has a stack of rank R as an adapter of alpha R, whose scale is 1."""
    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 40}
        plain: nn.Module = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model("gpt2", **size, bos_token_id=0, eos_token_id=0)
        )
    else:
        plain = Convolution()
    plain = plain.double()
    targets = ["c_attn", "lm_head"] if kind == "gpt2" else ["0", "3"]
    several = [copy.deepcopy(plain) for _ in range(3)]
    for model, rank in zip(several, (2, 1, 4), strict=True):
        add_lora(model, LoraConfig(r=rank, targets=tuple(targets)))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    states = [{name: each for name, each in model.state_dict().items() if is_adapter(name)} for model in several]
    stack = stacked_adapters(states, (0.5, 0.3, 0.2))
    merged = copy.deepcopy(plain)
    settings = {"target_modules": targets, "lora_alpha": 7, "r": 7}
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), merged, adapter_name=ADAPTER)
    merged.double().load_state_dict(stack, strict=False)
    for layer in adapted(merged).values():
        layer.merge()
    own = several[0]
    for layer in adapted(own).values():
        layer.base_layer._buffers["weight"] = layer.base_layer.weight.as_subclass(Tensor).clone()
    fold(own, stack)
    for name, layer in adapted(merged).items():
        found = own.get_submodule(name).get_base_layer().weight
        assert not torch.allclose(found, plain.get_submodule(name).weight)
        torch.testing.assert_close(found, layer.get_base_layer().weight, rtol=1e-10, atol=1e-10)


def batches(federation: Federation, round: int) -> Any:
    from cutlayer.runtime.ground import rng

    generator = rng.torch_generator(federation.setup.config.seed, round=round, client=0, stream="batches")
    return federation.setup.data(0).batches(generator)


def test_one_clients_round_is_peft_trained_and_merged(
    configure, keys: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watched(monkeypatch)
    targets = "model.lora.targets=[c_attn,c_fc]"
    federation = Federation(configure("algorithm=flora", *keys, *SGD, "num_clients=1", targets))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").train()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"]}
    for round in range(2):
        federation.step()
        own = peft.get_peft_model(plain, peft.LoraConfig(**settings))
        found = {f"base_model.model.{name}": tensor for name, tensor in seen.begun[round].items()}
        assert all(not tensor.any() for name, tensor in found.items() if is_second(name)), "new adapters each round"
        own.load_state_dict(found, strict=False)
        optimizer = torch.optim.SGD((p for p in own.parameters() if p.requires_grad), lr=0.3)
        for x, y in batches(federation, round):
            optimizer.zero_grad()
            nn.functional.cross_entropy(own(x).logits.flatten(0, 1), y.flatten(), ignore_index=-100).backward()
            optimizer.step()
        plain = own.merge_and_unload()
        for name, weight in weights_below(federation.server.ctx.part("model")).items():
            expected = plain.state_dict()[name.replace(".base_layer", "")]
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(seen.begun[0][next(iter(seen.begun[0]))], seen.begun[1][next(iter(seen.begun[1]))])


def test_a_client_that_was_away_has_the_servers_weights(configure, keys: tuple[str, ...]) -> None:
    """By the stacks that it lacks, or by the weights themselves where these are less; to the bit either way."""
    setting = ("algorithm=flora", *keys, *SGD, "num_clients=5", "frac=0.4", "rounds=9", "model.lora.r=2")
    federation = Federation(configure(*setting, "batch_size=16", "eval_interval=9"))
    fields: set[str] = set()
    while not federation.done:
        before = {k: w.clone() for k, w in weights_below(federation.server.ctx.part("model")).items()}
        _, lines = federation.step()
        for client in {line.client for line in lines}:
            row = federation.stores["clients"].get(client, "weights")
            assert row is not None
            assert same(dict(row), before)
        fields |= {line.field for line in lines if line.direction == "down"}
    assert fields == {"stack", "weights"}


def test_what_a_run_leaves_is_loaded_by_transformers_and_begins_others(
    configure, keys: tuple[str, ...], folder: Path
) -> None:
    setting = ("algorithm=flora", *keys, "lr=0.05", "algorithm.ranks=[2,3]", "model.lora.r=2")
    made = configure(*setting, f"save_dir={folder}/saves", "progress=none")
    with claim(made, setting) as claimed:
        run(made, claimed)
    found = play(Federation(configure(*setting)))
    x = torch.randint(257, (3, 11))
    plain = transformers.AutoModelForCausalLM.from_pretrained(claimed.path / FOLDED).eval()
    assert plain.config.tie_word_embeddings is False, "the head has learnt, and the embedding has not"
    with torch.no_grad():
        logits = found.server.ctx.part("model").eval()(x)
        assert torch.equal(plain(x).logits[..., :257], logits)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        assert not torch.allclose(base(x).logits[..., :257], logits, atol=0.1)
    expected = found.evaluate().loss
    others = [("algorithm=fed_avg", f"model.init={claimed.path}"), ("algorithm=flora", f"model.init={claimed.path}")]
    others += [("algorithm=sl_single_server", "model.cut=transformer.h.0", f"model.base={claimed.path / FOLDED}")]
    for more in others:
        assert Federation(configure(*keys, "model.lora.r=2", *more)).evaluate().loss == pytest.approx(expected)


def test_flora_goes_on_from_the_adapters_of_another_method(configure, keys: tuple[str, ...], folder: Path) -> None:
    setting = ("algorithm=fed_avg", *keys, "lr=0.05")
    made = configure(*setting, f"save_dir={folder}/saves", "progress=none")
    with claim(made, setting) as claimed:
        run(made, claimed)
    expected = play(Federation(configure(*setting))).evaluate().loss
    more = ("algorithm.ranks=[4,2]", f"model.init={claimed.path}")
    found = Federation(configure("algorithm=flora", *keys, *more)).evaluate().loss
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - Federation(configure("algorithm=flora", *keys)).evaluate().loss) > 0.1


def test_clients_of_several_ranks_test_the_one_global_model(configure) -> None:
    """Also where each batch has statistics of its own, so that clients' shares are tested apart."""
    setting = ("model=cnn4", "model.options.width=4", "aggregate.buffers=keep_local", "dataset.local_test=true")
    federation = play(Federation(configure("algorithm=flora", *setting, "algorithm.ranks=[2,4]", "eval_interval=1")))
    found = federation.evaluate()
    assert len([row for row in found.clients if row[0] == "local_acc"]) == 4


# ------------------------------------------------------------------ FedSA-LoRA


def test_one_clients_rounds_are_local_training(configure, keys: tuple[str, ...]) -> None:
    found, expected = (
        play(Federation(configure(f"algorithm={name}", *keys, *SGD, "num_clients=1"))).full_model()
        for name in ("fed_sa_lora", "local_only")
    )
    assert found is not None
    assert expected is not None
    assert same(found, expected)


def test_first_matrices_are_averaged_and_second_ones_stay(configure, keys: tuple[str, ...]) -> None:
    """Each client goes on from the mean of A and its own B, beside a bare loop; and is tested with both."""
    federation = Federation(configure("algorithm=fed_sa_lora", *keys, *SGD, "aggregate.weights=[3,1,2]"))
    blueprint = federation.setup.blueprint
    first = {name: t for name, t in blueprint.initial["model"].items() if not is_second(name)}
    second = [{n: t for n, t in blueprint.initial["model"].items() if is_second(n)} for _ in range(3)]
    from cutlayer.runtime.ground import rng

    for round in range(2):
        trained = []
        for client in range(3):
            model = blueprint.parts(["model"])["model"]
            model.load_state_dict({**first, **second[client]})
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            generator = rng.torch_generator(0, round=round, client=client, stream="batches")
            for x, y in federation.setup.data(client).batches(generator):
                optimizer.zero_grad()
                blueprint.loss(model(x), y).backward()
                optimizer.step()
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            trained.append({name: state[name] for name in first})
            second[client] = {name: state[name] for name in second[client]}
        first = {n: sum(w / 6 * t[n] for w, t in zip((3, 1, 2), trained, strict=True)) for n in first}  # type: ignore[misc]
        record, _ = federation.step()
    held = federation.server.ctx.part("model").state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-5, atol=1e-6)
    losses = []
    for client in range(3):
        row = federation.stores["clients"].get(client, "model")
        assert row is not None
        assert row.keys() == second[client].keys()
        for name, tensor in second[client].items():
            torch.testing.assert_close(row[name], tensor, rtol=1e-4, atol=1e-6)
        own = blueprint.parts(["model"])
        own["model"].load_state_dict({**held, **row})
        losses.append(federation.evaluator.score([own["model"]], federation.setup.dataset.test).both[1])
    assert record.test_loss == pytest.approx(sum(losses) / 3)
    assert len({*losses}) == 3


# ------------------------------------------------------------------ FFA-LoRA


@pytest.mark.parametrize(("name", "exact"), [("fed_avg_ffa_lora", True), ("fed_avg", False)])
def test_the_mean_of_products_is_the_product_of_means(
    configure, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, name: str, exact: bool
) -> None:
    setting = (f"algorithm={name}", *keys, *SGD, "aggregate.weights=[3,1,2]", "cohort_order=fixed", "rounds=1")
    federation = Federation(configure(*setting))
    sent: list[dict[str, Tensor]] = []
    absorb = federation.server.absorb

    def watched(client: int, upload: Any) -> None:
        sent.append({key.partition("/")[2]: value for key, value in upload.fields.items()})
        absorb(client, upload)

    monkeypatch.setattr(federation.server, "absorb", watched)
    federation.step()
    model = federation.server.ctx.part("model")
    state, apart = {**dict(model.named_buffers()), **model.state_dict()}, []
    for layer in adapted(model):
        a, b = (f"{layer}.lora_{matrix}.{ADAPTER}.weight" for matrix in "AB")
        mean = sum(w / 6 * each[b] @ each.get(a, state[a]) for w, each in zip((3, 1, 2), sent, strict=True))
        apart.append(float((state[b] @ state[a] - mean).norm() / mean.norm()))  # type: ignore[union-attr]
        assert (a in sent[0]) != exact
    assert max(apart) < 1e-6 if exact else max(apart) > 1e-4


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("model.lora.r=0", r"model\.lora\.r=0: expected 1 or more, as {} trains low-rank adapters"),
        ("model.lora.train=B", r"model\.lora\.train=B: expected both, as {} is defined for"),
    ],
)
def test_without_adapters_they_refuse(configure, keys: tuple[str, ...], name: str, more: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.format(name)) as caught:
        Federation(configure(f"algorithm={name}", *keys, more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ranks", "[4,0]", "integers >= 1"),
        ("alphas", "[1]", "as many as algorithm.ranks, which are 2"),
        ("alphas", "[1,-1]", "finite numbers > 0"),
    ],
)
def test_ranks_that_are_none(configure, keys: tuple[str, ...], key: str, value: str, said: str) -> None:
    ranks = () if key == "ranks" else ("algorithm.ranks=[4,2]",)
    with pytest.raises(ConfigError, match=f"algorithm.{key}=.*: expected {said}"):
        configure("algorithm=flora", *keys, *ranks, f"algorithm.{key}={value}")
