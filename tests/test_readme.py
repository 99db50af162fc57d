"""What the documents tell a reader to do works: the commands, the worked example, the keys and names that they list."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cutlayer import algorithms, datasets, distributions, models, plot_results
from cutlayer.attacks import ATTACKS
from cutlayer.evaluations import EVALUATIONS
from cutlayer.runtime.ground.config import Use
from cutlayer.runtime.keys import uses_of
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR, options
from cutlayer.runtime.launching.hydra_support import load_config, plain_values, preprocess
from cutlayer.runtime.records.loggers import LOGGERS
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.text_metrics import TEXT_METRICS
from tests.forked import Forks, server
from tests.places import checkout

ROOT = checkout()
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Shapes of what needs files; a synthetic set of that shape stands in for it.
SHAPES = {"digits": (1, 8, 10), "mnist": (1, 28, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100)}
FOLDERS = (
    *("algorithms", "attacks", "cutlayer", "datasets", "distributions", "evaluations", "hydra_config", "hydra_plugins"),
    *("models", "plotting", "runtime", "tasks", "tests", "text_metrics"),
)
SMALL = ("rounds=1", "num_clients=2", "batch_size=8", "local_epochs=1", "device=cpu")


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The commands in the shell blocks of a document, comments left out, a backslash at a line's end joined."""
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]


def named(words: list[str]) -> str:
    return " ".join(words)


GUIDE = ROOT / "docs" / "adding_your_own.md"
README_COMMANDS = commands(ROOT / "README.md")
ALL_COMMANDS = {named(words): words for path in DOCUMENTS for words in commands(path)}


def jobs(arguments: list[str]) -> list[list[str]]:
    """The jobs of a command line of main.py: one, or with -m one for each combination of values."""
    sweep = "-m" in arguments
    given = [argument for argument in arguments if argument != "-m"]
    config = compose_with_hydra(*(argument for argument in given if "," not in argument))
    params = config.hydra.sweeper.params if sweep else None
    swept = [*given, *(f"{key}={values}" for key, values in (params or {}).items() if f"{key}=" not in named(given))]
    choices: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(preprocess(swept)):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        own = override.input_line
        choices.append([f"{own.partition('=')[0]}={value}" for value in values] if values else [own])
    assert sweep or all(len(choice) == 1 for choice in choices), "several values without -m"
    return [list(job) for job in itertools.product(*choices)]


def compose_with_hydra(*overrides: str) -> Any:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose("config", overrides=preprocess(overrides), return_hydra_config=True)


def scaled(job: list[str]) -> list[str]:
    """The same job in one round of two clients, on a few made-up images of its dataset's shape."""
    config = load_config(job)
    if config.dataset.name == "shakespeare":
        return [*job, "dataset.fraction=0.2", *SMALL]
    channels, side, classes = SHAPES[config.dataset.name]
    shape = {"channels": channels, "height": side, "width": side, "classes": classes, "n_train": 32, "n_test": 16}
    # A value given twice is an error for a config group only; for a key the last one counts.
    small = [each for each in job if not re.match(r"\+*dataset(\.root|\.options\..*)?=", each)]
    small += ["dataset=synthetic", *(f"dataset.options.{key}={value}" for key, value in shape.items())]
    return [*small, *SMALL, *(["algorithm.align_epochs=1"] if hasattr(config.algorithm, "align_epochs") else [])]


def narrowed(config: RunConfig) -> RunConfig:
    """With fewer channels where a deep network has a width: a test of the command, not of the network."""
    if not config.model.name.startswith("resnet"):
        return config
    return replace(config, model=replace(config.model, options={**config.model.options, "width": 8}))


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("words", ALL_COMMANDS.values(), ids=named)
def test_every_command_of_the_documents_is_one_that_exists(words: list[str]) -> None:
    program, *arguments = words[3:] if words[:2] == ["nice", "-n"] else words
    if program == "make":
        check_make(arguments)
    elif program == "python" and arguments[0] == "-m":
        module = Path(*arguments[1].split("."))
        found = (ROOT / module).with_suffix(".py").exists() or (ROOT / module / "__main__.py").exists()
        assert found or importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program in ("cd", "conda", "git", "pip", "pre-commit", "tensorboard", "mlflow"), f"what is {program}?"


