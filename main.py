"""Run an experiment: `python main.py [key=value ...]`; `-m` runs one job for each combination of values.

Keys and their values are in `hydra_config/`; `python main.py --cfg job` prints what a command line comes to.
"""

import hydra
from omegaconf import DictConfig

from runtime.hydra_support import Job, launch


@hydra.main(version_base=None, config_path="hydra_config", config_name="config")
def main(composed: DictConfig) -> None:
    """One job: composed configuration -> typed configuration -> run folder -> experiment."""
    with Job(composed) as job:
        config = job.config()
        with job.claim(config) as folder:
            from runtime.experiment import run  # late, so that --help and mistakes do not wait for it

            run(config, folder)


if __name__ == "__main__":
    launch(main)
