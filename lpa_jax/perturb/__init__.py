"""The core: perturbations as optax transforms at sites; jax and optax only."""
