"""Files of a run's folder are data of a stranger: read within the folder, within bounds, and never as code."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.runtime.ground.reading import MissingError, UnreadableError, check_links, read_bytes, read_json, read_yaml

SCALARS = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=9)
KEYS = st.text(max_size=9)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=6)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@settings(max_examples=50)
@given(value=st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(value))
    assert read_yaml(folder, "config.yaml") == yaml.safe_load((folder / "config.yaml").read_bytes())
    assert read_json(folder, "results.json") == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "line 2 has an alias, *a0"),
        ("a: &x [1]\nb: *x", "line 2 has an alias, *x"),
        ("a: !!python/object/apply:os.getcwd []", "line 1 has a tag, tag:yaml.org,2002:python/object/apply:os"),
        ("a: !!binary aGk=", "line 1 has a tag, tag:yaml.org,2002:binary"),
        ("a: " + "[" * 1_000_000, "nest"),  # newer versions of libyaml have a bound of their own
        ("a: " + "[" * 100, "nested more than 32 levels deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(1000)), "nested more than 32 levels deep"),
        ("a: " + "- " * 100_000, "not allowed"),
        ("a: 1" + "0" * 30, "a whole number beyond 2^64"),
        ("a: 0x" + "f" * 4000, "a whole number beyond 2^64"),
        ("a: " + "1" + "0" * 5000, "line 1 has a value of more than 4096 characters"),
        ("a: " + ":".join(["59"] * 1000), "a whole number beyond 2^64"),
        ("a: 2001-01-01", "a value of the kind date"),
        ("1: 2", "line 1 has a key that is no text, 1"),
        ("? [a]\n: 2", "line 1 has a key that is no text"),
        ("a: [" + "1," * 110_000 + "]", "more than 100,000 values"),
        ("- 1", "it holds no mapping"),
        ("", "it holds no mapping"),
        ("a: [", "while parsing a flow node"),
        ("a: 1 # " + "x" * 2_000_000, "it has more than 1,048,576 bytes"),
        (b"a: \xff", "can't decode byte"),
    ],
    ids=range(21),
)
def test_yaml_beyond_the_bounds_is_refused_in_one_line(tmp_path: Path, text: str | bytes, why: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableError) as caught:
        read_yaml(tmp_path, "config.yaml")
    assert why in caught.value.why
    assert str(caught.value).startswith(f"run={tmp_path}"[:100])
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": ' + "[" * 100_000, "recursion"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 levels deep"),
        ('{"a": [' + "9" * 4000 + "]}", "a whole number beyond 2^64"),
        ('{"a": 1' + "0" * 20 + "}", "a whole number beyond 2^64"),
        ("[1]", "it holds no mapping"),
        ("{", "Expecting"),
    ],
)
def test_json_beyond_the_bounds_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UnreadableError) as caught:
        read_json(tmp_path, "results.json")
    assert why in caught.value.why


def test_a_file_is_a_plain_one_inside_the_folder(tmp_path: Path) -> None:
    secret, run = tmp_path / "secret", tmp_path / "run"
    secret.write_text("a: 1")
    run.mkdir()
    (run / "device.yaml").symlink_to("/dev/zero")
    (run / "circle.yaml").symlink_to("circle.yaml")
    (run / "link.yaml").symlink_to(secret)
    (run / "folder").symlink_to(tmp_path)
    os.mkfifo(run / "pipe.yaml")
    (run / "here.yaml").write_text("a: 1")
    (run / "inner.yaml").symlink_to("here.yaml")
    assert read_yaml(run, "here.yaml") == read_yaml(run, "inner.yaml") == {"a": 1}
    for name in (
        "device.yaml",
        "circle.yaml",
        "link.yaml",
        "folder/secret",
        "../secret",
        str(secret),
        "pipe.yaml",
        ".",
    ):
        with pytest.raises(UnreadableError) as caught:
            read_yaml(run, name)
        assert not isinstance(caught.value, MissingError), name
    with pytest.raises(MissingError, match=r"a folder with a readable none.yaml \(No such file or directory\)"):
        read_yaml(run, "none.yaml")


def test_a_run_whose_folder_was_named_by_a_link_is_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    (tmp_path / "named").symlink_to("run")
    assert read_yaml(tmp_path / "named", "config.yaml") == {"a": 1}


def test_folders_with_links_out_of_them_are_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest").symlink_to("run-1")  # as wandb leaves it
    check_links(run)
    for name, target in (("run.log", "/etc/passwd"), ("wandb/latest2", "../../.."), ("gone", "/nowhere")):
        (run / name).symlink_to(target)
        with pytest.raises(UnreadableError, match=f"readable {name} .it leads out of the folder"):
            check_links(run)
        (run / name).unlink()
    os.mkfifo(run / "wandb" / "pipe")
    with pytest.raises(UnreadableError, match=r"wandb/pipe .it is no plain file"):
        check_links(run)


def test_a_file_that_grows_while_it_is_read_stays_within_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path, "file", 11) == b"x" * 11
    with pytest.raises(UnreadableError, match="more than 10 bytes"):
        read_bytes(tmp_path, "file", 10)


def test_tags_of_other_programs_may_be_read_as_null(tmp_path: Path) -> None:
    text = "device: &id001 !!python/object/apply:torch.device\n- cuda\nother: *id001\nn: 1\n"
    (tmp_path / "settings.yml").write_text(text)
    found = read_yaml(tmp_path, "settings.yml", ignored_tags="tag:yaml.org,2002:python/")
    assert found == {"device": None, "other": None, "n": 1}
    (tmp_path / "settings.yml").write_text(text + "a: &b [1]\nc: *b")
    with pytest.raises(UnreadableError, match="an alias"):
        read_yaml(tmp_path, "settings.yml", ignored_tags="tag:yaml.org,2002:python/")
