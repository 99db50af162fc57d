"""Run an experiment: `python main.py [key=value ...]`; `-m` runs one job for each combination of values.

Keys and their values are in `hydra_config/`; `python main.py --cfg job` prints what a command line comes to.
"""

import hydra
from omegaconf import DictConfig

from cutlayer.runtime.launching.launch import launch, start


@hydra.main(version_base=None, config_path="hydra_config", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One run, or one job of a sweep: composed configuration -> typed configuration -> run folder -> experiment.

    Gives a job's final accuracy, for sweepers that search for the best one.
    """
    return start(composed)


if __name__ == "__main__":
    launch(main)
