"""Models: whole networks by name, their cut into a client and a server part, and auxiliary models for the client.

Every module of this package is imported, so that a new file registers itself.
"""

if __name__ != "cutlayer.models":
    from cutlayer.names import refuse

    refuse(__name__)

from cutlayer.models.auxiliary import build_auxiliary
from cutlayer.models.building import build_model, check_model
from cutlayer.models.config import (
    AUXILIARY_SIZES,
    AuxiliaryConfig,
    AuxiliaryHeadsConfig,
    ModelConfig,
    PartConfig,
    PersonalConfig,
)
from cutlayer.models.decoder import Decoder, build_attacker
from cutlayer.models.features import Projector, feature_width, give_features, leave_out
from cutlayer.models.fitting import input_channels
from cutlayer.models.heads import AuxiliaryHeads, build_auxiliary_heads, forward_with_blocks, head_blocks
from cutlayer.models.registry import default_cut, names, register
from cutlayer.models.splitting import body_and_head, candidates, classifier, cuts, split
from cutlayer.models.three import build_personal, divide
from cutlayer.runtime.ground.registry import import_modules

__all__ = [
    "AUXILIARY_SIZES",
    "AuxiliaryConfig",
    "AuxiliaryHeads",
    "AuxiliaryHeadsConfig",
    "Decoder",
    "ModelConfig",
    "PartConfig",
    "PersonalConfig",
    "Projector",
    "body_and_head",
    "build_attacker",
    "build_auxiliary",
    "build_auxiliary_heads",
    "build_model",
    "build_personal",
    "candidates",
    "check_model",
    "classifier",
    "cuts",
    "default_cut",
    "divide",
    "feature_width",
    "forward_with_blocks",
    "give_features",
    "head_blocks",
    "input_channels",
    "leave_out",
    "names",
    "register",
    "split",
]

import_modules(__name__, __path__)
