"""Methods of one whole model or of a body and a head, with momentum that a client keeps or begins anew each round.

The loops have their own momentum SGD: `v = 0.9 v + g`, `w = w - lr v`, one `v` for each client and part for the whole
run, or a new one in each round, as in the authors' code, which makes an optimizer in each round.
"""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.test_references import SETTING, Bare, slopes

MOMENTUM, RATE, ROUNDS = 0.9, 0.05, 3
# Each part falls by a factor of its own, where there are parts.
FALL = {"model": 0.5, "body": 0.5, "head": 0.3}
Loss = Callable[..., Tensor]


class Steps:
    """Momentum SGD of one client; `velocity` is what it keeps, by part."""

    def __init__(self) -> None:
        self.velocity: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, part: nn.Module, along: Iterable[Tensor], lr: float) -> None:
        weights = list(part.parameters())
        velocity = self.velocity.setdefault(name, [torch.zeros_like(w) for w in weights])
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, along, strict=True):
                v.mul_(MOMENTUM).add_(g)
                w -= lr * v


class Loop:
    """Rounds of a method: what each client does with its own copies, and what is averaged."""

    def __init__(self, configure, keep: str, name: str, *more: str) -> None:
        setting = (*SETTING, f"optimizer.momentum={MOMENTUM}", f"optimizer.keep={keep}", "local_epochs=2")
        self.bare = Bare(Federation(configure(*setting, f"algorithm={name}", *more)))
        self.keep, self.steps = keep, dict[int, Steps]()
        self.own: dict[int, dict[str, nn.Module]] = {}

    def run(self, turn: Callable[[int, int, dict[str, nn.Module]], None], shared: str, own: Sequence[str] = ()) -> None:
        names = [name for name in ("model", "body", "head") if name in self.bare.parts]
        for round, cohort in enumerate(self.bare.cohorts):
            uploads = {}
            for client in cohort:
                if self.keep == "round" or client not in self.steps:
                    self.steps[client] = Steps()
                parts = dict(zip(names, self.bare.copy(*names), strict=True)) | self.own.get(client, {})
                turn(round, client, parts)
                self.own[client] = {name: parts[name] for name in own}
                uploads[client] = parts[shared]
            self.bare.average(shared, uploads)
        federation = self.bare.federation
        for _ in range(ROUNDS):
            federation.step()
        equal(federation.server.ctx.part(shared).state_dict(), self.bare.parts[shared].state_dict())
        pairs = zip(self.bare.parts[shared].parameters(), self.bare.initial[shared].parameters(), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs), "nothing was learnt"
        for client, kept in self.own.items():
            for name, part in kept.items():
                equal(federation.stores["clients"].get(client, name), part.state_dict())


def equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)


def rate(part: str, round: int) -> float:
    return RATE * FALL[part] ** round


KEEP = pytest.mark.parametrize("keep", ["round", "run"])


@KEEP
@pytest.mark.parametrize("mu", [0.0, 0.4])
def test_fed_avg_and_fed_prox(configure, keep: str, mu: float) -> None:
    loop = Loop(configure, keep, "fed_prox", f"algorithm.mu={mu}")

    def turn(round: int, client: int, parts: dict[str, nn.Module]) -> None:
        model = parts["model"]
        start = [w.detach().clone() for w in model.parameters()]
        for x, y in loop.bare.batches(round, client):
            along = slopes(cross_entropy(model(x), y), model)
            pulled = [g + mu * (w.detach() - s) for g, w, s in zip(along, model.parameters(), start, strict=True)]
            loop.steps[client]("model", model, pulled, rate("model", round))

    loop.run(turn, "model")


@KEEP
@pytest.mark.parametrize(
    ("name", "learning", "shared", "own"),
    [
        ("fed_babu", ("body",), "body", ()),
        ("fed_per", ("body", "head"), "body", ("head",)),
        ("lg_fed_avg", ("body", "head"), "head", ("body",)),
    ],
)
def test_body_and_head(configure, keep: str, name: str, learning, shared: str, own) -> None:
    loop = Loop(configure, keep, name)

    def turn(round: int, client: int, parts: dict[str, nn.Module]) -> None:
        for x, y in loop.bare.batches(round, client):
            loss = cross_entropy(parts["head"](parts["body"](x)), y)
            along = {part: slopes(loss, parts[part]) for part in learning}
            for part in learning:
                loop.steps[client](part, parts[part], along[part], rate(part, round))

    loop.run(turn, shared, own)


