"""Figures and tables of finished runs: reading them, averaging over seeds, drawing, and composing a set of figures."""

if __name__ != "cutlayer.plotting":
    from cutlayer.names import refuse

    refuse(__name__)

from cutlayer.plotting.figures import first_picture

__all__ = ["first_picture"]
