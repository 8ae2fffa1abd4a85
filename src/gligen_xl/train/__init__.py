"""Training of adapters: configuration, objective, loop, validation, checkpoints."""
