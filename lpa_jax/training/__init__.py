"""The trainer: configuration, state, step, loop, checkpoints and results."""

from lpa_jax import extras

extras.require_train(__name__)
