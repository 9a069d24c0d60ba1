"""What a step is made of, on jax and optax alone."""
