"""MocoSFL as its authors' clients go through it, against a bare loop: momentum copies, gradients, rates, cohorts."""

import copy
import math

import pytest
import torch

from cutlayer.algorithms.moco_sfl import MocoSFL, MocoSFLConfig
from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.test_moco import CLIENT_MOMENTUM, LR, MOMENTUM, SETTING, Bare, views
from tests.conftest import play

STEPS, INTERVAL, VELOCITY, DECAY, HALF_TURN = 3, 2, 0.9, 0.01, 4
AUTHORS = (
    *SETTING, "num_clients=7", "frac=0.5", "rounds=6", f"algorithm.local_steps={STEPS}", f"cohort_interval={INTERVAL}",
    "algorithm.client_copy=own", "algorithm.client_gradient=cohort", f"optimizer.momentum={VELOCITY}",
    f"optimizer.weight_decay={DECAY}", "scheduler=cosine", f"scheduler.T_max={HALF_TURN}",
)  # fmt: skip


class AuthorsLoop(Bare):
    """Clients as in the authors' code: what each has for itself stays with it, absent clients wait.

    A client's momentum copy follows its online copy before each key is made; its gradient is its share of that of the
    cohort's mean loss; its rate falls and rises with its own steps, or with the rounds.
    """

    def __init__(self, federation: Federation, *, kept: bool, by_step: bool) -> None:
        super().__init__(federation)
        self.kept, self.by_step = kept, by_step
        clients = range(federation.setup.config.num_clients)
        self.copies = {c: copy.deepcopy(self.parts["client_momentum"]) for c in clients}
        self.velocities: dict[str, list[torch.Tensor]] = {}
        self.taken = dict.fromkeys(clients, 0)

    def move(self, whose: str, parameters: list[torch.Tensor], slopes: list[torch.Tensor], rate: float) -> None:
        """Momentum and weight decay as Sutskever et al. 2013 in torch's form: v = m v + g + d w, w = w - r v."""
        slopes = [slope + DECAY * p.detach() for p, slope in zip(parameters, slopes, strict=True)]
        before = self.velocities.get(whose, [torch.zeros_like(slope) for slope in slopes])
        self.velocities[whose] = [VELOCITY * v + slope for v, slope in zip(before, slopes, strict=True)]
        with torch.no_grad():
            for p, v in zip(parameters, self.velocities[whose], strict=True):
                p -= rate * v

    @staticmethod
    def cosine(place: int) -> float:
        return LR * (1 + math.cos(math.pi * place / HALF_TURN)) / 2

    def round(self, number: int) -> None:
        cohort = self.drawn.cohort(number // INTERVAL * INTERVAL)
        online = {c: copy.deepcopy(self.parts["client"]) for c in cohort}
        size = self.drawn.config.batch_size
        steps = {c: list(views(self.federation, self.drawn, c, number, [size] * STEPS)) for c in cohort}
        if not self.kept:
            self.velocities = {name: v for name, v in self.velocities.items() if name == "server"}
        for step in range(STEPS):
            query, key = {}, {}
            for c in cohort:
                query[c] = online[c](steps[c][step][0])
                self.follow(self.copies[c], online[c], CLIENT_MOMENTUM)
                key[c] = self.copies[c](steps[c][step][1]).detach()
            owners = [c for c in cohort for _ in range(size)]
            zq = torch.cat([query[c] for c in cohort]).detach().requires_grad_()
            zk = torch.cat([key[c] for c in cohort])
            loss, keys = self.loss(zq, zk, owners)
            other, more = self.loss(zk, zq.detach(), owners)
            down = dict(zip(cohort, torch.autograd.grad(loss, zq, retain_graph=True)[0].split(size), strict=True))
            trained = [p for name in ("server", "projector") for p in self.parts[name].parameters()]
            slopes = torch.autograd.grad(loss + other, trained, allow_unused=True)
            learning = [(p, slope) for p, slope in zip(trained, slopes, strict=True) if slope is not None]
            self.move("server", [p for p, _ in learning], [slope for _, slope in learning], self.cosine(number))
            for name in ("server", "projector"):
                self.follow(self.parts[f"{name}_momentum"], self.parts[name], MOMENTUM)
            self.push(more, owners)
            self.push(keys, owners)
            for c in cohort:
                slopes = torch.autograd.grad(query[c], list(online[c].parameters()), down[c])
                rate = self.cosine(self.taken[c] if self.by_step else number)
                self.move(f"client {c}", list(online[c].parameters()), list(slopes), rate)
                self.taken[c] += 1
        with torch.no_grad():
            for key, value in self.parts["client"].named_parameters():
                value.copy_(sum(dict(online[c].named_parameters())[key] for c in cohort) / len(cohort))


@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_clients_are_those_of_the_authors(configure, kept: bool, by_step: bool) -> None:
    keep = f"model.client.optimizer.keep={'run' if kept else 'round'}"
    federation = Federation(configure(*AUTHORS, keep, f"algorithm.client_schedule={'step' if by_step else 'round'}"))
    bare = AuthorsLoop(federation, kept=kept, by_step=by_step)
    for number in range(6):
        bare.round(number)
        federation.step()
        for name in ("client", "server", "projector", "server_momentum", "projector_momentum"):
            found = federation.server.ctx.parts[name].state_dict()
            for key, value in bare.parts[name].state_dict().items():
                if not key.startswith("fc3."):  # the classifier, which no one trains: decay alone moves it
                    torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-11, msg=f"{number} {name}/{key}")
    took_part = {c for c in bare.copies if bare.taken[c]}
    assert len(took_part) > 4, "the cohort has changed"
    for client, average in bare.copies.items():
        row = federation.stores["clients"].get(client, "client_momentum")
        assert (row is not None) == (client in took_part)
        for key, value in average.state_dict().items() if row is not None else ():
            torch.testing.assert_close(row[key], value, rtol=1e-10, atol=1e-11)


