"""Models: whole networks by name, their cut into a client and a server part, and auxiliary models for the client.

Every module of this package is imported, so that a new file registers itself.
"""

if __name__ != "cutlayer.models":
    from cutlayer.names import refuse

    refuse(__name__)

from cutlayer.models.building import build_model, check_model, sketched_models
from cutlayer.models.config import ModelConfig
from cutlayer.models.decoder import Decoder, build_attacker
from cutlayer.models.features import feature_width, give_features, leave_out
from cutlayer.models.fitting import input_channels
from cutlayer.models.making import division_of, in_order, make_parts
from cutlayer.models.part_registry import Making, PartConfig, division, part, refinable
from cutlayer.models.parts.auxiliary import AUXILIARY_SIZES, AuxiliaryConfig, build_auxiliary
from cutlayer.models.parts.auxiliary_heads import (
    AuxiliaryHeads,
    AuxiliaryHeadsConfig,
    build_auxiliary_heads,
    forward_with_blocks,
    head_blocks,
)
from cutlayer.models.parts.personal import PersonalConfig, build_personal, variants
from cutlayer.models.parts.projector import Projector
from cutlayer.models.registry import default_cut, names, register
from cutlayer.models.splitting import block_ends, body_and_head, candidates, classifier, cuts, cuts_recorded, split
from cutlayer.models.three import divide
from cutlayer.runtime.ground.registry import import_modules

__all__ = [
    "AUXILIARY_SIZES",
    "AuxiliaryConfig",
    "AuxiliaryHeads",
    "AuxiliaryHeadsConfig",
    "Decoder",
    "Making",
    "ModelConfig",
    "PartConfig",
    "PersonalConfig",
    "Projector",
    "block_ends",
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
    "cuts_recorded",
    "default_cut",
    "divide",
    "division",
    "division_of",
    "feature_width",
    "forward_with_blocks",
    "give_features",
    "head_blocks",
    "in_order",
    "input_channels",
    "leave_out",
    "make_parts",
    "names",
    "part",
    "refinable",
    "register",
    "sketched_models",
    "split",
    "variants",
]

import_modules(__name__, __path__)
