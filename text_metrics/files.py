"""Files of generated text and of references, as the E2E script has them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError


def read_hypotheses(path: str | Path) -> list[str]:
    """One text a line, [n]; an empty line is an empty text.

    Raises:
        ConfigError: the file cannot be read, or is no UTF-8.
    """
    return [line.strip() for line in _lines(path)]


def read_references(path: str | Path, texts: int | None = None) -> list[list[str]]:
    """Groups of lines, [n]: a text a line, an empty line between groups. A file without one has a group in each line.

    Args:
        texts: how many hypotheses they are for. Of one alone all lines are its group, without an empty line too.

    Raises:
        ConfigError: the file cannot be read, is no UTF-8, or has a group without any text.
    """
    groups: list[list[str]] = [[]]
    for number, line in enumerate("\n".join(_lines(path)).rstrip().split("\n"), 1):
        if line.strip():
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
        else:
            raise ConfigError("references", NO_VALUE, f"{path}: an empty group, as line {number} is empty too")
    return groups if len(groups) > 1 or texts == 1 else [[text] for text in groups[0]]


def hypotheses_text(texts: Iterable[str]) -> str:
    """The content of a file that `read_hypotheses` reads as these texts: lines, without space at either end."""
    return "".join(f"{text}\n" for text in texts)


def references_text(groups: Iterable[Sequence[str]]) -> str:
    """The content of a file that `read_references` reads as these groups, none of them empty: an empty line between."""
    return "\n".join(hypotheses_text(group) for group in groups)


def _lines(path: str | Path) -> list[str]:
    """Without line ends; only line feeds end lines, as other signs may be part of a text."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError("file", str(path), f"a file that can be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError("file", str(path), f"text in UTF-8, which it is not at byte {error.start}") from None
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]
