"""Models: whole networks by name, their cut into a client and a server part, and auxiliary models for the client."""

from models import resnet, small  # noqa: F401  (they register their models)
from models.auxiliary import build_auxiliary
from models.building import build_model, check_model
from models.config import AUXILIARY_SIZES, AuxiliaryConfig, ModelConfig, PartConfig
from models.registry import default_cut, names, register
from models.splitting import cuts, split

__all__ = [
    "AUXILIARY_SIZES",
    "AuxiliaryConfig",
    "ModelConfig",
    "PartConfig",
    "build_auxiliary",
    "build_model",
    "check_model",
    "cuts",
    "default_cut",
    "names",
    "register",
    "split",
]
