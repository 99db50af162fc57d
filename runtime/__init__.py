"""The engine: the boundary between parties, its accounting, the round loop and everything a run leaves behind."""
