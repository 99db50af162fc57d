"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.records.loggers import Logger, LoggerConfig, register

if TYPE_CHECKING:
    from cutlayer.runtime.records.history import RoundRecord


@register("tensorboard")
class TensorboardLogger(Logger):
    """Scalars by round, and the configuration as text, in `<run>/tensorboard`."""

    packages = ("tensorboard",)

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        """`flush_seconds`: how often pending events reach the disk."""

        name: str = "tensorboard"
        flush_seconds: int = 30

        def __post_init__(self) -> None:
            if self.flush_seconds < 1:
                raise ConfigError("flush_seconds", self.flush_seconds, "an integer >= 1")

    _writer: Any = None
    _text: str = ""

    def start(self, config: Mapping[str, Any]) -> None:
        self._text = json.dumps(config, indent=2, default=str)

    def log(self, record: RoundRecord) -> None:
        writer = self._writer if self._writer is not None else self._open(record.round)
        for name, value in record.scalars().items():
            writer.add_scalar(name, value, global_step=record.round)

    def _open(self, first: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Opened only now: `purge_step` makes TensorBoard drop what a killed run wrote past its last checkpoint.
        self._writer = SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=first if self.resumed else None,
            flush_secs=self.config.flush_seconds,
        )
        if not self.resumed:
            indented = "\n".join("    " + line for line in self._text.splitlines())
            self._writer.add_text("config", indented, global_step=0)
        return self._writer

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
