"""Attacks on the pixels of a trained network: FGSM and PGD, from a random start.

They move images within `[0, 1]` uphill in the loss at the true labels.
"""

import jax
import jax.numpy as jnp

from lpa_jax.core.pgd import climb_within
from lpa_jax.training.predict import Change

EPSILON = 8 / 255
BOUNDS = (0.0, 1.0)


def fgsm(epsilon: float = EPSILON) -> Change:
    """Return the fast gradient sign attack: one step of `epsilon` along the gradient's sign.

    Args:
      epsilon: Largest change of a pixel in [0, 1], at least 0.

    Returns:
      What `predict.make_predict` takes as `change`.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = lambda images: images.reshape(1, 2) @ jnp.array([-1.0, 4.0])
      >>> images = jnp.array([0.5, 0.0]).reshape(1, 1, 2, 1)
      >>> fgsm(0.1)(losses, images, jnp.array([0])).ravel()
      Array([0.4, 0.1], dtype=float32)

    References:
      Goodfellow, Shlens and Szegedy, Explaining and Harnessing Adversarial Examples, ICLR 2015,
      arXiv:1412.6572.
    """

    def change(losses, images, index):
        del index
        start = jnp.zeros(images.shape, jnp.float32)
        return _attack(losses, images, start, epsilon, epsilon, 1)

    return change


def pgd(
    epsilon: float = EPSILON, step_size: float = 2 / 255, steps: int = 20, seed: int = 0
) -> Change:
    """Return the projected gradient attack in the l-infinity ball, from a random point of it.

    Args:
      epsilon: Largest change of a pixel in [0, 1], at least 0.
      step_size: Length of a step along the gradient's sign, at least 0.
      steps: Number of steps, at least 1; the defaults are PGD-20.
      seed: With the number of an example, decides where its attack starts.

    Returns:
      What `predict.make_predict` takes as `change`.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = lambda images: images.reshape(1, 2) @ jnp.array([-1.0, 4.0])
      >>> images = jnp.array([0.5, 0.0]).reshape(1, 1, 2, 1)
      >>> attack = pgd(0.1, step_size=0.05, steps=4)
      >>> attack(losses, images, jnp.array([0])).ravel()
      Array([0.4, 0.1], dtype=float32)

    References:
      Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018,
      arXiv:1706.06083.
    """

    def change(losses, images, index):
        start = random_start(images, index, epsilon, seed)
        return _attack(losses, images, start, epsilon, step_size, steps)

    return change


def random_start(images: jax.Array, index: jax.Array, epsilon: float, seed: int = 0) -> jax.Array:
    """Return a change of each image, uniform in the ball, by its number: the same in any batch."""

    def draw(i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        return jax.random.uniform(key, images.shape[1:], minval=-epsilon, maxval=epsilon)

    return jnp.clip(images + jax.vmap(draw)(index), *BOUNDS) - images


def _attack(losses, images, delta, epsilon, step_size, steps):
    uphill = jax.grad(lambda moved: jnp.sum(losses(moved)))
    return images + climb_within(uphill, images, delta, epsilon, step_size, steps, "linf", BOUNDS)
