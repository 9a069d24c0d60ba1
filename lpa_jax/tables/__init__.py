"""Tables of methods by seeds: their rows, the runs they ask for, and how these compare."""

from lpa_jax import extras

extras.require_train(__name__)
