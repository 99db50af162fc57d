"""The engine: the boundary between parties, its accounting, the round loop and everything a run leaves behind."""

if __name__ != "cutlayer.runtime":
    from cutlayer.names import refuse

    refuse(__name__)
