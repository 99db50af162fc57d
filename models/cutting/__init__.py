"""Cutting models: any `nn.Module` in two or more parts, at the end of any of its modules."""

from cutlayer.models.cutting.crossing import Crossing, Several, SeveralError, as_crossing, tensors
from cutlayer.models.cutting.cut import split_module
from cutlayer.models.cutting.parts import Part, is_ghost
from cutlayer.models.cutting.splitter import CutError
from cutlayer.models.cutting.verify import composed

__all__ = [
    "Crossing",
    "CutError",
    "Part",
    "Several",
    "SeveralError",
    "as_crossing",
    "composed",
    "is_ghost",
    "split_module",
    "tensors",
]
