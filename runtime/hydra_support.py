"""What stands between Hydra and a run: friendlier command lines, run folders by resolver, errors in one line.

Importing this module registers the resolvers that `hydra_config/config.yaml` uses; the worker processes of a sweep
import it when they receive their first job, before they compose.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.config import NO_VALUE, ConfigError
from runtime.hydra_errors import CONFIG_DIR, CONFIG_NAME, check_choices, check_options, explain
from runtime.run_folder import RunFolder, find_unfinished, remove_empty, run_path, unique_name, what_differs

if TYPE_CHECKING:
    from runtime.settings import RunConfig

log = logging.getLogger(__name__)

_PARTS = r"model\.(?:client|server|auxiliary)"
# Mappings that take any key: which ones are right depends on a name in them, and the typed configuration checks it.
_BELOW_OPEN = re.compile(rf"(?:(?:{_PARTS}\.)?(?:optimizer|scheduler)|(?:model|dataset)\.options)\.[^=]+=")
_SHORTHANDS = {
    re.compile(r"^(model\.auxiliary)=(?=[^{])"): "size",
    re.compile(rf"^({_PARTS}\.(?:optimizer|scheduler))=(?=[^{{])"): "name",
}
_JOBS_FILE = "jobs.txt"
_FULL_ERROR, _TRACEBACKS = "HYDRA_FULL_ERROR", "CUTLAYER_TRACEBACKS"
_MAX_JOBS = 8


# ---------------------------------------------------------------------- the command line


def preprocess(arguments: Iterable[str]) -> list[str]:
    """The command line as Hydra wants it.

    Keys below open mappings get Hydra's `++` (optimizer.momentum=0.9), and `model.auxiliary=linear` becomes
    `model.auxiliary.size=linear`, likewise `model.client.optimizer=sgd` its name. Values, sweeps too, stay as they are.

    Raises:
        ConfigError: a group set to null.
    """
    # argparse itself refuses settings on both sides of an option: `main.py seed=1 -m lr=0.1,0.2`.
    arguments = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    check_choices(arguments)
    return [_preprocess(argument) for argument in arguments]


def _preprocess(argument: str) -> str:
    for pattern, field in _SHORTHANDS.items():
        argument = pattern.sub(rf"\1.{field}=", argument)
    key, equals, value = argument.partition("=")
    # The folder of a run has = and , in its name, which Hydra reads as its own signs unless they are quoted.
    if equals and re.search(r"[=,]", value) and os.path.exists(value):
        argument = f"{key}='{value}'"
    return f"++{argument}" if _BELOW_OPEN.match(argument) else argument


def plain_values(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration, without Hydra's own part, as resolved plain containers."""
    values: dict[str, Any] = {}
    for key in composed:
        if key != "hydra":
            value = composed[key]
            is_node = OmegaConf.is_config(value)
            values[str(key)] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if is_node else value
    return values


def run_config(composed: DictConfig) -> "RunConfig":
    """The typed configuration of what Hydra composed; ConfigError if it is not valid."""
    from runtime.settings import RunConfig  # imports torch, which a mistake in a key need not wait for

    return RunConfig.from_mapping(plain_values(composed))


def load_config(overrides: Sequence[str] = ()) -> "RunConfig":
    """The configuration that `python main.py <overrides>` would run.

    Raises:
        ConfigError: any mistake, of the kinds that Hydra reports too.
    """
    prepared = preprocess(overrides)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            composed = compose(CONFIG_NAME, overrides=prepared)
        return run_config(composed)
    except Exception as error:
        line = explain(error, prepared)
        if line is None or isinstance(error, ConfigError):
            raise
        key, _, reason = line.partition(": ")
        raise ConfigError(key, NO_VALUE, reason) from error


# ---------------------------------------------------------------------- resolvers

_chosen: dict[str, str] = {}


def _run_folder(save_dir: str, algorithm: str, model: str, data: str, differs: str, unique: str, *, _root_: Any) -> str:
    """The run's folder: an unfinished one to continue, or else a new one. Makes nothing."""
    new = run_path(save_dir, (algorithm, model, data, differs), unique)
    # Once the folder is claimed it is no longer free, and yet must stay this job's answer. `unique` names the job.
    if str(new) not in _chosen:
        _chosen[str(new)] = str(_to_continue(_root_, new.parent.parent) or new)
    return _chosen[str(new)]


def _to_continue(root: DictConfig, above: Path) -> Path | None:
    try:
        resume = str(root.resume)
        if resume == "never":
            return None
        if resume != "auto":
            return Path(resume).absolute() if Path(resume).is_dir() else None
        return find_unfinished(above, run_config(root).identity())
    except (ConfigError, OmegaConfBaseException):
        return None  # the job itself reports it, once it runs


def _what_differs(*, _root_: Any) -> str:
    return what_differs(_root_.lr, _root_.seed, list(_root_.hydra.overrides.task))


def _parallel_jobs() -> int:
    """Jobs of a sweep at a time: one a GPU, or half as many as cores (two at least, if there are two) up to 8."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return gpus or min(_MAX_JOBS, max(cores // 2, min(cores, 2)))


_sweeps: set[Path] = set()


def _sweep_folder(save_dir: str, unique: str) -> str:
    """The folder of the sweep's own files, noted so that `launch` can clear up after a sweep that cannot start."""
    path = Path(save_dir).absolute() / "multirun" / unique
    _sweeps.add(path)
    return str(path)


def _unique(_kind: str) -> str:
    return unique_name()


