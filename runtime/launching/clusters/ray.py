"""`hydra/launcher=ray`: a Ray task for each job of the sweep, on a cluster that runs or on this machine alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.runtime.ground.ray_cluster import join_cluster
from cutlayer.runtime.launching.clusters.base import ClusterLauncher, Work

_GRACE_S = 45.0


class RayLauncher(ClusterLauncher):
    """Hands a sweep to Ray and waits for it; a task that Ray loses is one killed job, and no more."""

    name = "ray"
    extra = "ray"
    package = "ray"

    def run(self, work: Work, jobs: Mapping[int, Sequence[str]]) -> None:
        """Start or join Ray, and wait for the jobs; an interrupt stops those that run."""
        ray = self._connect()
        try:
            asked = {key: value for key, value in self._params["ray"]["remote"].items() if value is not None}
            task = ray.remote(**asked)(_work) if asked else ray.remote(_work)
            shared = ray.put(work)
            running = {task.remote(shared, overrides, number): number for number, overrides in jobs.items()}
            try:
                self._wait(ray, running, jobs)
            except KeyboardInterrupt:
                self._cancel(ray, running)
                raise
        finally:
            ray.shutdown()

    def _connect(self) -> Any:
        settings = dict(self._params["ray"]["init"])
        settings["address"] = settings.get("address") or os.environ.get("RAY_ADDRESS") or "local"
        return join_cluster("hydra/launcher=ray", "hydra.launcher.ray.init", settings)

    def _wait(self, ray: Any, running: dict[Any, int], jobs: Mapping[int, Sequence[str]]) -> None:
        """Wait until every task has ended; takes those that have out of `running`."""
        while running:
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ended)
            try:
                ray.get(ended)
            except Exception as error:  # of many classes: Ray gives a task's own errors a class made on the spot
                words = [line.strip() for line in str(error).splitlines() if line.strip()]
                # The last line of a task's traceback says what happened; of Ray's own messages the first does.
                reason = words[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0] if words else ""
                self.lost(number, jobs[number], f"Ray: {type(error).__name__}: {reason}")

    def _cancel(self, ray: Any, running: Mapping[Any, int]) -> None:
        """Interrupt the tasks, and give those that run the time to end well."""
        for task in running:
            ray.cancel(task, force=False)
        ray.wait(list(running), num_returns=len(running), timeout=_GRACE_S)
        self.mark_interrupted(list(running.values()))


def _work(work: Work, overrides: Sequence[str], number: int) -> None:
    work(overrides, number)