def test_the_same_clients_stay_for_some_rounds(configure) -> None:
    setup = Federation(configure(*AUTHORS)).setup
    cohorts = [setup.cohort(number) for number in range(40)]
    assert all(cohorts[number] == cohorts[number + 1] for number in range(0, 40, 2))
    assert len({tuple(cohort) for cohort in cohorts}) > 10


def test_a_momentum_copy_of_a_clients_own_does_not_travel(configure) -> None:
    fields: dict[str, set[tuple[str, str]]] = {}
    for kind in ("own", "shared"):
        federation = Federation(configure(*AUTHORS, f"algorithm.client_copy={kind}", "rounds=1"))
        lines = federation.step()[1]
        fields[kind] = {(line.direction, line.field) for line in lines if line.kind == "model"}
    assert fields["own"] == {("down", "client"), ("up", "client")}
    assert fields["shared"] == {*fields["own"], ("down", "client_momentum")}


def test_a_run_goes_on_with_the_clients_own_copies_and_steps(configure, tmp_path) -> None:
    config = configure(*AUTHORS, "algorithm.client_schedule=step")
    straight = play(Federation(config))
    first = Federation(config, tmp_path)
    for _ in range(3):
        first.step()
    first.checkpoint({})
    second = Federation(config, tmp_path)
    second.resume()
    play(second)
    for name, part in straight.server.ctx.parts.items():
        for key, value in part.state_dict().items():
            assert torch.equal(second.server.ctx.parts[name].state_dict()[key], value), f"{name}/{key}"


def test_what_differs_between_clients_is_not_computed_as_one() -> None:
    alike = MocoSFLConfig(client_copy="shared")
    assert MocoSFL.computes_together(alike)
    for other in (MocoSFLConfig(client_copy="own"), MocoSFLConfig(client_copy="shared", client_schedule="step")):
        assert not MocoSFL.computes_together(other)
