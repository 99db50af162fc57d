"""What the fuzz targets share: how a run is set up, and how its inputs are written and changed.

An input is a sequence of pieces, as a peer sends them: each has its length (3 bytes, little-endian) before it.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import atheris

SMALLEST, LARGEST = -(2**63), 2**64
TELLING = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    255,
    256,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    LARGEST,
    -1,
    SMALLEST,
    True,
    None,
    1.5,
    "",
]


def join(pieces: Iterable[bytes]) -> bytes:
    """Pieces as one input."""
    return b"".join(len(piece).to_bytes(3, "little") + piece for piece in pieces)


def split(data: bytes) -> list[bytes]:
    """The pieces of an input; the last has what is left."""
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 3], "little")
        pieces.append(data[at + 3 : at + 3 + length])
        at += 3 + length
    return pieces


def recut(whole: bytes, first: int, random: Random) -> list[bytes]:
    """One message in pieces, cut anywhere behind its first bytes."""
    cuts = sorted(
        {random.randrange(first, len(whole)) for _ in range(random.randrange(4))} if len(whole) > first else []
    )
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def mutate_json(value: Any, random: Random) -> Any:
    """JSON with one thing in it changed; objects are lists of pairs, so that a key can be there twice."""
    if isinstance(value, tuple):
        pairs = list(value)
        choice = random.randrange(6)
        if not pairs or choice == 0:
            pairs.append(
                (random.choice(["a", "b", "", "__metadata__", "\ud800", "y"]), random.choice([*TELLING, (), []]))
            )
        elif choice == 1:
            pairs.pop(random.randrange(len(pairs)))
        elif choice == 2:
            pairs.insert(random.randrange(len(pairs)), random.choice(pairs))
        elif choice == 3:
            random.shuffle(pairs)
        else:
            at = random.randrange(len(pairs))
            name, inner = pairs[at]
            renamed = random.choice([name, name, name, random.choice(pairs)[0], name * 2, name[:-1]])
            pairs[at] = (renamed, mutate_json(inner, random))
        return tuple(pairs)
    if isinstance(value, list) and random.random() < 0.9:
        items = list(value)
        choice = random.randrange(4)
        if not items or choice == 0:
            items.insert(random.randrange(len(items) + 1), random.choice(TELLING))
        elif choice == 1:
            items.pop(random.randrange(len(items)))
        else:
            at = random.randrange(len(items))
            items[at] = mutate_json(items[at], random)
        return items
    if type(value) is int and random.random() < 0.7:
        return value + random.choice([-8, -4, -1, 1, 4, 8, value])
    return random.choice(
        [*TELLING, "F32", "I64", "BOOL", "U8", "BF16", "int", "float", "bool", (), [], [value], (("a", value),)]
    )


def pairs_of(raw: bytes) -> Any:
    """JSON with objects as tuples of pairs; None if it is no JSON."""
    try:
        return json.loads(raw, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None


def json_of(value: Any) -> bytes:
    """What ``pairs_of`` read, as bytes."""
    if isinstance(value, tuple):
        return b"{" + b",".join(json.dumps(name).encode() + b":" + json_of(inner) for name, inner in value) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(json_of(inner) for inner in value) + b"]"
    return json.dumps(value).encode()


def run(
    target: Callable[[bytes], None], mutate: Callable[[bytes, Random], bytes], seeds: Sequence[bytes], max_bytes: int
) -> None:
    """Fuzz ``target`` until libFuzzer's arguments (``sys.argv``) say stop; half of the changes are ``mutate``'s."""

    def custom(data: bytes, size: int, seed: int) -> bytes:
        random = Random(seed)
        changed = data
        for _ in range(random.choice([1, 1, 2, 4])):
            changed = mutate(changed, random) if random.random() < 0.5 else atheris.Mutate(changed, size)
        return changed if len(changed) <= size else data

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for index, seed in enumerate(seeds):
            (Path(folder) / f"seed{index}").write_bytes(seed)
        arguments = [sys.argv[0], f"-max_len={max_bytes}", "-timeout=20", "-rss_limit_mb=4096", *sys.argv[1:]]
        if not any(Path(argument).is_file() for argument in sys.argv[1:]):  # else these alone are run, and not fuzzed
            arguments.append(folder)
        atheris.Setup(arguments, target, custom_mutator=custom)
        atheris.Fuzz()
