"""Models: whole networks by name, their cut into a client and a server part, and auxiliary models for the client."""

from models import mobilenet, resnet, small, sources, vgg, vit  # noqa: F401  (they register their models)
from models.auxiliary import build_auxiliary
from models.building import build_model, check_model
from models.config import (
    AUXILIARY_SIZES,
    AuxiliaryConfig,
    AuxiliaryHeadsConfig,
    ModelConfig,
    PartConfig,
    PersonalConfig,
)
from models.cutting import Chain, through
from models.decoder import Decoder, build_attacker
from models.features import Projector, feature_width, give_features, leave_out
from models.fitting import input_channels
from models.heads import AuxiliaryHeads, build_auxiliary_heads, forward_with_blocks, head_blocks
from models.registry import default_cut, names, register
from models.splitting import body_and_head, candidates, classifier, cuts, split
from models.three import build_personal, divide

__all__ = [
    "AUXILIARY_SIZES",
    "AuxiliaryConfig",
    "AuxiliaryHeads",
    "AuxiliaryHeadsConfig",
    "Chain",
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
    "through",
]
