"""Weights & Biases."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cutlayer.runtime.records.loggers import Logger, LoggerConfig, register

if TYPE_CHECKING:
    from cutlayer.runtime.records.history import RoundRecord


@register("wandb")
class WandbLogger(Logger):
    """A Weights & Biases run, offline by default: files in `<run>/wandb`, uploaded only by `wandb sync` by hand.

    A resumed offline run makes a second folder with the same run id; `wandb sync --append` joins them.
    """

    packages = ("wandb",)

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        """`mode`: offline, or online (needs a login of yours); `group` and `tags` sort runs."""

        name: str = "wandb"
        project: str = "cutlayer"
        mode: Literal["offline", "online"] = "offline"
        group: str | None = None
        tags: tuple[str, ...] = ()

    _run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = importlib.import_module("wandb")
        note = self.folder / "wandb" / "run_id"
        note.parent.mkdir(parents=True, exist_ok=True)
        if not (self.resumed and note.exists()):
            note.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=self.config.project,
            mode=self.config.mode,
            group=self.config.group,
            tags=list(self.config.tags),
            name=self.folder.name,
            dir=str(self.folder),
            id=note.read_text().strip(),
            resume="allow" if self.config.mode == "online" else None,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def log(self, record: RoundRecord) -> None:
        self._run.log(record.scalars(), step=record.round)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
