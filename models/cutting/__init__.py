"""Cutting models: any `nn.Module` in two or more parts, at the end of any of its modules."""

from models.cutting.parts import Chain, Crossing, Part, is_ghost, through
from models.cutting.splitter import CutError, split_module
from models.cutting.verify import composed

__all__ = ["Chain", "Crossing", "CutError", "Part", "composed", "is_ghost", "split_module", "through"]
