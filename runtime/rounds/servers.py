"""The server of a method, as at the start of a run."""

from __future__ import annotations

from cutlayer.algorithms.base import Server
from cutlayer.runtime.parties.contexts import ServerContext
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.setup import Setup


def make_server(setup: Setup, store: Store) -> Server:
    """The algorithm's server as at the start of a run; what it keeps for clients is in the store."""
    layout, config = setup.algorithm.layout, setup.config
    context = ServerContext(
        blueprint=setup.blueprint,
        parts=setup.blueprint.parts(layout.server),
        config=config.algorithm,
        shared=setup.algorithm.shared,
        num_clients=setup.population,
        aggregate=config.aggregate,
        seed=config.seed,
        store=store,
        pace=setup.server_pace(),
    )
    return setup.algorithm.Server(context)
