"""Where Hydra looks for launchers: classes of a module of the package `hydra_plugins`, and nowhere else.

Hydra runs this module once more than Python does, so that what it defines has to be no more than names.
"""

from cutlayer.runtime.launching.clusters.ray import RayLauncher
from cutlayer.runtime.launching.clusters.slurm import SlurmLauncher
from cutlayer.runtime.launching.sweeps.composing import ParallelLauncher


class Parallel(ParallelLauncher):
    """`hydra/launcher=parallel`."""


class Ray(RayLauncher):
    """`hydra/launcher=ray`."""


class SubmititSlurm(SlurmLauncher):
    """`hydra/launcher=submitit_slurm`."""
