"""METEOR, by its authors' program in Java."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.text import one_line
from cutlayer.text_metrics import TextPairs, register

METEOR_JAR = "METEOR_JAR"
"""The environment variable that says where meteor-1.5.jar is; else it is that of the package pycocoevalcap."""
_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")
_BETWEEN = " ||| "


def _command() -> list[str]:
    """How the program is started.

    Raises:
        ConfigError: there is no Java, or not its archive with the paraphrases beside it.
    """
    java = shutil.which("java")
    if java is None:
        raise ConfigError("metrics", NO_VALUE, "METEOR needs Java, version 8 or newer: `java` on the PATH")
    jar = _jar()
    for file in (jar, jar.parent / "data" / "paraphrase-en.gz"):
        if not file.is_file():
            raise ConfigError("metrics", NO_VALUE, f"METEOR needs {file}, which is no file")
    return [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar.resolve()), *_OPTIONS]


def _jar() -> Path:
    given = os.environ.get(METEOR_JAR)
    if given:
        return Path(given)
    package = find_spec("pycocoevalcap")  # which is not imported
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "metrics", NO_VALUE, f"METEOR needs meteor-1.5.jar: {install('meteor')}, or {METEOR_JAR}=<path>"
        )
    return Path(package.submodule_search_locations[0], "meteor", "meteor-1.5.jar")


@register("meteor", _command)
def meteor(pairs: TextPairs) -> float:
    """METEOR 1.5 of the corpus (Denkowski and Lavie 2014), in [0, 1], for English.

    The program is given the tokens of the caption metrics, and takes the best of several references.

    Raises:
        ConfigError: the program gives no figure; with what it said.
    """
    command = _command()
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        try:
            with subprocess.Popen(command, **pipes, encoding="utf-8") as process:
                try:
                    return _talk(process, pairs)
                finally:
                    process.kill()  # if it still runs
        except (OSError, ValueError):
            errors.seek(0)
            said = one_line(errors.read().decode("utf-8", "replace")) or "nothing"
    raise ConfigError("metrics", NO_VALUE, f"METEOR's program gave no figure, and said: {said}")


def _talk(process: subprocess.Popen[str], pairs: TextPairs) -> float:
    """Each hypothesis is counted, then all counts make one figure.

    Raises:
        OSError, ValueError: the program has ended, or has said something else.
    """
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def say(word: str, *parts: str) -> None:
        stdin.write(_BETWEEN.join((word, *parts)) + "\n")
        stdin.flush()

    counts: list[str] = []
    for hypothesis, references in pairs.captions:
        say("SCORE", *map(_line, references), _line(hypothesis))
        counts.append(stdout.readline().strip())
    say("EVAL", *counts)
    stdin.close()
    *each, total = map(float, stdout.read().split())
    if len(each) != len(counts):
        raise ValueError(f"{len(each)} figures of {len(counts)} texts")
    return total


def _line(tokens: Iterable[str]) -> str:
    """Tokens as the program reads them: its separator cannot be one."""
    return " ".join(token for token in tokens if "|" not in token)
