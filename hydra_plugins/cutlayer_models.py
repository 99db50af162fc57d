"""`model=<source>/<name>` as an ordinary choice of the group, without a file for each of the thousands of names."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from cutlayer.runtime.launching.model_names import chosen_model


class ModelsFromElsewhere(ConfigSource):
    """Makes the content of `model/<source>/<name>`: the keys of every model, and the name. Names are checked later."""

    @staticmethod
    def scheme() -> str:
        """As in a search path: models://."""
        return "models"

    def load_config(self, config_path: str) -> ConfigResult:
        """What a file of the group `model` would hold."""
        content = {"defaults": ["/model/_base@_here_", "_self_"], "name": chosen_model(config_path)}
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(content), {"package": None})

    def is_config(self, config_path: str) -> bool:
        """Whether the path is that of a model of one of the sources."""
        return chosen_model(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        """Never: the names cannot be listed without importing their libraries."""
        return False

    def available(self) -> bool:
        """Always."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Nothing, as there is no group."""
        return []


class ModelsOnSearchPath(SearchPathPlugin):
    """Puts them on Hydra's search path, after the project's own files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source."""
        search_path.append("cutlayer", "models://")
