"""A whole run: the round loop, its checkpoints and everything that it leaves in its folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.datasets.partition_files import save_partition
from cutlayer.models.folding import save_folded
from cutlayer.models.lora import frozen_adapters, is_below, save_adapters
from cutlayer.models.part_registry import WHOLE
from cutlayer.models.pretrained import save_config
from cutlayer.plotting import first_picture
from cutlayer.runtime.after.generate import Generated, check_generation, generate, settled
from cutlayer.runtime.after.personalize import Personalized, personalize
from cutlayer.runtime.after.probe import Probed, feature_parts, probe
from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import ADAPTERS, BEST_MODEL_FILE, FOLDED, MODEL_FILE, make_folder
from cutlayer.runtime.ground.memory import memory_told
from cutlayer.runtime.ground.process import prepare_process, set_threads
from cutlayer.runtime.ground.serial import save_tensors
from cutlayer.runtime.messages.ledger import Traffic
from cutlayer.runtime.records.console import Progress, RunFiles, show_summary
from cutlayer.runtime.records.data_record import record_data
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.records.loggers import build_loggers
from cutlayer.runtime.records.results import Results, RunSummary
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.place import ClientsPlace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import tunable
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import LocalTransport
from cutlayer.runtime.workers.place import local_place

log = logging.getLogger(__name__)


def _place(config: RunConfig, folder: RunFolder) -> ClientsPlace:
    if isinstance(config.transport, LocalTransport):
        return local_place(config)
    from cutlayer.runtime.network.server.elsewhere import Elsewhere  # late: it needs an extra

    return Elsewhere(config, folder)


@memory_told()
def run(config: RunConfig, folder: RunFolder, drawn: Path | None = None) -> RunSummary:
    """Run an experiment to its end, in a folder that this process owns; resume from a checkpoint if there is one.

    Args:
        drawn: a folder of pictures that it may have in common with other runs, see ``save_partition``.

    Raises:
        ConfigError: what cannot be built as configured.
    """
    place = _place(config, folder)
    prepare_process(config.torch_device(), config.arithmetic)
    chosen, dataset = prepared(config)
    federation = Federation(chosen, folder.path, dataset=dataset, clients=place.clients)
    set_threads(config.threads, federation.setup.device, federation.setup.parameters, place.processes)
    _check_after(federation)
    place.check(federation.setup)
    results = _begin(config, folder, federation, drawn)
    try:
        with (
            place.connected(federation, results.summary().final_acc),
            Progress(config.rounds, config.title, config.progress, done=federation.round) as progress,
        ):
            while not federation.done:
                _take_in(*federation.step(), federation, results, progress)
            personal = _personalized(federation, folder.path, progress)
            probed = _probed(federation, folder.path, progress)
            generated = _generated(federation, folder.path, progress)
    except BaseException:
        results.close()
        raise
    model = federation.full_model()
    if model is not None:
        save_tensors(folder.path / MODEL_FILE, model, {"format": "pt"})
        _save_beside(federation.setup, folder.path, model)
    if federation.best is not None:
        save_tensors(folder.path / BEST_MODEL_FILE, federation.best.whole(), {"format": "pt"})
    summary = results.finish()
    picture = first_picture(folder.path, results.results(), config.title, config.algorithm_name)
    files = RunFiles(folder.path, picture)
    sections = [found.section() for found in (personal, probed, generated) if found is not None]
    show_summary(summary, files, config.title, config.progress, sections=sections)
    return summary


def _save_beside(setup: Setup, folder: Path, model: Mapping[str, Tensor]) -> None:
    """Write what others read a language model by: adapters as PEFT does, what they went into, or a configuration."""
    config, info = setup.config.model, setup.dataset.info
    if not config.lora.r:
        if info.length and config.name.startswith("huggingface/"):
            save_config(folder, config.name.partition("/")[2], config.options, info, config.base)
        return
    parts = setup.blueprint.parts(setup.algorithm.layout.whole)
    if any(is_below(name) for name in model):
        parts[WHOLE].load_state_dict(model)
        if hasattr(parts[WHOLE], "save_pretrained"):
            save_folded(folder / FOLDED, parts[WHOLE])
    else:
        frozen = {name: tensor for part in parts.values() for name, tensor in frozen_adapters(part).items()}
        (folder / ADAPTERS).mkdir(exist_ok=True)
        save_adapters(folder / ADAPTERS, {**frozen, **model}, config.lora, config.base)


def _check_after(federation: Federation) -> None:
    """Raise ConfigError for what cannot be measured of this model: a mistake before training, not after."""
    config = federation.setup.config
    if config.personalize.part is not None:
        tunable(federation.setup, config.personalize)
        federation.evaluator.own_tests()
    if config.probe.after:
        feature_parts(federation)
    if config.generate.after:
        check_generation(federation, config.generate)


def _begin(config: RunConfig, folder: RunFolder, federation: Federation, drawn: Path | None) -> Results:
    """Write what a run's folder has from its beginning, or go on with it."""
    loggers = build_loggers(config.logger, folder.path, folder.resumed)
    results = Results(folder.path, loggers, by_client=config.communication_by == "client")
    if federation.resume(results.restore, recorded=folder.identities) is not None:
        log.info("resumed after round %d", federation.round)
    results.start(config.to_mapping(), config.setting())
    setup = federation.setup
    record_data(folder.path, setup.dataset.facts)
    _save_partition(federation, folder.path, drawn)
    setup.report_idle()
    log.info("%s on %s, %d threads, in %s", config.title, setup.device, torch.get_num_threads(), folder.path)
    return results


def _take_in(
    record: RoundRecord, traffic: list[Traffic], federation: Federation, results: Results, progress: Progress
) -> None:
    """Record a round, show it, and write a checkpoint if it is time to."""
    start, config = time.perf_counter(), federation.setup.config
    results.record(record, traffic)
    progress.update(record)
    if record.train_loss is not None and record.train_loss != record.train_loss:
        raise ConfigError("lr", config.lr, f"a rate that converges: the loss is NaN in round {record.round}")
    if federation.done or federation.round % config.checkpoint_interval == 0:
        federation.checkpoint(results.state())
    federation.seconds["wall"] += time.perf_counter() - start


def _personalized(federation: Federation, folder: Path, progress: Progress) -> Personalized | None:
    config = federation.setup.config.personalize
    if config.part is None:
        return None
    log.info("personalising: %d clients, %s", federation.setup.population, config.setting)
    return personalize(federation, config, folder, progress.clients)


def _probed(federation: Federation, folder: Path, progress: Progress) -> Probed | None:
    config = federation.setup.config.probe
    return probe(federation, config, folder, progress.doing) if config.after else None


def _generated(federation: Federation, folder: Path, progress: Progress) -> Generated | None:
    config = federation.setup.config
    return generate(federation, settled(config), folder, progress.doing) if config.generate.after else None


def _save_partition(federation: Federation, folder: Path, drawn: Path | None) -> None:
    setup, local_test = federation.setup, federation.evaluator.local_test
    if not setup.config.dataset.divided:
        return
    info, labels = setup.dataset.info, setup.dataset.train.labels
    save_partition(folder, setup.partition, labels, info.classes, info.class_names, drawn)
    if local_test is not None:
        make_folder(folder, folder / "local_test")
        labels = setup.dataset.test.labels
        save_partition(folder / "local_test", local_test, labels, info.classes, info.class_names, drawn)
