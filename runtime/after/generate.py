"""Text from a trained language model: a completion of each prompt of the test set, and what these are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cutlayer.datasets.registry import check_options
from cutlayer.datasets.tokenizer import BYTES
from cutlayer.models import build_model
from cutlayer.models.frozen import fill_whole, unshare
from cutlayer.models.generative import check_generative, generative
from cutlayer.models.pretrained import positions_of
from cutlayer.runtime.after.prompts import check_prompts, own_prompt, prompts_of, text_line, texts_of, tokenizer_of
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.files import GENERATED, SUMMARY, make_folder, replace_file
from cutlayer.runtime.ground.folders import nothing_left
from cutlayer.runtime.ground.reading import read_json
from cutlayer.runtime.ground.rng import TorchStream
from cutlayer.runtime.records.console import Section
from cutlayer.runtime.rounds.best import lacking
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.scoring.completing import GenerateConfig, completions
from cutlayer.runtime.settings import RunConfig
from cutlayer.text_metrics import check_metrics, score
from cutlayer.text_metrics.files import hypotheses_text, references_text

_SETTING = ("beams", "length_penalty", "no_repeat", "tokens", "start")
OUTPUTS, REFERENCES = "outputs.txt", "references.txt"

Shown = Callable[[str], None]
"""Gets what is being done, as a text."""


@dataclass(frozen=True)
class Generated:
    """What was generated, and how good it is.

    Attributes:
        metrics: figures by name, see `cutlayer.text_metrics`.
        prompts: how many texts there are, one for each. references: of all together.
        cut_references: of these lack their end, as they were longer than a sample may be.
        unfinished: texts that ``tokens``, or the model's positions, ended.
        mean_tokens: of a text. round: rounds that the model was trained for.
        beams, length_penalty, no_repeat, tokens, start: see `GenerateConfig`.
    """

    metrics: dict[str, float]
    prompts: int
    references: int
    cut_references: int
    unfinished: int
    mean_tokens: float
    round: int
    beams: int
    length_penalty: float
    no_repeat: int
    tokens: int
    start: str

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return {**vars(self), "finished": True}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Generated:
        """What ``to_json`` gave."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})

    def section(self) -> Section:
        """The figures, and how long the texts are."""
        cut = f", {self.cut_references:,} of them cut" if self.cut_references else ""
        rows = [("  prompts", f"{self.prompts:,}", f"{self.references:,} references{cut}")]
        rows.append(("  tokens a text", f"{self.mean_tokens:.1f}", f"{self.unfinished:,} texts reach the limit"))
        rows += [(f"  {name}", f"{value:.4f}", "") for name, value in self.metrics.items()]
        return Section("generated text", f"{self.beams} beams, length penalty {self.length_penalty:g}", rows)


def settled(config: RunConfig) -> GenerateConfig:
    """The setting of a run, with numbers for what follows from its tokenizer."""
    options = check_options(config.dataset.name, config.dataset.options)
    return config.generate.settled(getattr(options, "tokenizer", BYTES))


def check_generation(federation: Federation, config: GenerateConfig) -> None:
    """Look, before anything is computed, whether text can be generated and measured.

    Raises:
        ConfigError: the run has no language model, or none that transformers has; clients have models of their own;
            a metric lacks its package, or test texts have no prompts.
    """
    setup = federation.setup
    texts = texts_of(setup.dataset)
    check_generative(setup.config.model.name)
    if not federation.one_model:
        expected = "a method with one model for all clients; in this one each client has its own"
        raise ConfigError("algorithm.name", setup.config.algorithm_name, expected)
    if config.prompt is None:
        check_prompts(texts, setup.dataset.info.name)
        check_metrics(config.metrics)


def generated_folder(run: Path, config: GenerateConfig) -> Path:
    """Where a setting's texts lie in a run's folder; of a setting with numbers for what follows from the tokenizer."""
    return run / GENERATED / config.setting


