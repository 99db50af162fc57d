"""`hydra/launcher=submitit_slurm` on a real Slurm of one node, in a network of its own."""

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launchers.conftest import LONG, SHORT, Found, in_mid_run, jobs, left
from tests.launchers.namespace import ADDRESS, NODE, Namespace, describe, finish, missing, sweep_command

SERVERS = ("munged", "slurmctld", "slurmd")


def _why_not() -> str:
    absent = [tool for tool in (*SERVERS, "sbatch", "srun", "squeue") if shutil.which(tool) is None]
    if absent:
        return (
            f"no Slurm here ({', '.join(absent)}; Debian: slurmctld slurmd slurm-client munge, about 10 s to install)"
        )
    if importlib.util.find_spec("submitit") is None:
        return 'submitit is not installed (pip install -e ".[slurm]")'
    return missing()


WHY_NOT = _why_not()
# Half a minute each on a machine with nothing else to do.
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"), pytest.mark.timeout(560)]

# Jobs that are queued again start after cred_expire seconds, and cancelled ones are killed after KillWait.
CONFIGURATION = """
ClusterName=cutlayer
SlurmctldHost={node}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=5
MailProg=/bin/true
NodeName={node} NodeAddr={address} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """A cluster of one node with two processors."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        folder = namespace.folder
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(node=NODE, address=ADDRESS, folder=folder))
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self.run("munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
        self.run("slurmctld", "-c")
        self.run("slurmd")
        end = time.monotonic() + 30
        while "idle" not in self.run("sinfo", "--noheader", "--format=%T"):
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()
            time.sleep(0.1)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.namespace.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        return self.namespace.run(*command, **self.environment)

    def tasks(self) -> list[str]:
        """The tasks that run, in the order of their jobs."""
        return sorted(self.run("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split())


@pytest.fixture
def slurm(namespace: Namespace) -> Slurm:
    return Slurm(namespace)


def test_a_sweep_on_slurm_equals_one_by_joblib(
    slurm: Slurm, tmp_path: Path, by_joblib: Callable[[tuple[str, ...]], Found]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    command = sweep_command(tmp_path / "saves", "submitit_slurm", *SHORT)
    # From another folder than the checkout: a task has to find the code all the same.
    result = finish(slurm.namespace.start(command, cwd=tmp_path / "elsewhere", **slurm.environment))
    assert result[0] == 1, describe(result)
    assert [job["state"] for job in jobs(tmp_path / "saves")] == ["finished", "finished", "failed"], describe(result)
    assert "num_clients=100000: expected at most 1437" in result[1]
    assert result[2] == "1 of 3 jobs failed; the same command tries them again\n"
    assert {job["place"] for job in jobs(tmp_path / "saves")[:2]} == {"processor, threads: 1"}
    assert left(tmp_path / "saves") == by_joblib(SHORT)


def test_what_slurm_takes_away_goes_on_and_what_is_cancelled_harms_no_other(
    slurm: Slurm, tmp_path: Path, by_joblib: Callable[[tuple[str, ...]], Found]
) -> None:
    saves = tmp_path / "saves"
    process = slurm.namespace.start(sweep_command(saves, "submitit_slurm", *LONG), **slurm.environment)
    in_mid_run(saves, process)
    first, second = slurm.tasks()
    slurm.run("scancel", "--signal=USR2", first)  # as at the time limit, or when a task has to make way
    slurm.run("scancel", second)
    result = finish(process)
    assert result[0] == 1, describe(result)
    one, other = jobs(saves)
    assert (one["state"], other["state"]) == ("finished", "killed"), describe(result)
    assert other["error"] == f"Slurm task {second} ended: CANCELLED"
    (folder,) = saves.glob("multirun/*/jobs/0")
    output = (folder / "output.log").read_text()
    assert "resumed after round" in output
    assert "Traceback" not in output
    (identity,) = left(saves)
    assert left(saves)[identity] == by_joblib(LONG)[identity]


def test_an_interrupt_empties_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    command = sweep_command(saves, "submitit_slurm", *LONG)
    process = slurm.namespace.start(command, **slurm.environment)
    in_mid_run(saves, process)
    slurm.run("pkill", "-INT", "-f", "main.* -m hydra/launcher=submitit_slurm")
    result = finish(process)
    assert result[0] == 130, describe(result)
    assert [job["state"] for job in jobs(saves)] == ["interrupted", "interrupted"]
    assert "the same command resumes: " in result[2]
    assert "Traceback" not in result[2]
    end = time.monotonic() + 30
    while slurm.run("squeue", "--noheader"):
        assert time.monotonic() < end, "tasks are left in the queue"
        time.sleep(0.2)


def test_what_slurm_does_not_take_is_one_line(slurm: Slurm, tmp_path: Path) -> None:
    command = sweep_command(tmp_path / "saves", "submitit_slurm", *SHORT, "hydra.launcher.partition=absent")
    status, out, err = finish(slurm.namespace.start(command, **slurm.environment))
    assert status == 1
    assert err.startswith("hydra.launcher: Slurm does not take it: invalid partition specified: absent"), out + err
    assert err.count("\n") == 1
