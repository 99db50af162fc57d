"""A client's end of a run between machines."""
