"""A federation and its rounds: what both parties make of a configuration, the schedules, checkpoints."""
