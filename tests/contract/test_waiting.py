"""No method waits for a GPU within a round: what it would wait for there is found on a processor.

Tensors that would be on the GPU are followed through every operation, from parts, images and rows on; reading one, an
index of bools, or an index of the host is what waits.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cutlayer import algorithms
from cutlayer.runtime.ground import devices
from cutlayer.runtime.parties import contexts
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.session import ServerParty
from tests.contract.test_contract import quick

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Operations(TorchDispatchMode):
    def __init__(self, watch: "Watch") -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        name = func._overloadpacket.__name__
        if name in READS:
            self._watch.refuse(name, *given[:1])
        if name in INDEXED:
            indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
            if self._watch.there(args[0]):
                masks = [each for each in indices if each.dtype in (torch.bool, torch.uint8)]
                hosts = [each for each in indices if not self._watch.there(each, self._watch.made)]
                if masks or hosts:
                    self._watch.refuse("index", args[0])
        found = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        if any(self._watch.there(each) for each in given):
            self._watch.put(*made)
        elif not given and name in ("arange", "zeros", "ones", "full", "empty"):
            self._watch.remember(*made)
        return found


class _Functions(TorchFunctionMode):
    """Copies to the host, which on a processor are no operations."""

    def __init__(self, watch: "Watch") -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist) and self._watch.there(args[0]):
            self._watch.refuse(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


class Watch:
    """Which tensors would be on the GPU, by their storage."""

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.paused, self.ended = False, False
        self.seen = 0

    def put(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage  # held, so that no other one gets its place

    def remember(self, *tensors: Tensor) -> None:
        """What was made on a device that nobody can tell here."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.made |= {storage.data_ptr(): storage for storage in storages}

    def there(self, tensor: object, more: Mapping[int, Any] | None = None) -> bool:
        if not isinstance(tensor, Tensor):
            return False
        place = tensor.untyped_storage().data_ptr()
        return place in self._storages or place in (more or {})

    def refuse(self, what: str, *tensors: Tensor) -> None:
        if not self.paused and any(self.there(tensor) for tensor in tensors):
            raise AssertionError(f"{what} waits for a GPU")

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Functions(self), _Operations(self):
            yield


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, federation: Federation) -> Iterator[Watch]:
    """Take a round as one on a GPU, in which something is read at the end alone."""
    watch, moved, numbers, close = Watch(), devices.moved, devices.read_numbers, ServerParty.close_round

    def put(tensor: Tensor, device: torch.device) -> Tensor:
        twin = moved(tensor, device).clone()
        watch.put(twin)
        return twin

    def read(values: Any) -> list[float]:
        assert watch.ended or not values, "what was logged is read before the round's end"
        watch.paused, watch.seen = True, watch.seen + len(values)
        try:
            return numbers(values)
        finally:
            watch.paused = False

    def closing(party: ServerParty) -> None:
        close(party)
        watch.ended = True

    for module in [module for name, module in sys.modules.items() if name.startswith("cutlayer.")]:
        for name, other in {"moved": put, "queued": lambda device: True, "read_numbers": read}.items():
            if getattr(module, name, None) is getattr(devices, name) and module is not devices:
                monkeypatch.setattr(module, name, other)
    monkeypatch.setattr(ServerParty, "close_round", closing)
    _put_all(watch, federation)
    with watch.watching():
        yield watch


def _put_all(watch: Watch, federation: Federation) -> None:
    """What lies on the device before a round."""
    blueprint = federation.setup.blueprint
    for each in blueprint.variants:
        watch.put(*(tensor for state in each.initial.values() for tensor in state.values()))
        for part in each._parts.values():
            watch.put(*part.parameters(), *part.buffers())
    for part in federation.server.ctx.parts.values():
        watch.put(*part.parameters(), *part.buffers())
    for seat in getattr(federation.clients, "seats", ()):
        for part in seat.parts.values():
            watch.put(*part.parameters(), *part.buffers())
    source: Any = federation.setup.dataset.train
    watch.put(source._store._images)
    for value in vars(federation.server).values():  # control variates, a queue
        watch.put(*(each for each in tree_leaves(getattr(value, "keys", value)) if isinstance(each, Tensor)))


MORE = {
    "moco_sfl": ("dataset.augment=moco", "dataset.moco_blur=0.5"),
    "fl_moco": ("dataset.augment=moco", "dataset.moco_blur=0.5"),
    "fsl_sage": ("algorithm.align_interval=1",),
}


@pytest.mark.parametrize("name", algorithms.names())
def test_a_round_waits_for_no_device(configure, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    images = (
        "dataset=synthetic",
        "dataset.options.n_train=80",
        "dataset.options.channels=3",
        "dataset.options.height=8",
    )
    setting = (*quick(name), *images, "dataset.options.width=8", "dataset.augment=crop_flip", "batch_size=10")
    federation = Federation(configure(f"algorithm={name}", *setting, *MORE.get(name, ()), "num_clients=2", "rounds=3"))
    federation.step()  # rows of the clients are there now
    with watched(monkeypatch, federation) as watch:
        record, _ = federation.step()
    assert record.train_loss is not None or record.metrics
    assert watch.seen > 0, "losses are read at the end"


def test_a_cohort_computed_as_one_waits_for_no_device(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("algorithm.client_copy=shared", "optimizer=sgd", "model.client.optimizer.keep=round", "rounds=3")
    federation = Federation(configure("algorithm=moco_sfl", *keys, "batch_size=1", "dataset.augment=moco"))
    assert federation.clients.compute_together
    federation.step()
    with watched(monkeypatch, federation) as watch:
        federation.step()
    assert watch.seen > 0


@pytest.mark.parametrize(
    "waiting",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss),
        lambda loss: bool(loss > 0),
        lambda loss: loss.expand(3)[loss.expand(3) > 0],
        lambda loss: loss.expand(3)[torch.tensor([0, 1])],
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.detach().numpy(),
    ],
)
def test_what_waits_is_found(configure, monkeypatch: pytest.MonkeyPatch, waiting: Any) -> None:
    federation = Federation(configure("algorithm=fed_avg"))
    log = contexts.ClientContext.log

    def reading(ctx: Any, name: str, value: Any) -> None:
        waiting(value)
        log(ctx, name, value)

    monkeypatch.setattr(contexts.ClientContext, "log", reading)
    with pytest.raises(AssertionError, match="waits for a GPU"), watched(monkeypatch, federation):
        federation.step()
