"""The parts of models. Every module of this package is imported, so that a new file registers itself."""

from cutlayer.runtime.ground.registry import import_modules

import_modules(__name__, __path__)
