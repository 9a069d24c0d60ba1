"""The trainer: configuration, state, step, loop, checkpoints and report."""
