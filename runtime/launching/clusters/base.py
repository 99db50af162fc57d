"""What the launchers have in common: how a job runs in a worker, and how one that the cluster lost is noted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.launching.sweeps.composing import compose_quickly
from cutlayer.runtime.launching.sweeps.sweep import ALIVE, JobFolder, read_progress


@dataclass
class Work:
    """What a worker needs to run any job of the sweep; pickled, and called there."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    singletons: dict[Any, Any]

    def __call__(self, overrides: Sequence[str], number: int) -> None:
        """Compose job `number` and run it; its folder in the sweep says how it ended."""
        os.chdir(str(self.config.hydra.runtime.cwd))  # relative paths mean what they meant on the command line
        Singleton.set_state(self.singletons)
        setup_globals()
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        result = run_job(
            hydra_context=self.context,
            config=config,
            task_function=self.task,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        _ = result.return_value  # raises what the job raised


class ClusterLauncher(Launcher):
    """A launcher whose jobs run on a cluster; `run` of a subclass brings all of them to their end.

    Attributes:
        name: as in `hydra/launcher=<name>`. extra: of pyproject.toml, if it needs one. package: that the extra brings.
    """

    name: str
    extra: str = ""
    package: str = ""

    def __init__(self, **params: Any) -> None:
        self._params: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in params.items()
        }
        self._sweep = Path()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives to every launcher.

        Raises:
            ConfigError: the package is not installed.
        """
        if self.package and importlib.util.find_spec(self.package) is None:
            advice = f"needs the extra: {install(self.extra)}"
            raise ConfigError(f"hydra/launcher={self.name}", NO_VALUE, advice)
        compose_quickly(hydra_context)
        self._work = Work(hydra_context, config, task_function, {})
        self._sweep = Path(str(config.hydra.sweep.dir)).absolute()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that this sweep has not done with, and wait until each has ended, however it did."""
        setup_globals()
        self._work.singletons = Singleton.get_state()
        numbered = {initial_job_idx + index: list(overrides) for index, overrides in enumerate(job_overrides)}
        left = {number: overrides for number, overrides in numbered.items() if not self.folder(number).read().is_done}
        if left:
            self._sweep.mkdir(parents=True, exist_ok=True)
            self.run(self._work, left)
        # How each job ended is in its folder; an error here would end the sweep.
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=self._accuracy(number)) for number in numbered]

    def _accuracy(self, number: int) -> float | None:
        folder = self.folder(number).read().folder
        return read_progress(Path(folder)).accuracy if folder else None

    def run(self, work: Work, jobs: Mapping[int, Sequence[str]]) -> None:
        """Run the jobs, given by number, and wait for them; on KeyboardInterrupt end them first."""
        raise NotImplementedError

    def folder(self, number: int) -> JobFolder:
        """Where the job's state lies."""
        return JobFolder(self._sweep / "jobs" / str(number))

    def lost(self, number: int, overrides: Sequence[str], why: str) -> None:
        """Note a job whose worker ended without a word from the job."""
        folder = self.folder(number)
        if not folder.read().is_done:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.update(state="killed", overrides=tuple(overrides), error=" ".join(why.split()))

    def mark_interrupted(self, numbers: Sequence[int]) -> None:
        """Note the jobs that were ended with the sweep and could not say so."""
        for number in numbers:
            if self.folder(number).read().state in ALIVE:
                self.folder(number).update(state="interrupted")
