"""Memory that runs out is one line, whichever library it runs out in."""

import errno
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer.algorithms import ALGORITHMS
from cutlayer.algorithms.fed_avg import FedAvg
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.memory import memory_told, ran_out
from cutlayer.runtime.job import claim
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.settings import RunConfig

Configure = Callable[..., RunConfig]
TOO_MANY = 10**15


@pytest.mark.parametrize(
    ("ask", "amount"),
    [
        (lambda: torch.empty(TOO_MANY), "4000000000000000 bytes"),
        (lambda: np.empty(TOO_MANY), "7.11 PiB"),
        (lambda: bytearray(TOO_MANY), None),
        (
            lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")),
            "2.00 GiB",
        ),
        (lambda: _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")), None),
        (lambda: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")), None),
    ],
)
def test_what_says_so_is_told_with_what_was_asked_for(ask: Callable[[], Any], amount: str | None) -> None:
    told = "" if amount is None else f" (asked for {amount})"
    with pytest.raises(ConfigError) as plain, memory_told():
        ask()
    assert str(plain.value).startswith(f"memory: ran out{told}; a smaller model")
    with pytest.raises(ConfigError) as keyed, memory_told("memory ran out here", "batch_size", 7, "less"):
        ask()
    assert str(keyed.value) == f"batch_size=7: expected less: memory ran out here{told}"


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), OSError(errno.ENOSPC, "full"), ValueError("out of memory"), KeyError("a")]
)
def test_other_errors_pass(error: Exception) -> None:
    assert not ran_out(error)
    with pytest.raises(type(error)) as caught, memory_told():
        raise error
    assert caught.value is error


def test_what_the_block_held_is_free_again_when_it_is_told() -> None:
    """So that there is memory for what follows."""
    held: list[Any] = []

    def work() -> None:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        torch.empty(TOO_MANY)

    with pytest.raises(ConfigError), memory_told():
        work()
    assert held[0]() is None


class _Greedy(FedAvg):
    """FedAvg with a client whose round fits into no memory."""

    name = "greedy"

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        if ctx.id == 2:
            torch.empty(TOO_MANY)
        return FedAvg.client(ctx, down)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_s_round_names_the_client(
    workers: int, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ALGORITHMS, "greedy", _Greedy)
    config = configure("algorithm=fed_avg", "batch_size=50", f"workers={workers}", f"save_dir={tmp_path / 'saves'}")
    config = replace(config, algorithm_name="greedy")
    with pytest.raises(ConfigError) as error, claim(config, []) as folder:
        run(config, folder)
    who = "a worker's memory" if workers > 1 else "memory"
    less = (
        "workers=2: expected fewer, or a smaller batch_size than 50" if workers > 1 else "batch_size=50: expected less"
    )
    asked = "(asked for 4000000000000000 bytes)"
    assert str(error.value) == f"{less}: {who} ran out in the round of client 2 {asked}"
    assert [*tmp_path.iterdir()] == []
