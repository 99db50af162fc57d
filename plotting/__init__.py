"""Figures and tables of finished runs: reading them, averaging over seeds, drawing, and composing a set of figures."""

from cutlayer.plotting.figures import first_picture

__all__ = ["first_picture"]
