"""What each party sees and holds: contexts, parts of the model, optimizers, a client's data, rows of state."""