def check_make(arguments: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


EXPERIMENTS = [
    pytest.param(words[2:], words in README_COMMANDS, id=named(words[2:]))
    for words in ALL_COMMANDS.values()
    if words[:2] == ["python", "main.py"] and words not in commands(GUIDE)
]


@pytest.mark.parametrize(("arguments", "run"), EXPERIMENTS)
def test_every_experiment_of_the_documents_is_valid_and_those_of_the_readme_run(
    arguments: list[str], run: bool
) -> None:
    arguments = [word for word in arguments if word not in ("--cfg", "job", "--cuts", "--cuts=all", "--costs")]
    for job in jobs(arguments):
        load_config(job)
        if run:
            federation = Federation(narrowed(load_config(scaled(job))))
            record, _ = federation.step()
            assert federation.done
            assert record.test_acc is not None
            assert record.train_loss is None or record.train_loss > 0


def test_the_readme_names_the_commands_that_users_begin_with() -> None:
    named_commands = [named(words) for words in README_COMMANDS]
    assert named_commands[:2] == ["make run", "make test"]
    for wanted in ("model=resnet18", "-m model=", "experiment=fsl_sage/cifar10_iid", "noniid_dirichlet"):
        assert any(wanted in command for command in named_commands), wanted


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}


def test_a_run_prints_what_the_readme_shows_and_its_results_can_be_drawn(forks: Forks, tmp_path: Path) -> None:
    saves, figures = tmp_path / "saves", tmp_path / "figures"
    done = forks(["rounds=2", "num_clients=2", "algorithm.align_epochs=1", f"save_dir={saves}"])
    assert done.returncode == 0, done.stderr
    (shown,) = [block for block in blocks(ROOT / "README.md", "text") if "final accuracy" in block]
    labels = re.findall(r"^\| +(\w[\w: ]*?) +\|", shown, re.MULTILINE)
    assert len(labels) > 8
    for label in [*labels, "results", "picture"]:
        assert label in done.stdout, f"README shows {label!r}, the run printed:\n{done.stdout}"
    assert plot_results.main(["--saves", str(saves), "--out", str(figures)]) == 0
    assert list(figures.rglob("accuracy_communication.svg"))
    assert list(figures.rglob("table.md"))
    described = (ROOT / "docs" / "results_format.md").read_text(encoding="utf-8")
    (folder,) = [mark.parent for mark in saves.rglob("identity")]
    for path in folder.iterdir():
        assert f"`{path.name}" in described, f"docs/results_format.md does not tell what {path.name} is"
    for table in folder.glob("*.csv"):
        for column in table.read_text(encoding="utf-8").splitlines()[0].split(","):
            assert column.isdigit() or f"`{column}`" in described, f"column {column} of {table.name}"


# ---------------------------------------------------------------------- the examples of the guide