def register_resolvers() -> None:
    """Make the resolvers of `hydra_config/config.yaml` known to OmegaConf."""
    # Cached: one value for each composed configuration, which is one for each job.
    OmegaConf.register_new_resolver("unique", _unique, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("what_differs", _what_differs, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("parallel_jobs", _parallel_jobs, replace=True)


register_resolvers()


# ---------------------------------------------------------------------- one job


class JobFailed(Exception):
    """A job of a sweep has failed and said why; `sweep` is the folder that lists all of its jobs."""

    def __init__(self, reason: str, sweep: str) -> None:
        super().__init__(reason, sweep)
        self.sweep = Path(sweep)


class Job:
    """One run of the program, or one job of a sweep, as Hydra started it.

    As a context manager it turns what goes wrong into one line and an exit status, and leaves no empty folder.
    """

    def __init__(self, composed: DictConfig) -> None:
        hydra = HydraConfig.get()
        self._composed = composed
        self._wished = Path(hydra.runtime.output_dir)
        self._save_dir = Path(str(composed.save_dir)).absolute()
        self._overrides = [str(override) for override in hydra.overrides.task]
        self._sweep = str(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
        self._number = int(hydra.job.num) if self._sweep else 0
        self._folder: Path | None = None

    def config(self) -> "RunConfig":
        """The typed configuration, checked against this machine too."""
        config = run_config(self._composed)
        if self._sweep:
            self._take_place()
        config.torch_device()
        from runtime.loggers import check_loggers

        check_loggers(config.logger)
        return config

    def _take_place(self) -> None:
        """Give this job of a sweep its GPU: `device=auto` and `device=cuda` then mean that one."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(self._number % torch.cuda.device_count())
            log.info("job %d: GPU %d", self._number, torch.cuda.current_device())
        else:
            log.info("job %d: %d threads", self._number, torch.get_num_threads())

    @contextlib.contextmanager
    def claim(self, config: "RunConfig") -> Generator[RunFolder]:
        """Own the run's folder, and log to `run.log` in it, for the length of the block."""
        identity = config.identity()
        if config.resume in ("auto", "never"):
            folder = RunFolder.claim(self._wished, identity, save_dir=self._save_dir)
        else:
            folder = RunFolder.continue_at(Path(config.resume).absolute(), identity, save_dir=self._save_dir)
        self._folder = folder.path
        with folder, _log_to(folder.path / "run.log"):
            yield folder

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if str(self._composed.resume) in ("auto", "never"):  # else the folder is the user's own
            remove_empty(self._wished, self._save_dir)
        if error is None:
            self._note(f"finished {self._folder}")
        elif isinstance(error, KeyboardInterrupt):
            where = f": {os.path.relpath(self._folder)}" if self._folder else ""
            _complain(f"interrupted; the same command goes on from the last checkpoint (resume=auto){where}")
            if not self._sweep:
                sys.exit(130)
        elif isinstance(error, Exception) and (self._sweep or not _wants_tracebacks()):
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        reason = explain(error, self._overrides)
        if reason is None or _wants_tracebacks():
            traceback.print_exception(error)
            reason = reason or " ".join(f"{type(error).__name__}: {error}".split())
        elif not self._sweep:
            _complain(reason)
        if self._sweep is None:
            sys.exit(1)
        self._note(f"failed   {' '.join(self._overrides)}: {reason}")
        _complain(f"job {self._number} failed: {reason}")
        raise JobFailed(reason, self._sweep) from None

    def _note(self, text: str) -> None:
        """One line about this job in the sweep's list; jobs in several processes append to it."""
        if self._sweep:
            with open(Path(self._sweep) / _JOBS_FILE, "a", encoding="utf-8") as file:
                file.write(f"{self._number}\t{text}\n")


@contextlib.contextmanager
def _log_to(path: Path) -> Generator[None]:
    stream = open(path, "a", encoding="utf-8")  # noqa: SIM115
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        if not isinstance(error, ConfigError):
            stream.write(traceback.format_exc())
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
        stream.close()


def _wants_tracebacks() -> bool:
    return os.environ.get(_TRACEBACKS) == "1"


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- the program


def launch(main: Callable[[], Any]) -> None:
    """Call a Hydra main function with this process's command line, and leave with its exit status.

    0: all well. 1: a mistake in the configuration, told in one line, or a failed job. 130: interrupted.
    HYDRA_FULL_ERROR=1 shows tracebacks instead of lines.
    """
    # Hydra prints errors in its own way unless this is set; jobs in other processes learn from the second one.
    os.environ[_TRACEBACKS] = os.environ.get(_FULL_ERROR, "0")
    os.environ[_FULL_ERROR] = "1"
    try:
        check_options(sys.argv[1:], [name for name in get_args_parser()._option_string_actions if name[1] == "-"])
        sys.argv[1:] = preprocess(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on with what is unfinished (resume=auto)")
        sys.exit(130)
    except JobFailed as error:
        _list_failures(error.sweep)
        sys.exit(1)
    except Exception as error:
        line = None if _wants_tracebacks() else explain(error, sys.argv[1:])
        if line is None:
            raise
        _complain(line)
        for sweep in _sweeps:
            if not (sweep / _JOBS_FILE).exists():
                _drop_sweep(sweep)
        sys.exit(1)


def _list_failures(sweep: Path) -> None:
    """Say at the end of a sweep which jobs failed; drop the sweep's folder if none of them left anything."""
    jobs = (sweep / _JOBS_FILE).read_text(encoding="utf-8").splitlines()
    failed = [line.split("\tfailed   ", 1)[1] for line in jobs if "\tfailed   " in line]
    _complain(f"{len(failed)} of {len(jobs)} jobs failed:")
    for line in failed:
        _complain(f"  {line}")
    if len(failed) == len(jobs):
        _drop_sweep(sweep)


def _drop_sweep(sweep: Path) -> None:
    shutil.rmtree(sweep, ignore_errors=True)
    remove_empty(sweep, sweep.parent.parent)
