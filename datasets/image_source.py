"""A set of labelled images that gives out ready batches on the device."""

import copy
import math
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.datasets.augment import Augmentation
from cutlayer.datasets.images import EncodedImages
from cutlayer.datasets.normalize import Normalizer
from cutlayer.datasets.source import Source
from cutlayer.runtime.ground.devices import moved

# Whole batches are gathered and normalised together up to this many values: small batches then cost little more than
# a slice, and the working set (4 MiB in float32) still fits a cache.
CHUNK_VALUES = 1 << 20
_PREFETCH = 2


class ImageStore(Protocol):
    """Where the images are."""

    shape: tuple[int, int, int]

    def chunks(self, pieces: Sequence[Tensor], boxes: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """For each piece (int64 [k] of indices, CPU): uint8 [k, channels, height, width] on the device.

        Args:
            boxes: where images are cut out of whole pictures, what `random_boxes` takes for each piece.
        """
        ...


class ResidentStore:
    """All images as uint8 on the device."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images.to(device)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def chunks(self, pieces: Sequence[Tensor], boxes: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """Gather each piece on the device."""
        assert boxes is None, "whole pictures are of different sizes"
        for piece in pieces:
            yield self._images.index_select(0, moved(piece, self._images.device))


class StreamStore:
    """Images that stay in files or in CPU memory and are read by a pool of threads, two chunks ahead.

    Decoding releases the interpreter's lock, so threads suffice. Each chunk is divided among all workers.

    Args:
        images: encoded files, or uint8 [n, channels, height, width] on the CPU.
        workers: threads; 0 reads in the caller's thread.
        area: of the boxes that are cut out of whole pictures, as of `random_boxes`; None where none are.
    """

    def __init__(
        self,
        images: EncodedImages | Tensor,
        device: torch.device,
        workers: int,
        area: tuple[float, float] | None = None,
    ) -> None:
        self._images, self._device, self._workers, self._area = images, device, workers, area
        channels, height, width = images.shape[-3:]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # threads are of one process

    def chunks(self, pieces: Sequence[Tensor], boxes: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """Read the pieces in order; what was asked for ahead is cancelled when the caller stops early."""
        pending: deque[tuple[Tensor, list[Future[None]]]] = deque()
        try:
            for piece, cut in zip(pieces, boxes or repeat(None), strict=boxes is not None):
                pending.append(self._start(piece, cut))
                if len(pending) > _PREFETCH:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        finally:
            for _, jobs in pending:
                for job in jobs:
                    job.cancel()

    def _start(self, piece: Tensor, boxes: Tensor | None) -> tuple[Tensor, list["Future[None]"]]:
        out = torch.empty((len(piece), *self.shape), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        if self._workers == 0:
            self._read(out, piece, boxes)
            return out, []
        pool = self._threads()
        parts = max(1, min(self._workers, len(piece)))
        cuts = repeat(None, parts) if boxes is None else boxes.tensor_split(parts)
        shares = zip(out.tensor_split(parts), piece.tensor_split(parts), cuts, strict=True)
        return out, [pool.submit(self._read, *share) for share in shares]

    def _finish(self, out: Tensor, jobs: list["Future[None]"]) -> Tensor:
        for job in jobs:
            job.result()
        return out.to(self._device, non_blocking=True)

    def _read(self, out: Tensor, piece: Tensor, boxes: Tensor | None) -> None:
        if isinstance(self._images, EncodedImages):
            if boxes is None:
                self._images.decode_into(out.numpy(), piece.numpy())
            else:
                assert self._area is not None
                self._images.crop_into(out.numpy(), piece.numpy(), boxes, self._area)
        else:
            torch.index_select(self._images, 0, piece, out=out)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="images")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        return self._pool


class ImageSource(Source):
    """Labelled images, addressed by index; batches come ready on the device, x [b, channels, height, width].

    Attributes:
        labels, groups: see `Source`.
        targets: [n, ...] on the CPU, what a model is to give: the labels unless the data say otherwise.
        shape: (channels, height, width) of an image in a batch.
        mean, std: what images are normalised by, per channel in 0..1.

    Args:
        resize: height and width of the images in a batch; None leaves the stored ones as they are.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: Tensor,
        normalizer: Normalizer,
        augmentation: Augmentation | None,
        device: torch.device,
        resize: int | None = None,
        groups: np.ndarray | None = None,
        targets: Tensor | None = None,
    ) -> None:
        channels, height, width = store.shape
        super().__init__(labels, groups, device)
        self.targets = labels if targets is None else targets
        self._size = (
            None if resize in (None, height) and resize in (None, width) else [resize or height, resize or width]
        )
        self.shape = (channels, *(self._size or (height, width)))
        self._values = max(math.prod(store.shape), math.prod(self.shape))
        self.mean, self.std = normalizer.mean, normalizer.std
        self._store, self._normalizer, self._augmentation = store, normalizer, augmentation
        self._format = torch.preserve_format

    def repeated(self, channels: int) -> Self:
        """The same images with their one channel given `channels` times, in the memory of one."""
        twin = copy.copy(self)
        twin.shape = (channels, *self.shape[1:])
        return twin

    def in_format(self, memory_format: torch.memory_format) -> Self:
        """The same images, in batches whose values lie in another order in memory."""
        twin = copy.copy(self)
        twin._format = memory_format
        return twin

    def pixels(self, x: Tensor) -> Tensor:
        """Images of a batch before they were normalised: [b, channels, height, width] -> the same with values 0..1."""
        constants = (torch.tensor(values, dtype=x.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        mean, std = (moved(each, x.device) for each in constants)
        return (x * std + mean).clamp(0, 1)

    @property
    def _augmented(self) -> bool:
        return self._augmentation is not None

    def draw(self, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of the configured augmentation for `samples` images, CPU, [samples, ...] each; none without one.

        Args:
            generator: a CPU generator.
        """
        if self._augmentation is None:
            return {}
        return dict(self._augmentation.draw((samples, *self._store.shape[1:]), generator))

    def take(self, order: Tensor, params: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, ...]:
        """The images at `order`, read once and made a finished batch in several ways.

        Those that are cut out of whole pictures are read for each way.

        On a processor an image comes out the same to the bit whichever others are taken with it.

        Args:
            order: int64 [k], CPU.
            params: for each batch what `draw` gave for k samples, in one call or in several that are concatenated by
                name; an empty mapping leaves the images as they are.

        Returns:
            For each of `params` [k, channels, height, width] of the source's dtype, on the device.

        Raises:
            ValueError: there are parameters and no augmentation that they could be of.
        """
        if self._augmentation is None and any(params):
            raise ValueError("parameters of an augmentation, but this source has none")
        if self._augmentation is not None and self._augmentation.area is not None:
            read = [next(self._chunks([order], one)) for one in params]
        else:
            read = [*self._store.chunks([order])] * len(params)
        return tuple(self._finished(x, self._moved(one)) for x, one in zip(read, params, strict=True))

    def _chunks(self, pieces: Sequence[Tensor], params: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The pieces as they are stored or, as the parameters say, cut out of the whole pictures."""
        if not params or self._augmentation is None or self._augmentation.area is None:
            return self._store.chunks(pieces)
        return self._store.chunks(pieces, params["uniform"].split([len(piece) for piece in pieces]))

    def _moved(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: moved(value, self._device) for name, value in params.items()}

    def _epoch(self, order: Tensor, sizes: list[int], params: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        targets = moved(self.targets[order], self._device)
        batches_per_chunk = max(1, CHUNK_VALUES // (sizes[0] * self._values)) if sizes else 1
        groups = [sizes[i : i + batches_per_chunk] for i in range(0, len(sizes), batches_per_chunk)]
        lengths = [sum(group) for group in groups]
        start = 0
        pieces, on_device = order.split(lengths), self._moved(params)
        for x, group, length in zip(self._chunks(pieces, params), groups, lengths, strict=True):
            stop = start + length
            own = {name: value[start:stop] for name, value in on_device.items()}
            yield from zip(self._finished(x, own).split(group), targets[start:stop].split(group), strict=True)
            start = stop

    def _finished(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Pixels [k, ...] of the stored shape as the images that batches have; augmented where there are `params`."""
        if params and self._augmentation is not None:
            x = self._augmentation.apply(x, params)
        x = self._normalizer(x)
        if self._size is not None:
            x = functional.interpolate(x, self._size, mode="bilinear", antialias=True)
        x = x if x.shape[1] == self.shape[0] else x.expand(-1, self.shape[0], -1, -1)
        # Images of one channel repeated stay a view of it, in the memory of one.
        return x if self._format == torch.preserve_format else x.contiguous(memory_format=self._format)
