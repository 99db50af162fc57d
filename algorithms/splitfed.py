"""Split learning with a gradient per batch: vanilla split learning and SplitFed v1 and v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, SplitServer
from cutlayer.algorithms.mixins import CopyPerClient
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, Upload, ask, unflatten
from cutlayer.runtime.messages.crossing import crossed
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext
from cutlayer.runtime.parties.optim import PartOptimizer


@register("sl_single_server")
class SplitFedV2(Algorithm):
    """SplitFed with one server model, updated in client order (Thapa et al., AAAI 2022, SFLV2).

    The order of the clients is drawn anew each round.
    """

    layout = Layout(client=("client",), server=("client", "server"))
    shared = ("client",)
    traffic = (
        Flow("down", "model", ("client",)),
        Flow("up", "smashed", ("smashed", "labels"), per="batch"),
        Flow("down", "smashed", ("smashed",), per="batch"),
        Flow("up", "model", ("client",)),
    )
    Server = SplitServer

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        """Each batch: smashed data and labels up, the gradient of the smashed data down, one step."""
        ctx.load(down)
        model, optimizer = ctx.part("client"), ctx.optimizer("client")
        for x, y in ctx.batches():
            z = model(x)
            reply = yield ask("smashed", z=z, y=y)
            optimizer.update(z, crossed(reply, "grad"))
        return ctx.dump("client")


class ReplicaServer(SplitServer, CopyPerClient):
    """A copy of the server model for each client, averaged with the clients' weights when the round ends."""

    copied = ("server",)

    def __init__(self, ctx: ServerContext) -> None:
        super().__init__(ctx)
        self._replicas: dict[int, tuple[nn.Module, PartOptimizer]] = {}
        self._ended: dict[int, Mapping[str, Mapping[str, Tensor]]] = {}

    def open_round(self, cohort: Sequence[int]) -> None:
        super().open_round(cohort)
        self._replicas.clear()
        self._ended.clear()

    def on_smashed(self, client: int, message: Payload) -> Fields:
        if client not in self._replicas:
            self._replicas[client] = self.ctx.replica("server", client)
        return self.train(*self._replicas[client], message)

    def give_back(self, client: int) -> dict[str, Mapping[str, Tensor]]:
        return {"server": self._replicas.pop(client)[0].state_dict()} if client in self._replicas else {}

    def take_back(self, client: int, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._ended[client] = states

    def absorb(self, client: int, upload: Upload) -> None:
        super().absorb(client, upload)
        replica = self._replicas.get(client)
        self.average(self._ended.pop(client, None) or self.give_back(client), self.ctx.weight(client, upload.samples))
        if replica is not None:
            self.ctx.retire("server", replica[0])

    def forget(self, client: int) -> None:
        self._replicas.pop(client, None)
        self._ended.pop(client, None)


@register("sl_multi_server")
class SplitFedV1(SplitFedV2):
    """SplitFed with a server model per client (Thapa et al., AAAI 2022, SFLV1).

    The copies do not touch one another, so they run one after another here, which gives what running them in
    parallel gives in the memory of one copy; with workers each runs beside its client.
    """

    uneven = True
    Server = ReplicaServer


class RelayServer(SplitServer):
    """Hands the client model on from each client to the next."""

    def absorb(self, client: int, upload: Upload) -> None:
        self.ctx.load("client", unflatten(upload.fields)["client"])


@register("sl")
class SplitLearning(SplitFedV2):
    """Vanilla split learning (Gupta & Raskar, 2018): clients train one client model in turn.

    It is handed on from each to the next through the server.
    """

    in_turn = True
    unread = ("aggregate.weights",)
    Server = RelayServer
