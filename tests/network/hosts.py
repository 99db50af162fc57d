"""A network of one server and some clients for a test, with links that can be cut, healed and made bad.

As root on Linux the hosts are network namespaces with addresses of their own, else processes on the loopback interface
with a relay for each link. CUTLAYER_TEST_NETWORK=loopback or =namespaces chooses.
"""

import os
from pathlib import Path

from tests.network import namespaces
from tests.network.loopback import Loopback
from tests.network.namespaces import Namespaces
from tests.network.programs import Network

CHOICE = "CUTLAYER_TEST_NETWORK"
FORMS = ("namespaces", "loopback")


def missing(form: str) -> str:
    """Why a network of this form cannot be had here; "" if it can."""
    return namespaces.missing() if form == "namespaces" else ""


def best_form() -> str:
    """The form that the environment asks for, else the one that is nearest to real hosts."""
    chosen = os.environ.get(CHOICE, "")
    assert chosen in ("", *FORMS), f"{CHOICE}={chosen}: one of {', '.join(FORMS)}"
    return chosen or next(form for form in FORMS if not missing(form))


def network(folder: Path, form: str, clients: int = 3) -> Network:
    """To be entered; ``folder`` is empty and belongs to it."""
    return Namespaces(folder, clients) if form == "namespaces" else Loopback(folder, clients)
