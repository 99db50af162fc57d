"""Cutting models: any `nn.Module` in two or more parts, at the end of any of its modules."""

from cutlayer.models.cutting.cut import split_module
from cutlayer.models.cutting.parts import Chain, Crossing, Part, is_ghost, through
from cutlayer.models.cutting.splitter import CutError
from cutlayer.models.cutting.verify import composed

__all__ = ["Chain", "Crossing", "CutError", "Part", "composed", "is_ghost", "split_module", "through"]
