"""The program of a client machine: it joins a server, takes part in its rounds, and comes back when the link breaks."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.folders import make_folders, remove_empty, standing
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.ground.process import prepare_process, set_threads
from cutlayer.runtime.messages.boundary import METRICS, MODEL, Message, Payload, Reply, on_device
from cutlayer.runtime.messages.bounds import WireError
from cutlayer.runtime.network.agreement import PROTOCOL, client_config, data_facts, fingerprint, shared, version
from cutlayer.runtime.network.client.link import ServerLink
from cutlayer.runtime.network.client.site import Site
from cutlayer.runtime.network.links import LinkLostError
from cutlayer.runtime.network.wire import Received, What
from cutlayer.runtime.run_folder import run_path
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import GrpcTransport

log = logging.getLogger(__name__)

# Seconds from one attempt to reach the server to the next: the first, the longest, and by what they grow.
_FIRST_S, _LONGEST_S, _GROWTH = 0.5, 30.0, 1.6
_FAREWELL_S = 5.0


class RefusedError(Exception):
    """The server does not let this client take part."""


class _EndedError(Exception):
    """The run is over."""


class _GivenUpError(Exception):
    """The server has given up the round that this client is in."""


def work(config: RunConfig, overrides: Sequence[str]) -> None:
    """Be a client until the run is over.

    Args:
        config: as composed from this machine's command line. overrides: that command line.

    Raises:
        ConfigError: what cannot be as configured, here or together with the server.
    """
    client = _Client(config, overrides)
    try:
        client.work()
    finally:
        client.release()


class _Client:
    def __init__(self, config: RunConfig, overrides: Sequence[str]) -> None:
        assert config.server is not None
        assert config.client_id is not None
        assert isinstance(config.transport, GrpcTransport)
        self._own, self._overrides, self._transport = config, overrides, config.transport
        self._server, self._id = config.server, config.client_id
        self._site: Site | None = None
        self._run = ""
        self._lock: FileLock | None = None
        self._root = Path()
        self._rounds = 0

    def work(self) -> None:
        wait, idle = _FIRST_S, threading.Event()
        while True:
            link = ServerLink(self._server, self._id, self._transport)
            try:
                self._join(link)
                wait = _FIRST_S
                log.info("client %d: %s", self._id, self._serve(link))
                return
            except RefusedError as error:
                raise ConfigError("server", self._server, f"a server that takes client {self._id}: {error}") from None
            except (LinkLostError, WireError) as error:
                pause = wait * random.uniform(0.8, 1.2)
                log.warning("waiting for the server at %s (%s); next try in %.1f s", self._server, error, pause)
                wait = min(_LONGEST_S, wait * _GROWTH)
            finally:
                link.close()
            idle.wait(pause)

    # ------------------------------------------------------------------ joining

    def _join(self, link: ServerLink) -> None:
        link.send(What.HELLO, {"client": self._id, "protocol": PROTOCOL, "version": version()})
        welcome = _next(link, What.WELCOME).body
        site = self._settle(welcome)
        config = site.setup.config
        facts = {
            "config": fingerprint(shared(config)),
            "samples": site.samples,
            "trains": site.setup.has_batches(self._id),
            "data": data_facts(site.setup.dataset, divided=config.dataset.divided, base=config.model.base),
        }
        link.send(What.HELLO, facts)
        samples, title = site.samples, config.title
        idle = "" if facts["trains"] else ", no batch to train on"
        log.info("client %d at %s: %s, %d training samples here%s", self._id, self._server, title, samples, idle)

    def _settle(self, welcome: dict[str, Any]) -> Site:
        """Ready what the run needs; what an earlier link of the same run readied is used again."""
        run, theirs = str(welcome.get("run")), welcome.get("config")
        if not isinstance(theirs, dict):
            raise WireError("a welcome without a configuration")
        self._rounds = _number(welcome, "rounds") or 0
        if self._site is not None and run == self._run and shared(self._site.setup.config) == theirs:
            return self._site
        config = client_config(self._own, cast(dict[str, Any], theirs), self._overrides)
        prepare_process(config.torch_device(), config.arithmetic)
        folder = self._folder(config, run)
        if self._site is None or run != self._run:
            self._claim(folder)
        named = {override.lstrip("+").partition("=")[0] for override in self._overrides}
        download = not named.isdisjoint(("dataset", "dataset.name", "dataset.root"))
        self._site, self._run = Site(config, folder, download=download), run
        set_threads(config.threads, self._site.setup.device, self._site.setup.parameters)
        return self._site

    def _folder(self, config: RunConfig, run: str) -> Path:
        data = f"{config.dataset.name}-{config.dataset.distribution}"
        levels = (config.algorithm_name, config.model.name, data, f"client={self._id}", run)
        return run_path(config.save_dir, levels, "")

    def release(self) -> None:
        """Let other processes be this client; of its folder nothing is left where it keeps nothing."""
        if self._lock is not None:
            self._lock.release(remove=True)
            remove_empty(self._lock.path.parent, self._root)

    def _claim(self, folder: Path) -> None:
        self.release()
        self._root = standing(self._own.save_dir)
        make_folders(folder)
        self._lock = FileLock.take(folder / ".lock")
        if self._lock is None:
            raise ConfigError("client_id", self._id, "a client that no other process of this machine is")

    # ------------------------------------------------------------------ rounds

    def _serve(self, link: ServerLink) -> str:
        """Do what the server asks until it ends the run; why it does."""
        assert self._site is not None
        site, session = self._site, 0
        while True:
            try:
                received = _next(link, What.ROUND, What.CLOSE)
                if received.head.what is What.CLOSE:
                    continue  # of a round that is over here
                session, order = received.head.session, received.body
                site.restore(_number(order, "last"), _number(order, "needed"))
                opening = _next(link, What.OPEN, What.EVALUATE)
                try:
                    if opening.head.what is What.EVALUATE:
                        scores = site.scores(opening.body)
                        link.send(What.EVALUATED, {name: each.to_json() for name, each in scores.items()}, session)
                    else:
                        self._train(link, session, _number(order, "round") or 0, opening.body)
                except _GivenUpError:
                    log.info("client %d: the server has given up the round", self._id)
            except _EndedError as end:
                return str(end)
            except (LinkLostError, WireError, RefusedError):
                raise
            except Exception as error:
                link.send(What.FAILED, {"error": f"{type(error).__name__}: {error}"[:300]}, session)
                link.finish(_FAREWELL_S)
                raise

    def _train(self, link: ServerLink, session: int, round: int, down: Payload) -> None:
        assert self._site is not None
        site, start = self._site, time.monotonic()
        computed = site.seconds
        client = site.open(round)
        try:
            client.send(on_device(down, site.setup.device))
            while isinstance(event := client.receive(), Message):
                if link.peek() is not None:
                    raise _GivenUpError  # before this message there is nothing to answer
                link.send(What.ASK if event.expects_reply else What.TELL, event.fields, session, event.kind)
                if event.expects_reply:
                    client.send(on_device(_reply(link, session), site.setup.device))
            if not all(map(math.isfinite, event.metrics.values())):
                expected = f"a rate that converges: the loss is not finite in round {round + 1}"
                raise ConfigError("lr", site.setup.config.lr, expected)
            keeps = site.keep()
        finally:
            client.close()
        link.send(What.METRICS, {"samples": event.samples, **event.metrics}, session, METRICS)
        link.send(What.REPORT, {"keeps": keeps, "seconds": site.seconds - computed}, session)
        link.send(What.UPLOAD, event.fields, session, MODEL)
        took = time.monotonic() - start
        log.info("client %d: round %d of %d took %.2f s", self._id, round + 1, self._rounds, took)


def _next(link: ServerLink, *whats: What) -> Received:
    """The next message, one of these, unless the server ends the stream."""
    received = link.receive({*whats, What.END})
    if received.head.what is What.END:
        body = received.body
        if "error" not in body:
            raise _EndedError(str(body.get("reason")))
        raise (LinkLostError if body.get("later") is True else RefusedError)(str(body["error"]))
    return received


def _reply(link: ServerLink, session: int) -> Reply:
    while True:
        received = _next(link, What.REPLY, What.CLOSE, What.ROUND)
        if received.head.what is What.ROUND:
            link.push_back(received)
            raise _GivenUpError
        if received.head.session == session:
            if received.head.what is What.CLOSE:
                raise _GivenUpError
            return received.body


def _number(order: dict[str, Any], key: str) -> int | None:
    value = order.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise WireError(f"{key} {value!r} is no round")
    return value
