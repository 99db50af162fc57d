"""What docs/deployment.md and deploy/ tell a reader to do: services, commands, certificates, keys."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cutlayer import certificates
from cutlayer.runtime.launching.hydra_support import load_config, plain_values
from tests.places import checkout
from tests.test_readme import blocks, commands, compose_with_hydra

ROOT = checkout()
DOCUMENT = ROOT / "docs" / "deployment.md"
DEPLOY = ROOT / "deploy"
UNITS = ("cutlayer-server.service", "cutlayer-client@.service")
PYTHON = "/opt/cutlayer/.venv/bin/python"


def console() -> list[list[str]]:
    """The commands that are for other programs than this project's, without sudo."""
    lines = [shlex.split(line) for block in blocks(DOCUMENT, "console") for line in block.splitlines()]
    return [words[1:] if words[0] == "sudo" else words for words in lines]


def of_program(*programs: str) -> list[list[str]]:
    found = [words for words in console() if words[0] in programs]
    assert found
    return found


# ---------------------------------------------------------------------- services


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit's file, by key."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_no_fault_in_the_services(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")

    def faults(text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.stderr if done.returncode == 0 else f"{done.returncode} {done.stderr}"

    # Not installed there, so that the one thing it cannot find is the environment.
    text = (DEPLOY / name).read_text(encoding="utf-8").replace(PYTHON, sys.executable)
    assert faults(text) == ""
    assert "NoNewPrivilege" in faults(text.replace("NoNewPrivileges", "NoNewPrivilege"))


@pytest.mark.parametrize(("name", "role"), list(zip(UNITS, ("server", "client"), strict=True)))
def test_the_services_run_valid_commands_of_their_settings(name: str, role: str) -> None:
    settings = unit(name)
    example = DEPLOY / f"{role}.env"
    assert f"/etc/cutlayer/{example.name}" in settings["EnvironmentFile"]
    lines = [line for line in example.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    variables = dict(line.split("=", 1) for line in lines)
    (command,) = settings["ExecStart"]
    command = command.replace("%i", "2")
    for variable, value in variables.items():
        assert f"${variable}" in command or f"${{{variable}}}" in command
        command = command.replace(f"${{{variable}}}", value).replace(f"${variable}", value.strip('"'))
    program, main, *arguments = command.split()
    assert (program, main, "$" in command) == (PYTHON, "main.py", False)
    config = load_config(arguments)
    assert config.role == role
    assert str(config.save_dir) == f"/var/lib/{settings['StateDirectory'][0]}"
    transport: Any = config.transport
    assert str(transport.certificates) == "/etc/cutlayer/certs"
    if role == "client":
        assert (config.client_id, config.server) == (2, f"10.0.0.1:{transport.port}")


# ---------------------------------------------------------------------- commands


def test_the_document_shows_what_certificates_prints_and_copies_what_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("cryptography", reason="the extra grpc is not installed")
    monkeypatch.chdir(tmp_path)
    words, revoking = [words for words in commands(DOCUMENT) if words[1] == "certificates.py"]
    assert certificates.main(words[2:]) == 0
    (shown,) = [block for block in blocks(DOCUMENT, "text") if "the authority" in block]
    date = re.compile(r"\d{4}-\d\d-\d\d")
    assert date.sub("DATE", capsys.readouterr().out) == date.sub("DATE", shown)
    assert certificates.main(revoking[2:]) == 0
    for words in of_program("scp", "install"):
        files = [Path(word) for word in words[1:-1] if word.startswith(("certs/", "deploy/"))]
        for path in files:
            assert (tmp_path / path).is_file() or (ROOT / path).is_file(), path
        if any(path.suffix == ".key" for path in files):
            ca, certificate, key = files
            assert (ca.name, certificate.stem, certificate.suffix, key.stem) == ("ca.pem", key.stem, ".pem", key.stem)
            assert words[0] == "scp" or "600" in words
    for client, words in enumerate(of_program("scp")):
        assert f"certs/client-{client}.key" in words


def test_the_other_commands_of_the_document_are_ones_that_exist() -> None:
    known = {"ssh", "scp", "git", "cd", "python3", ".", "pip", "ufw", "nft", "useradd", "install", "systemctl"}
    assert {words[0] for words in console()} <= known | {"journalctl"}
    for words in of_program("systemctl", "journalctl"):
        services = [word for word in words if word.startswith("cutlayer-")]
        for service in services:
            assert f"{re.sub('@.*', '@', service)}.service" in UNITS
    port = str(plain_values(compose_with_hydra("transport=grpc"))["transport"]["port"])
    for words in of_program("ufw", "nft"):
        assert port in words or "set" in words
    (tunnel,) = [word for words in of_program("ssh") if "-L" in words for word in words if port in word]
    assert tunnel == f"{port}:127.0.0.1:{port}"
    if shutil.which("ssh") is None:
        pytest.skip("ssh is not installed")
    for words in of_program("ssh"):
        done = subprocess.run(["ssh", "-G", *words[1:]], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert ("localforward " in done.stdout) == ("-L" in words)


# ---------------------------------------------------------------------- keys


def test_the_keys_of_the_document_exist_and_have_the_defaults_that_it_tells() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    values = OmegaConf.create(plain_values(compose_with_hydra("transport=grpc")))
    keys = set(re.findall(r"\btransport\.(\w+)", text))
    assert keys == set(values.transport) - {"name"}
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \|", text, re.MULTILINE)
    assert len(rows) > 6
    for key, shown in rows:
        if key.startswith("dataset"):
            continue
        value = None if shown == "none" else OmegaConf.create(f"v: {shown.strip('`')}").v
        assert OmegaConf.select(values, key, default="absent") == value, key