FILES = re.findall(
    r"^`([\w/.]+)`:\n\n```(?:python|yaml)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
# By example what its run prints, and what of the command is made smaller.
SMALLER = ("rounds=2", "num_clients=2", "batch_size=300", "progress=lines")
REGISTRIES = {
    "algorithms": "algorithms.ALGORITHMS",
    "attacks": "attacks.ATTACKS",
    "datasets": "datasets.registry._READERS",
    "distributions": "distributions.DISTRIBUTIONS",
    "evaluations": "evaluations.EVALUATIONS",
    "models": "models.registry._ENTRIES",
    "plotting/figures": "plotting.figures.FIGURES",
    "tasks": "tasks.TASKS",
    "runtime/records/loggers": "runtime.records.loggers.LOGGERS",
    "text_metrics": "text_metrics.TEXT_METRICS",
}
"""By folder of the examples the mapping that they are registered in."""
GUIDED = [words for words in commands(GUIDE) if words[1] == "main.py"]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files that docs/adding_your_own.md tells to write."""
    copy = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.yaml"), ROOT / "pyproject.toml"):
        shutil.copy(path, copy / path.name)
    for name, content in FILES:
        assert (copy / name).parent.is_dir(), f"{name} is in no folder that there is"
        assert not (copy / name).exists()
        (copy / name).write_text(content, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def in_fork(extended: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """`main.py` of the copy, without the seconds that each new process loads the libraries; not for sweeps."""
    with server(extended, tmp_path_factory.mktemp("outputs"), environment()) as call:
        yield call


def in_copy(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def smaller(words: list[str]) -> list[str]:
    """A command of main.py with fewer rounds and clients."""
    keys = {word.partition("=")[0] for word in SMALLER}
    return [*(word for word in words[1:] if word.partition("=")[0] not in keys), *SMALLER]


def test_every_section_of_the_guide_has_an_example_that_registers_itself(in_fork: Forks, tmp_path: Path) -> None:
    folders = {name.rpartition("/")[0] for name, _ in FILES if name.endswith(".py")}
    assert {*REGISTRIES, "hydra_plugins"} <= folders
    lines = [f"import cutlayer.{place.rpartition('.')[0]}" for place in REGISTRIES.values()]
    lines.append(f"print(json.dumps({{{', '.join(f'{k!r}: [*cutlayer.{v}]' for k, v in REGISTRIES.items())}}}))")
    (tmp_path / "listing.py").write_text("\n".join(["import json", *lines]))
    done = in_fork([], str(tmp_path / "listing.py"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, text in FILES:
        folder, _, file = name.rpartition("/")
        if folder in REGISTRIES:
            assert file.removesuffix(".py") in found[folder], name
            assert "register(" in text


@pytest.mark.parametrize("words", GUIDED, ids=named)
def test_every_command_of_the_guide_runs(extended: Path, in_fork: Forks, words: list[str]) -> None:
    program, *arguments = smaller(words)
    done = in_copy(extended, program, *arguments) if "-m" in arguments else in_fork(arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"round 2/2|finished", done.stdout), done.stdout


def test_what_the_examples_leave(extended: Path, in_fork: Forks) -> None:
    setting = ("algorithm=sl_single_server", "logger=[csv,lines]", "evaluations=[f_score]", *SMALLER)
    done = in_fork([*setting, "save_dir=left"])
    assert done.returncode == 0, done.stderr
    (run,) = [mark.parent for mark in (extended / "left").rglob("identity")]
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [each["round"] for each in rounds] == [1, 2]
    assert 0 < rounds[-1]["f_score/macro"] < 1
    assert json.loads((run / "results.json").read_text())["metrics"]["f_score/macro"][-1] == rounds[-1]["f_score/macro"]
    done = in_fork(["attack=label_counts", "run=left", "attack.client=1"], "attack.py")
    assert done.returncode == 0, done.stderr
    counts = json.loads((run / "attacks/label_counts/client=1/summary.json").read_text())["counts"]
    assert (len(counts), sum(counts)) == (10, 718)
    done = in_fork(["--saves", "left", "--out", "drawn"], "plot_results.py")
    assert done.returncode == 0, done.stderr
    (page,) = (extended / "drawn").rglob("report.html")
    assert "The round in which the mean over seeds was highest" in page.read_text()
    assert next((extended / "drawn").rglob("best_round.svg"))


def test_a_mistake_in_a_key_of_an_example_is_one_line(in_fork: Forks) -> None:
    for wrong in ("algorithm=sl_noise algorithm.scale=-1", "dataset=halves dataset.options.side=1",
                  "dataset.distribution=geometric dataset.distribution_options.ratio=2"):  # fmt: skip
        done = in_fork(wrong.split())
        assert done.returncode == 1
        assert done.stderr.startswith(wrong.split()[-1]), done.stderr


def test_the_examples_pass_the_tests_of_their_kind(extended: Path) -> None:
    """Of those that are slow one of several is enough here: this is a test of the document."""
    tried = {
        "sl_noise": ("tests/contract/test_contract.py", 8),
        "geometric": ("tests/contract/test_distributions.py", 4),
        "f_score": ("tests/contract/test_evaluations.py", 1),
        "regression": ("tests/contract/test_tasks.py", 2),
        "distinct_2": ("tests/contract/test_text_metrics.py", 2),
        "best_round": ("tests/plotting/test_figures_all.py", 2),
        "narrow": ("tests/models/test_model_auxiliary.py", 5),
        "halves": ("tests/contract/test_every_yaml.py", 1),
        "lines": ("tests/contract/test_every_yaml.py", 1),
    }
    files = dict.fromkeys(file for file, _ in tried.values())
    chosen = f"({' or '.join(tried)}) and not keep_local"
    done = in_copy(extended, "-m", "pytest", "-v", *files, "-k", chosen, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    for name, (file, least) in tried.items():
        passed = [
            line for line in done.stdout.splitlines() if line.startswith(file) and " PASSED" in line and name in line
        ]
        assert len(passed) >= least, f"the tests must find {name} by themselves:\n{done.stdout}"


def test_the_examples_are_in_the_style_of_the_house(extended: Path) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    files = [name for name, _ in FILES if name.endswith(".py")]
    for arguments in (("check", "--no-cache"), ("format", "--check", "--no-cache")):
        done = in_copy(extended, "-m", "ruff", *arguments, *files)
        assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------- completeness of the documents


def tables(text: str) -> Iterator[list[str]]:
    """The blocks of lines that begin with a bar, outside of code."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n(?!\|)", outside):
        yield from ([rows] if (rows := [line for line in block.split("\n") if line.startswith("|")]) else [])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_row_is_of_a_table(path: Path) -> None:
    """A line that is empty, or a bar too many, would end a table, and the rest would be shown as text."""
    for rows in tables(path.read_text(encoding="utf-8")):
        columns = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
        assert len(rows) > 2, rows[0]
        assert re.fullmatch(r"[|:-]+", rows[1].replace(" ", "")), rows[0]
        assert [row for row, count in zip(rows, columns, strict=True) if count != columns[0]] == []


