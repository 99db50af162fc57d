"""Make certificates for a server and its clients: `python certificates.py certs server=cutlayer.example clients=3`.

The folder gets an authority of its own, a certificate for the server under the names given, and one for each client.
Given again with more clients, it adds what is missing; with renew=true it also makes anew what the command names;
with revoke=3 the server takes none of client 3's certificates any more but those that are made later.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_errors, print_lines

if TYPE_CHECKING:
    from cutlayer.runtime.network.certificates.authority import Done, Order

KEYS = ("server", "clients", "client_id", "days", "renew", "revoke")
MOST = 100_000


def main(arguments: list[str] | None = None) -> int:
    """Make what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Make the certificates by which a server and its clients know each other.",
        epilog="Keys: server=NAME,ADDRESS under which clients reach the server; clients=3 for clients 0 to 2; "
        "client_id=3,7 for single ones; days=825 that certificates are valid; "
        "renew=true to make anew what is named and there already; "
        "revoke=3,7 to list what clients 3 and 7 have as not to be taken any more.",
    )
    parser.add_argument("argument", nargs="+", help="the folder of the certificates, and key=value")
    try:
        folder, given = _read(parser.parse_args(arguments).argument)
        if importlib.util.find_spec("cryptography") is None:
            raise ConfigError("", NO_VALUE, f"the package cryptography is not installed: {install('grpc')}")
        from cutlayer.runtime.network.certificates.authority import make_certificates  # late: it imports that package

        order = _order(given)
        _show(folder, make_certificates(folder, order), order)
    except ConfigError as error:
        print_errors(error)
        return 1
    except KeyboardInterrupt:
        print_errors("interrupted; nothing was made")
        return 130
    return 0


def _read(texts: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The folder, and the values by key, of a command line."""
    folders = [text for text in texts if "=" not in text or Path(text).exists()]
    given: dict[str, str] = {}
    for text in texts:
        if text in folders:
            continue
        key, _, value = text.partition("=")
        if key not in KEYS:
            raise ConfigError.unknown_key(key, KEYS)
        if key in given:
            raise ConfigError(key, value, "one value; several are given as key=one,other")
        given[key] = value
    if len(folders) != 1:
        raise ConfigError("folder", ",".join(folders), "one folder for the certificates, such as certs")
    if not {"server", "clients", "client_id", "revoke"} & given.keys():
        raise ConfigError("", NO_VALUE, "name what to make: server=cutlayer.example,10.0.0.1 clients=3")
    return Path(folders[0]), given


def _order(given: Mapping[str, str]) -> Order:
    from cutlayer.runtime.network.certificates.authority import Order

    clients = [*range(_number("clients", given["clients"]))] if "clients" in given else []
    clients += [_number("client_id", text) for text in _several(given, "client_id")]
    renew = given.get("renew", "false").lower()
    if renew not in ("true", "false"):
        raise ConfigError("renew", renew, "true or false")
    days = _number("days", given["days"]) if "days" in given else Order.days
    revoked = {_number("revoke", text) for text in _several(given, "revoke")}
    named = (tuple(_several(given, "server")), tuple(sorted(set(clients))))
    return Order(*named, days, renew == "true", tuple(sorted(revoked)))


def _several(given: Mapping[str, str], key: str) -> list[str]:
    """The values of a key that takes several: a,b or [a,b]."""
    if key not in given:
        return []
    return [text.strip() for text in given[key].removeprefix("[").removesuffix("]").split(",")]


def _number(key: str, text: str) -> int:
    of_client = key in ("client_id", "revoke")
    least = 0 if of_client else 1
    if not (text.isascii() and text.isdigit() and least <= int(text) <= MOST):
        expected = "numbers of clients, such as 3,7" if of_client else f"a whole number from 1 to {MOST}"
        raise ConfigError(key, text, expected)
    return int(text)


def _show(folder: Path, done: Done, order: Order) -> None:
    """What was made, and which file belongs on which machine."""
    from cutlayer.runtime.network.certificates.revoked import REVOKED
    from cutlayer.runtime.network.certificates.tls import number_of

    for verb, ends in (("made", done.made), ("kept", done.kept)):
        clients = sorted(number_of(stem) for stem in ends if stem.startswith("client-"))
        if "ca" in ends:
            print_lines(f"{verb}  the authority, valid until {ends['ca']:%Y-%m-%d}")
        if "server" in ends:
            print_lines(
                f"{verb}  the server's certificate, until {ends['server']:%Y-%m-%d}, for {', '.join(done.names)}"
            )
        if clients:
            last = min(ends[f"client-{client}"] for client in clients)
            print_lines(
                f"{verb}  {'clients' if len(clients) > 1 else 'client'} {_ranges(clients)}, until {last:%Y-%m-%d}"
            )
    if order.revoke:
        print_lines(
            f"revoked  all that {'clients' if len(order.revoke) > 1 else 'client'} {_ranges(order.revoke)} had so far"
        )
    if done.listed:
        print_lines("", f"The server gets {folder / REVOKED} next to its files, and reads it again while it runs.")
    if not order.server and not order.clients:
        return
    print_lines("", f"Each machine gets three files of {folder}, in a folder that transport.certificates names there:")
    if "server" in done.made | done.kept:
        print_lines("  the server    ca.pem server.pem server.key")
    for client in order.clients[:3]:
        print_lines(f"  {f'client {client}':<13} ca.pem client-{client}.pem client-{client}.key")
    if len(order.clients) > 3:
        print_lines("  ...")
    print_lines("ca.key stays here: with it, anyone can make certificates for any client.")
    if "server" not in done.made | done.kept:
        print_lines("There is none for the server yet: server=NAME,ADDRESS under which clients reach it.")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-2, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


if __name__ == "__main__":
    run_program(main)