@KEEP
@pytest.mark.parametrize("one", [False, True])
def test_fed_rep(configure, keep: str, one: bool) -> None:
    """With one optimizer the fixed part's velocity goes on, as the step of rate 0 takes in its gradient."""
    loop = Loop(configure, keep, "fed_rep", f"algorithm.one_optimizer={one}", "algorithm.body_epochs=2")

    def turn(round: int, client: int, parts: dict[str, nn.Module]) -> None:
        phases = (("head", "batches"), ("body", "body batches"))
        for learning, stream in phases:
            for x, y in loop.bare.batches(round, client, stream, 2):
                loss = cross_entropy(parts["head"](parts["body"](x)), y)
                along = {name: slopes(loss, part) for name, part in parts.items()}
                for name, part in parts.items():
                    if one or name == learning:
                        lr = rate(name, round) if name == learning else 0.0
                        loop.steps[client](name, part, along[name], lr)

    loop.run(turn, "body", ("head",))


@KEEP
def test_per_fed_avg(configure, keep: str) -> None:
    """The inner step is a plain one; momentum is of the outer."""
    inner = 0.2
    loop = Loop(configure, keep, "per_fed_avg", f"algorithm.inner_lr={inner}")

    def turn(round: int, client: int, parts: dict[str, nn.Module]) -> None:
        model, batches = parts["model"], loop.bare.batches(round, client)
        for first, second in zip(batches[::2], [*batches[1::2], *batches[-1:]][: -(-len(batches) // 2)], strict=True):
            start = [w.detach().clone() for w in model.parameters()]
            ahead = slopes(cross_entropy(model(first[0]), first[1]), model)
            with torch.no_grad():
                for w, g in zip(model.parameters(), ahead, strict=True):
                    w -= inner * g
            along = slopes(cross_entropy(model(second[0]), second[1]), model)
            with torch.no_grad():
                for w, s in zip(model.parameters(), start, strict=True):
                    w.copy_(s)
            loop.steps[client]("model", model, along, rate("model", round))

    loop.run(turn, "model")


@KEEP
def test_ditto(configure, keep: str) -> None:
    """The personal model and the client's copy of the global one see the same batches, each with its own momentum."""
    pull = 0.75
    loop = Loop(configure, keep, "ditto", f"algorithm.pull={pull}")
    own: dict[int, nn.Module] = {}

    def turn(round: int, client: int, parts: dict[str, nn.Module]) -> None:
        model, steps, lr = parts["model"], loop.steps[client], rate("model", round)
        anchor = [w.detach().clone() for w in model.parameters()]
        personal = own.setdefault(client, loop.bare.copy("model")[0])
        for x, y in loop.bare.batches(round, client):
            along = slopes(cross_entropy(personal(x), y), personal)
            pulled = [g + pull * (w.detach() - a) for g, w, a in zip(along, personal.parameters(), anchor, strict=True)]
            steps("personal", personal, pulled, lr)
            steps("model", model, slopes(cross_entropy(model(x), y), model), lr)

    loop.run(turn, "model")
    for client, personal in own.items():
        equal(loop.bare.federation.stores["clients"].get(client, "model"), personal.state_dict())


def own_loss(body: nn.Module, head: nn.Module, heads: Sequence[nn.Module], blocks, x: Tensor, y: Tensor) -> Tensor:
    """MHMD's, of a body of layers that run one after another: cross-entropies of all heads, and both divergences of
    each auxiliary head, on the samples that the one who teaches gets right, over samples and classes."""
    inner = {}
    for name, module in body.named_children():
        x = inner[name] = module(x)
    final = head(x)
    loss = cross_entropy(final, y)
    for block, auxiliary in zip(blocks, heads, strict=True):
        outputs = auxiliary(inner[block])
        logits = outputs[:, :-1] / torch.sigmoid(outputs[:, -1:])
        loss = loss + 10 * cross_entropy(logits, y)
        for student, teacher in ((logits, final), (final, logits)):
            right = teacher.argmax(1) == y
            if right.any():
                p, q = student[right].log_softmax(1), teacher[right].log_softmax(1)
                loss = loss + (q.exp() * (q - p)).mean()
    return loss


@KEEP
def test_mhmd(configure, keep: str) -> None:
    loop = Loop(configure, keep, "mhmd", "model.auxiliary_heads.blocks=[relu1,fc2]")

    def turn(round: int, client: int, parts: dict[str, nn.Module]) -> None:
        heads = list(loop.bare.parts["auxiliary_heads"].children())
        for x, y in loop.bare.batches(round, client):
            loss = own_loss(parts["body"], parts["head"], heads, ("relu1", "fc2"), x, y)
            loop.steps[client]("body", parts["body"], slopes(loss, parts["body"]), rate("body", round))

    loop.run(turn, "body")
