"""A whole run: the round loop, its checkpoints and everything that it leaves in its folder."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator
from pathlib import Path

import torch

from cutlayer.datasets.partition_files import save_partition
from cutlayer.plotting import first_picture
from cutlayer.runtime.after import probe
from cutlayer.runtime.after.personalize import Personalized, own_tests, personalize, tunable
from cutlayer.runtime.evaluation.features import feature_parts
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import MODEL_FILE, make_folder
from cutlayer.runtime.ground.process import prepare_process, set_threads
from cutlayer.runtime.ground.serial import save_tensors
from cutlayer.runtime.network.server.status import is_told
from cutlayer.runtime.network.server.status_file import StatusFile, announce
from cutlayer.runtime.records.console import Progress, RunFiles, show_summary
from cutlayer.runtime.records.data_record import record_data
from cutlayer.runtime.records.loggers import build_loggers
from cutlayer.runtime.records.results import Results, RunSummary
from cutlayer.runtime.records.run_folder import RunFolder
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import LocalTransport

log = logging.getLogger(__name__)


def run(config: RunConfig, folder: RunFolder) -> RunSummary:
    """Run an experiment to its end, in a folder that this process owns; go on from a checkpoint if there is one.

    Raises:
        ConfigError: what cannot be built as configured.
    """
    if config.role == "server":
        announce(folder.path, config)
    prepare_process(config.torch_device())
    federation = Federation(config, folder.path)
    set_threads(config.threads, federation.device, federation.parameters)
    if config.personalize.part is not None:  # a model that cannot be divided is a mistake before training, not after
        tunable(federation, config.personalize.part)
        own_tests(federation)
    if config.probe.after:
        feature_parts(federation)
    if config.role == "server":
        _check_after(federation)
    loggers = build_loggers(config.logger, folder.path, folder.resumed)
    results = Results(folder.path, loggers, by_client=config.communication_by == "client")
    if federation.resume(results.restore) is not None:
        log.info("resumed after round %d", federation.round)
    results.start(config.to_mapping())
    record_data(folder.path, federation.dataset.facts)
    _save_partition(federation, folder.path)
    federation.tell_idle()
    log.info("%s on %s, %d threads, in %s", config.title, federation.device, torch.get_num_threads(), folder.path)
    try:
        with (
            _connected(federation, folder, results.summary().final_acc),
            Progress(config.rounds, config.title, config.progress, done=federation.round) as progress,
        ):
            _rounds(federation, results, progress)
            personal = _personalized(federation, folder.path, progress)
            probed = _probed(federation, folder.path, progress)
    except BaseException:
        results.close()
        raise
    model = federation.full_model()
    if model is not None:
        save_tensors(folder.path / MODEL_FILE, model, {"format": "pt"})
    summary = results.finish()
    picture = first_picture(folder.path, results.results(), config.title, config.algorithm_name)
    files = RunFiles(folder.path, picture)
    sections = [found.section() for found in (personal, probed) if found is not None]
    show_summary(summary, files, config.title, config.progress, sections=sections)
    return summary


def _personalized(federation: Federation, folder: Path, progress: Progress) -> Personalized | None:
    config = federation.config.personalize
    if config.part is None:
        return None
    log.info("personalising: %d clients, %s", federation.population, config.setting)
    return personalize(federation, config, folder, progress.clients)


def _probed(federation: Federation, folder: Path, progress: Progress) -> probe.Probed | None:
    config = federation.config.probe
    return probe.probe(federation, config, folder, progress.doing) if config.after else None


def _rounds(federation: Federation, results: Results, progress: Progress) -> None:
    while not federation.done:
        record, traffic = federation.step()
        start = time.perf_counter()
        results.record(record, traffic)
        progress.update(record)
        if record.train_loss is not None and record.train_loss != record.train_loss:
            raise ConfigError(
                "lr", federation.config.lr, f"a rate that converges: the loss is NaN in round {record.round}"
            )
        if federation.done or federation.round % federation.config.checkpoint_interval == 0:
            federation.checkpoint(results.state())
        federation.seconds["wall"] += time.perf_counter() - start


def _check_after(federation: Federation) -> None:
    """Raise ConfigError for what cannot be measured after training where clients are elsewhere."""
    config, where = (
        federation.config,
        "with transport=grpc, where clients keep their data and their parts for themselves",
    )
    if config.personalize.part is not None:
        raise ConfigError("personalize.part", config.personalize.part, f"null {where}")
    if config.probe.after and federation.personal:
        raise ConfigError("probe.after", True, f"false {where}")


@contextlib.contextmanager
def _connected(federation: Federation, folder: RunFolder, accuracy: float | None) -> Generator[None]:
    """With a transport to clients elsewhere: they can join within the block."""
    transport = federation.config.transport
    if isinstance(transport, LocalTransport):
        yield
        return
    from cutlayer.runtime.network.server.remote_clients import RemoteClients  # late: it needs an extra

    told, over = is_told(folder.path), federation.done
    clients = RemoteClients(federation, transport, folder.path.name, folder.path)
    federation.clients = clients
    log.info("listening on %s port %d for %d clients", transport.host, clients.hub.port, federation.population)
    with StatusFile(folder.path, federation, clients, accuracy):
        try:
            yield
        except BaseException:
            clients.hub.close("the server has stopped", later=True)
            raise
        try:
            if not (over and told):
                clients.see_off(everyone=over)
        finally:
            clients.hub.close("the run is over")


def _save_partition(federation: Federation, folder: Path) -> None:
    if not federation.config.dataset.divided:
        return
    info, labels = federation.dataset.info, federation.dataset.train.labels
    save_partition(folder, federation.partition, labels, info.classes, info.class_names)
    if federation.evaluator.local_test is not None:
        make_folder(folder, folder / "local_test")
        test = federation.dataset.test.labels
        save_partition(folder / "local_test", federation.evaluator.local_test, test, info.classes, info.class_names)