def named_in(cell: str) -> set[str]:
    return set(re.findall(r"`([\w.*]+)`", cell))


def below(keys: Iterable[str], names: Iterable[str]) -> set[str]:
    """The keys that are named, or that are in a section that is named as `section.*`."""
    starts = tuple(name.removesuffix("*") for name in names if name.endswith(".*"))
    return {key for key in keys if key in names or (starts and key.startswith(starts))}


def is_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in uses_of(RunConfig))


def test_the_document_has_the_scope_of_every_key() -> None:
    part = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").partition("## Scopes")[2]
    rows, conditions = (rows[2:] for rows in list(tables(part.partition("\n## ")[0])))
    cells = {row.split("|")[1].strip(): named_in(row.split("|")[2]) for row in rows}
    scopes = {
        "belongs to the machine": "machine",
        "says what is kept or shown": "record",
        "comes after training": "after",
    }
    assert list(cells) == ["decides the result", *scopes]
    uses = {key: use for key, use in uses_of(RunConfig).items() if not is_section(key)}
    loggers = {f"logger.{name}" for name in LOGGERS}
    for words, scope in scopes.items():
        wanted = {key for key, use in uses.items() if use.scope == scope and key != "logger"}
        assert below({*uses, *loggers}, cells[words]) == wanted | (loggers if scope == "record" else set()), words

    reported = {name for row in conditions for name in named_in(row.split("|")[1])}
    fields_of = {
        f"algorithm.{each.name}": each for name in algorithms.names() for each in fields(algorithms.get(name).Config)
    }
    wanted = {key for key, each in fields_of.items() if each.metadata.get("use", Use()).read_if}
    wanted |= {key for key, use in uses_of(RunConfig).items() if use.read_if and not is_section(key)}
    wanted |= {f"{key}.*" for key, use in uses_of(RunConfig).items() if is_section(key) and use.read_if}
    wanted |= {f"{key}.*" for key in uses_of(RunConfig) if key.startswith("model.") and is_section(key)}
    unread = {key for name in algorithms.names() for key in algorithms.get(name).unread}
    assert reported == wanted | {f"{key}.*" if is_section(key) else key for key in unread}


def leaves(values: Any, above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def test_every_key_is_in_the_configuration_document() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys: set[str] = set()
    for name in algorithms.names():
        keys |= set(leaves(plain_values(compose_with_hydra(f"algorithm={name}"))))
        keys |= {f"algorithm.{field.name}" for field in fields(algorithms.get(name).Config)}
    for name in LOGGERS:
        keys |= {f"logger.{name}.{field.name}" for field in fields(LOGGERS[name].Config) if field.name != "name"}
    # Below an open mapping, as an algorithm's yaml may set it, is whatever torch's class takes.
    keys = {key for key in keys if not preprocess([f"{key}="])[0].startswith("++")}
    assert len(keys) > 60
    missing = sorted(key for key in keys if f"`{key}`" not in text)
    assert missing == []
    for group in ("optimizer", "scheduler", "transport", "logger", "experiment"):
        for option in options(group):
            assert f"`{option}`" in text, f"{group}={option}"


def test_the_defaults_in_the_configuration_document_are_the_defaults() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    values = OmegaConf.create(plain_values(compose_with_hydra()))
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| `([^`|]*)` \|", text, re.MULTILINE)
    assert len(rows) > 50
    for key, shown in rows:
        if OmegaConf.select(values, key, default="absent") == "absent":
            continue
        value = OmegaConf.select(values, key)
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        assert OmegaConf.to_container(OmegaConf.create([shown_value(shown)]))[0] == plain, key  # type: ignore[index]


def shown_value(text: str) -> Any:
    return OmegaConf.create(f"v: {text}").v


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("README.md", algorithms.names()),
        ("docs/algorithms.md", algorithms.names()),
        ("docs/datasets.md", datasets.names()),
        ("docs/datasets.md", distributions.names()),
        ("docs/configuration.md", models.names()),
        ("docs/configuration.md", EVALUATIONS.names()),
        ("docs/privacy.md", ATTACKS.names()),
        ("docs/text_metrics.md", TEXT_METRICS.names()),
        ("docs/reproducing.md", options("experiment")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_document_leaves_out_no_registered_name(document: str, names: tuple[str, ...]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


def test_links_and_pictures_between_the_documents_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
