"""ELR: predictions are held to what they used to be."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.core.arguments import at_step, check_count, check_number, Number
from lpa_jax.core.perturbation import LOGIT_GRADS, Perturbation, SiteError


def elr(num_examples: int, strength: Number, beta: Number = 0.7) -> Perturbation:
    r"""ELR: early-learning regularization, which holds predictions to what they used to be.

    .. math::
        \ell_i + \lambda \log(1 - \langle p_i, t_i \rangle), \qquad
        t_i \leftarrow \beta t_i + (1 - \beta) p_i

    with `t_i` a moving average of the predictions on example i of the training set, from 0 on, and
    a constant for the gradient. What is added at the logits is the gradient of the second term,
    `lambda * p * (<p, t> - t) / (1 - <p, t>)`; the loss the step returns is without it.

    Args:
      num_examples: Number of training examples N; the state is float32 `[N, C]`.
      strength: The paper's lambda, at least 0, or a schedule. 3 on CIFAR-10 and 7 on CIFAR-100.
      beta: Decay of the average, in [0, 1], or a schedule. 0.7 on CIFAR-10 and 0.9 on CIFAR-100.

    *Ours*: `p` is the softmax of the logits as other perturbations have made them; the denominator
    is at least 1e-4 (the paper's code clips `p`); an example that a batch has several times counts
    once, with the mean of its predictions; after mixing, an example's average is of its mixtures.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if its `extra` does not
        hold the `examples`, int `[B]`; one below 0 or of N or more makes the gradient NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.elr(num_examples=50_000, strength=3.0)
      Perturbation(sites=('logit_grads',))

    References:
      Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020,
      arXiv:2007.00151.
    """
    check_count("num_examples", num_examples)
    check_number("strength", strength)
    check_number("beta", beta, 0.0, 1.0)

    def init(value: Float[Array, "batch classes"]) -> Float[Array, "examples classes"]:
        return jnp.zeros((num_examples, value.shape[1]), jnp.float32)

    def update(
        value, state, params=None, *, weights, logits, examples=None, step=0, axis_name=(), **_
    ):
        del params
        if axis_name:
            raise SiteError(
                "elr keeps a table of all training examples, of which each device of axis_name "
                "would see its own alone: shard the arrays of a jitted step over the devices."
            )
        if examples is None:
            raise ValueError(
                "elr remembers every example of the training set: give the step "
                "extra={'examples': places}, the places of the batch's examples in it."
            )
        if examples.shape != weights.shape or not jnp.issubdtype(examples.dtype, jnp.integer):
            raise ValueError(
                "elr needs an integer for each label in extra['examples'], its example's place in "
                f"the training set, not {examples.dtype} {examples.shape}."
            )
        real = weights > 0
        p = jnp.where(real[:, None], jax.nn.softmax(logits), 0.0)
        # One mean for all of an example's places in the batch: writes to one row have no order.
        same = ((examples[:, None] == examples[None]) & real[None]).astype(jnp.float32)
        total = jnp.matmul(same, p, precision=jax.lax.Precision.HIGHEST)
        own = total / jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1.0)
        decay = at_step(beta, step)
        # Negative numbers would count from the end.
        examples = jnp.where(examples < 0, num_examples, examples)
        before = state.at[examples].get(mode="fill", fill_value=jnp.nan)
        t = jnp.where(real[:, None], decay * before + (1.0 - decay) * own, 0.0)
        state = state.at[jnp.where(real, examples, num_examples)].set(t, mode="drop")
        agreement = jnp.sum(p * t, axis=1, keepdims=True)
        pull = p * (agreement - t) / jnp.maximum(1.0 - agreement, 1e-4)
        return value + (at_step(strength, step) * pull).astype(value.dtype), state

    return Perturbation(LOGIT_GRADS, init, update, needs_gradient=False)
