"""Files of texts and references, those that are right and those that are not."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.text_metrics.files import hypotheses_text, read_hypotheses, read_references, references_text
from tests.text_metrics.samples import sample


def written(folder: Path, content: str) -> Path:
    (folder / "file.txt").write_bytes(content.encode())
    return folder / "file.txt"


def test_a_hypothesis_is_a_line_also_an_empty_one(tmp_path: Path) -> None:
    assert read_hypotheses(written(tmp_path, "\ufeffa b \r\n\r\n c\u2028d\n")) == ["a b", "", "c\u2028d"]
    assert read_hypotheses(written(tmp_path, "")) == []


def test_references_are_grouped_by_empty_lines(tmp_path: Path) -> None:
    assert read_references(written(tmp_path, "a\nb \n\nc\n \nd\r\ne")) == [["a", "b"], ["c"], ["d", "e"]]
    assert read_references(written(tmp_path, "a\n\nb\n\n\n")) == [["a"], ["b"]]


def test_references_without_an_empty_line_are_one_each(tmp_path: Path) -> None:
    assert read_references(written(tmp_path, "a\nb\nc\n")) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(("name", "groups", "texts"), [("baseline", 10, 137), ("human", 50, 287)])
def test_the_stored_samples(name: str, groups: int, texts: int) -> None:
    hypotheses, references = sample(name)
    assert (len(hypotheses), len(references), sum(map(len, references))) == (groups, groups, texts)


LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\ufeff")).map(str.strip).filter(bool)


@given(st.lists(st.lists(LINES, min_size=1, max_size=3), min_size=1, max_size=4))
def test_texts_that_are_written_are_read(groups: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert read_references(written(Path(folder), references_text(groups)), len(groups)) == groups
        first = ["", *(group[0] for group in groups), ""]
        assert read_hypotheses(written(Path(folder), hypotheses_text(first))) == first


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a\n\n\nb\n", r"references: .*file\.txt: an empty group, as line 3 is empty too$"),
        ("\na\n", r"references: .*: an empty group, as line 1 is empty too$"),
        ("", r"references: .*: an empty group, as line 1 is empty too$"),
    ],
)
def test_an_empty_group_is_named_by_its_line(tmp_path: Path, content: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        read_references(written(tmp_path, content))


@pytest.mark.parametrize("read", [read_hypotheses, read_references])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, read) -> None:
    with pytest.raises(ConfigError, match=r"file=.*none\.txt: expected a file that can be read \(No such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match=r"file=.*latin\.txt: expected text in UTF-8, which it is not at byte 3"):
        read(tmp_path / "latin.txt")
