"""What Hydra and OmegaConf say about a mistake on the command line, in one line, with what would have been right."""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cutlayer import HOME
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, nearest
from cutlayer.runtime.launching.model_names import spellings

CONFIG_DIR = HOME / "hydra_config"
CONFIG_NAME = "config"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDER_ERRORS = (
    *(errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE),
)

# Hydra's and OmegaConf's words about a key -> ours; "" for a key that does not exist.
_REASONS = {
    r"Could not override '(?P<key>[^']*)'": "",
    r"Could not delete from config. '(?P<key>[^']*)' does not exist": "",
    r"Ambiguous value for argument '(?P<key>[^']*)'": (
        "several values: add -m to run each of them, or write key=[a,b] for a list"
    ),
    r"Sweep parameters '(?P<key>[^']*)' requires": "a sweep: add -m to run it",
    r"Could not append to config. An item is already at '(?P<key>[^']*)'": "exists already; write it without the +",
    r"Interpolation key '(?P<key>[^']*)' not found": "missing, and something refers to it",
}


def groups() -> tuple[str, ...]:
    """The config groups, such as model and dataset."""
    return tuple(sorted(folder.name for folder in CONFIG_DIR.iterdir() if folder.is_dir() and folder.name != "hydra"))


def options(group: str) -> tuple[str, ...]:
    """What a group offers, such as fsl_sage/cifar10_iid of experiment; `_` begins the name of what others include."""
    folder = CONFIG_DIR / group
    files = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return tuple(file.as_posix() for file in files if not file.name.startswith("_"))


def parts() -> tuple[str, ...]:
    """The parts of a model whose optimizer and schedule can be refined, as the config tree has them.

    They are the sections under `model` with both keys, of every model or of a method that brings a part of its own: so
    a name that is no part's is reported before anything is imported.
    """
    methods = [_mapping(OmegaConf.load(file)).get("model") for file in (CONFIG_DIR / "algorithm").glob("*.yaml")]
    found: set[str] = set()
    for sections in (OmegaConf.load(CONFIG_DIR / "model" / "_base.yaml"), *methods):
        found |= {name for name, each in _mapping(sections).items() if {"optimizer", "scheduler"} <= {*_mapping(each)}}
    return tuple(sorted(found))


def _mapping(values: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], values) if isinstance(values, Mapping) else {}


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str | None:
    """One line for a mistake in the configuration, or None when the error is something else.

    Args:
        error: what was raised while composing or checking the configuration.
        overrides: the command line's overrides, whose group choices decide which keys there are.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ConfigError):
            return str(link)
        link = link.__cause__
    if isinstance(error, OSError) and (reason := _reason(error)):
        return str(ConfigError(str(error.filename or "a file"), NO_VALUE, reason))
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(_translate(error, overrides))
    return None


def _reason(error: OSError) -> str | None:
    """Why a file of a run could not be written, and what can be done; None for an error of another kind."""
    if error.errno in _FULL:
        return f"cannot be written: {error.strerror}; once there is room, the same command resumes"
    if error.errno == errno.ENOENT and error.filename and not Path(str(error.filename)).parent.exists():
        return "cannot be written: its folder was removed; the same command begins anew"
    return f"cannot be written: {error.strerror}" if error.errno in _FOLDER_ERRORS and error.filename else None


def _translate(error: Exception, overrides: Sequence[str]) -> ConfigError:
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _syntax_error(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        if group in groups():
            return ConfigError(group, name, "one of the choices", [*options(group), *spellings(group)])
    for pattern, reason in _REASONS.items():
        found = re.search(pattern, text)
        if found:
            return _say(found["key"], reason) if reason else unknown_key(found["key"], overrides)
    text = re.sub(r"^ConfigError raised while resolving interpolation: ", "", text)
    lines = [*_sentences(text), *(_sentences(str(error.__cause__)) if error.__cause__ else [])]
    return _say("", ": ".join(dict.fromkeys(lines)))


def _say(key: str, text: str) -> ConfigError:
    return ConfigError(key, NO_VALUE, text)


def _syntax_error(error: OverrideParseException) -> ConfigError:
    if "=" not in error.override:
        close = nearest(error.override, groups())
        hint = "" if close is None else f"; did you mean {close}=...?"
        return _say(error.override, f"no value; expected key=value{hint}")
    reason = re.sub(r"^Error when parsing .*?: ?", "", error.message.splitlines()[0])
    return _say(error.override, f"cannot be read ({reason}); quote a value with special characters: 'key=\"value\"'")


def _sentences(text: str) -> list[str]:
    """The first line of a message (two where the first ends in a colon), without the positions that follow."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return [line.rstrip(".:") for line in lines[:count]]


def unknown_key(key: str, overrides: Sequence[str] = ()) -> ConfigError:
    """The error for a key that the composed configuration does not have, with the nearest one that it has."""
    if key.startswith("hydra."):
        return _say(key, "no such key of Hydra's; see --hydra-help")
    tree: Any = known_values(overrides)
    keys = [*dotted_keys(tree), *groups()]
    below: list[str] = []
    levels = key.split(".")
    for depth, level in enumerate(levels, 1):
        if not isinstance(tree, Mapping):
            break
        below = list(cast(Mapping[str, Any], tree))
        if level not in below and depth < len(levels) and nearest(level, below):
            return ConfigError.unknown_key(".".join(levels[:depth]), below)  # what is below it has no other mistake
        tree = cast(Mapping[str, Any], tree).get(level)
    choices = sorted({*below, *groups()}) if "." not in key else below
    if nearest(key.rpartition(".")[2], choices):
        return ConfigError.unknown_key(key, choices)
    last = key.rpartition(".")[2]
    close = min(
        (known for known in keys if known.rpartition(".")[2] == last), key=lambda known: known.count("."), default=""
    )
    hint = f"; did you mean {close}?" if close else ""
    return _say(key, f"no such key{hint} (choices: {', '.join(choices)})")


def known_values(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The composed configuration, unresolved, under the group choices among `overrides` as far as they are valid."""
    chosen = [text for text in overrides if text.partition("=")[0] in groups() and "," not in text]
    for attempt in (chosen, []):
        try:
            with initialize_config_dir(str(CONFIG_DIR), version_base=None):
                return cast(dict[str, Any], OmegaConf.to_container(compose(CONFIG_NAME, overrides=attempt)))
        except (HydraException, OmegaConfBaseException):
            continue
    return {}


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """All keys of nested mappings, dotted, parents first."""
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from dotted_keys(cast(Mapping[str, Any], value), f"{prefix}{key}.")


def check_choices(arguments: Iterable[str]) -> None:
    """Raise ConfigError for a group set to null, which Hydra does not take, except for `experiment`."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if value == "null" and group != "experiment" and group in groups():
            raise ConfigError(group, None, "one of the choices", [*options(group), *spellings(group)])


def check_flags(arguments: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for `--rounds=3` and the like, which argparse would answer with its usage.

    Args:
        arguments: the command line. known: the options, such as --multirun, that there are.
    """
    known = list(known)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name != "--" and not any(option.startswith(name) for option in known):
            key = name.lstrip("-")
            hint = f"; did you mean {argument.lstrip('-')}?" if "=" in argument else ""
            raise _say(name, f"no such option{hint} (settings are written {key}=value; options: {', '.join(known)})")
