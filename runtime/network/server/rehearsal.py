"""What a client's messages look like, found out before any client comes: two rounds in miniature, in this process.

Each is played twice, with batches of two and of three samples, and of text with the longest the first time and with a
single place each the second: what then differs is a size of the batch or the length of its texts and may be anything,
what is equal is what every client's message has to have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from cutlayer.datasets import Dataset, Partition
from cutlayer.runtime.messages.boundary import MODEL, Payload, Reply, Upload
from cutlayer.runtime.messages.bounds import Limits, WireError
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.network.check import Kind, Shapes
from cutlayer.runtime.rounds.session import Channel
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.trial import Trial
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import LocalTransport

log = logging.getLogger(__name__)

FieldShapes = Mapping[str, tuple[Kind, tuple[int, ...]]]
_BATCHES = (2, 3)
_CLIENTS = 2
_METRICS = 100  # fields that a client reports of its round


class Expected:
    """The shapes of each kind of message that a client may send; one of a kind that was not seen is not checked."""

    def __init__(self, shapes: Mapping[str, tuple[Shapes, ...]]) -> None:
        self._shapes = shapes

    @property
    def limits(self) -> Limits:
        """Of the number of fields and their description; the bytes are the configuration's business."""
        most = max((shapes.fields for kind in self._shapes.values() for shapes in kind), default=None)
        if most is None:
            return Limits(message_bytes=0)
        tensors = 2 * most + _METRICS
        return Limits(message_bytes=0, tensors=tensors, header_bytes=tensors * 1024)

    def check(self, kind: str, payload: Payload) -> None:
        """Compare a message with what is expected.

        Raises:
            WireError: it is like none of its kind.
        """
        error: WireError | None = None
        for shapes in self._shapes.get(kind, ()):
            try:
                shapes.check(payload)
                return
            except WireError as found:
                error = error or found
        if error is not None:
            raise error


def rehearse(config: RunConfig, dataset: Dataset) -> Expected:
    """Play a few rounds of the configured run on a handful of the data, and note what clients send."""
    seen: list[dict[str, list[FieldShapes]]] = []
    divided = replace(config.dataset.evenly(), drop_last="auto")
    local = replace(config, transport=LocalTransport(), role=None, comm_threshold_mb=None, dataset=divided)
    try:
        for batch, length in zip(_BATCHES, (max(1, dataset.info.length), 1), strict=True):
            setting = replace(local, batch_size=batch, local_epochs=1)
            seen.append(_play(setting, replace(dataset, train=dataset.train.shortened(length))))
    except Exception as error:
        log.warning("messages of clients are not checked for their shapes: %s: %s", type(error).__name__, error)
        return Expected({})
    return Expected({kind: found for kind in seen[0] if (found := _shapes(seen[0][kind], seen[1].get(kind, [])))})


class _Recorder(Channel):
    """A channel that notes what goes up."""

    def __init__(self) -> None:
        super().__init__(Ledger())
        self.seen: dict[str, list[FieldShapes]] = {}

    def up(self, client: int, kind: str, payload: Payload) -> Reply:
        self.seen.setdefault(kind, []).append({name: _layout(value) for name, value in payload.items()})
        return super().up(client, kind, payload)

    def upload(self, client: int, upload: Upload) -> Upload:
        return Upload(self.up(client, MODEL, upload.fields), upload.samples, dict(upload.metrics))


def _layout(value: object) -> tuple[Kind, tuple[int, ...]]:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return (bool if isinstance(value, bool) else int if isinstance(value, int) else float), ()


def _play(config: RunConfig, dataset: Dataset) -> dict[str, list[FieldShapes]]:
    """What a few clients send, by kind, in the rounds in which a method may do something else."""
    trial, recorder = Trial(config, dataset, _a_few_each), _Recorder()
    lengths = {int(getattr(config.algorithm, flow.rounds)) for flow in trial.setup.algorithm.traffic if flow.rounds}
    for round in sorted({0, 1, *lengths, *(length - 1 for length in lengths)}):
        trial.play(list(range(_players(trial.setup))), round, recorder)
    return recorder.seen


def _a_few_each(setup: Setup) -> Partition:
    """Samples for the steps until something is sent, for those who play; none for the others."""
    steps = max([flow.interval(setup.config.algorithm) for flow in setup.algorithm.traffic], default=1)
    sizes = np.zeros(setup.population, dtype=np.int64)
    sizes[: _players(setup)] = setup.config.batch_size * steps
    source = setup.dataset.train
    order = (source.longest + np.arange(sizes.sum(), dtype=np.int64)) % len(source.labels)
    return Partition(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _players(setup: Setup) -> int:
    return min(setup.population, max(_CLIENTS, len(setup.blueprint.variants)))


def _shapes(some: list[FieldShapes], others: list[FieldShapes]) -> tuple[Shapes, ...]:
    """From the messages of one kind with batches of either size: one set of shapes for each set of fields."""
    found: list[Shapes] = []
    for names in {frozenset(layout): None for layout in some}:
        one, other = ([layout for layout in each if frozenset(layout) == names] for each in (some, others))
        fields: dict[str, tuple[Kind, tuple[int | None, ...]]] = {}
        for name in names:
            layouts = [layout[name] for layout in (*one, *other)]
            if len({(kind, len(shape)) for kind, shape in layouts}) > 1:
                return ()
            sizes = zip(*(shape for _, shape in layouts), strict=True)
            fields[name] = (layouts[0][0], tuple(each[0] if len({*each}) == 1 else None for each in sizes))
        batches = [name for name, (_, shape) in fields.items() if shape[:1] == (None,)]
        if any(len({layout[name][1][0] for name in batches}) > 1 for layout in (*one, *other)):
            return ()  # fields of different batches, which `Shapes` does not describe
        found.append(Shapes(fields))
    return tuple(found)
