"""How the extras of pyproject.toml are installed, for an error's line."""

from cutlayer import IN_CHECKOUT


def install(extra: str) -> str:
    """The command that brings an extra's packages, e.g. pip install -e ".[grpc]" in a checkout."""
    return f'pip install -e ".[{extra}]"' if IN_CHECKOUT else f'pip install "cutlayer[{extra}]"'
