"""What lies beside the package in a checkout goes inside of it in a wheel; an editable install finds it where it is."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Inside(BuildHookInterface):
    """Puts what pyproject.toml lists into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds a wheel; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"] |= {name: f"cutlayer/{name}" for name in self.config["inside"]}