def earlier_generation(run: Path, config: GenerateConfig) -> Generated | None:
    """What an earlier generation of the run by this setting found; None where none finished with these metrics."""
    try:
        content = read_json(run, str(generated_folder(run, config).relative_to(run) / SUMMARY))
        found = Generated.from_json(content)
        return found if content["finished"] and found.metrics.keys() >= {*config.metrics} else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def generate(federation: Federation, config: GenerateConfig, run: Path, shown: Shown = lambda _: None) -> Generated:
    """Complete the prompts of the test set and measure it; writes texts, references and ``summary.json`` to a folder.

    All appear when everything is done, the summary last; a failure leaves nothing. The same federation gives the same
    bits again.

    Args:
        config: see `settled`. run: the run's folder.

    Raises:
        ConfigError: as `check_generation`; a prompt has too many tokens, or no best weights were kept.
    """
    check_generation(federation, config)
    dataset = federation.setup.dataset
    prompts = prompts_of(dataset, config.prompts)
    tokens, texts = _completed(federation, config, prompts.tokens, shown)
    texts = [*map(text_line, texts)]
    shown("measuring texts")
    ended = [each[-1] == tokenizer_of(dataset).end for each in tokens]
    found = Generated(
        metrics=score(config.metrics, texts, prompts.references),
        prompts=len(texts),
        references=sum(map(len, prompts.references)),
        cut_references=prompts.cut,
        unfinished=len(ended) - sum(ended),
        mean_tokens=(sum(map(len, tokens)) - sum(ended)) / len(tokens),
        round=federation.best.round if config.start == "best" and federation.best else federation.round,
        **{name: getattr(config, name) for name in _SETTING},
    )
    contents = {OUTPUTS: hypotheses_text(texts), REFERENCES: references_text(prompts.references)}
    contents[SUMMARY] = json.dumps(found.to_json(), allow_nan=False) + "\n"
    _write(run, generated_folder(run, config), contents)
    return found


def continued(federation: Federation, config: GenerateConfig, text: str) -> str:
    """How the run's model goes on with a text.

    Raises:
        ConfigError: as `check_generation`; the text has too many tokens, or no best weights were kept.
    """
    check_generation(federation, config)
    return _completed(federation, config, [own_prompt(federation.setup.dataset, text)])[1][0]


def _completed(
    federation: Federation, config: GenerateConfig, prompts: Sequence[Sequence[int]], shown: Shown = lambda _: None
) -> tuple[list[list[int]], list[str]]:
    """What the run's model says after prompts, as tokens and as texts."""
    setup, tokenizer = federation.setup, tokenizer_of(federation.setup.dataset)
    model = generative(assemble(federation, config), setup.config.model, setup.dataset.info).to(setup.device)
    positions, longest = positions_of(model.config), max(map(len, prompts))
    if positions is not None and longest >= positions:
        expected = f"fewer tokens than the model has positions, {positions:,}; there is a prompt of {longest:,}"
        raise ConfigError("generate.prompt", NO_VALUE, expected)
    shown(f"generating {len(prompts):,} texts")
    with setup.blueprint.autocast():
        found = completions(
            model,
            prompts,
            config,
            end=tokenizer.end,
            positions=positions,
            shown=lambda done: shown(f"generated {done:,}/{len(prompts):,} texts"),
        )
    return found, [tokenizer.decode(each) for each in found]


def assemble(federation: Federation, config: GenerateConfig) -> nn.Module:
    """The run's model, its parts put together; with its best weights where the setting asks for them.

    Frozen weights, which no state has, are those of the parts, in the same memory.

    Raises:
        ConfigError: no best weights were kept.
    """
    setup, best = federation.setup, federation.best if config.start == "best" else None
    if config.start == "best" and (best is None or not best.round):
        raise lacking("generate")
    with TorchStream(0, torch.device("cpu")):
        model = build_model(replace(setup.config.model, init=None), setup.dataset.info)
    unshare(model)
    model.to(setup.blueprint.dtype)
    state = federation.full_model() if best is None else best.whole()
    assert state is not None
    fill_whole(model, state, setup.blueprint.parts(setup.algorithm.layout.whole).values())
    return model


def _write(run: Path, folder: Path, contents: Mapping[str, str]) -> None:
    """Write the files of a setting, the summary last; where that fails, none is left."""
    with nothing_left(folder):
        make_folder(run, folder)
        try:
            (folder / SUMMARY).unlink(missing_ok=True)
            for name, content in contents.items():
                replace_file(folder / name, content)
        except BaseException:
            for name in contents:
                (folder / name).unlink(missing_ok=True)
            raise
