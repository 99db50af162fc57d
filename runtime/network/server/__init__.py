"""The server's end of a run between machines."""
