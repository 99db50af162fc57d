"""What parties log in a round: means that are read at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from cutlayer.runtime.ground.devices import read_numbers


class Means(Mapping[str, float]):
    """Running means of logged values, by name; tensors stay on their device until a mean is read.

    Attributes:
        sums: by name, of what was logged. counts: how often.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def log(self, name: str, value: Tensor | float) -> None:
        """Take one value into the mean of ``name``."""
        value = value.detach() if isinstance(value, Tensor) else float(value)
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def __getitem__(self, name: str) -> float:
        return float(self.sums[name]) / self.counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def read(self) -> dict[str, float]:
        """All means so far."""
        (found,) = read_together([self])
        return found


def read_together(several: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """All that these say, of a GPU waited for once."""
    sums = [each.sums if isinstance(each, Means) else each for each in several]
    read = iter(read_numbers([value for each in sums for value in each.values()]))
    totals = [{name: next(read) for name in each} for each in sums]
    return [
        {name: total / means.counts[name] for name, total in each.items()} if isinstance(means, Means) else each
        for means, each in zip(several, totals, strict=True)
    ]
