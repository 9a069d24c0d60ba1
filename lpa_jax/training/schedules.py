"""Learning rates and optimizers by name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpa_jax.training.config import ConfigError


def learning_rate(
    name: str,
    learning_rate: float,
    *,
    epochs: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0.0,
    boundaries: tuple[float, ...] = (),
    factor: float = 0.1,
) -> optax.Schedule:
    """Return a schedule of the step.

    Args:
      name: `"piecewise"`, `"cosine"` (to 0 at the end) or `"constant"`.
      learning_rate: Its value after the warm-up.
      epochs: Length of the run.
      steps_per_epoch: Number of steps an epoch, of the optimizer.
      warmup_epochs: Length of a linear rise from 0.
      boundaries: Epochs at which `"piecewise"` multiplies by `factor`.
      factor: See `boundaries`.

    Raises:
      ConfigError: If there is no such schedule.

    Example:
      >>> rate = learning_rate(
      ...     "piecewise", 0.1, epochs=200, steps_per_epoch=10, boundaries=(100, 150)
      ... )
      >>> [round(float(rate(10 * epoch)), 4) for epoch in (0, 99, 101, 151)]
      [0.1, 0.1, 0.01, 0.001]
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    # The boundaries count from the start of the run, and so does the end of the cosine.
    if name == "piecewise":
        at: dict[int, float] = {}
        for epoch in boundaries:
            step = round(epoch * steps_per_epoch) - warmup
            at[step] = at.get(step, 1.0) * factor
        main = optax.piecewise_constant_schedule(learning_rate, at)
    elif name == "cosine":
        length = max(1, round(epochs * steps_per_epoch) - warmup)
        main = optax.cosine_decay_schedule(learning_rate, length)
    elif name == "constant":
        main = optax.constant_schedule(learning_rate)
    else:
        raise ConfigError(
            f"There is no schedule {name!r}; the schedules are piecewise, cosine and constant."
        )
    if warmup == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), main], [warmup])


def optimizer(
    name: str,
    rate: optax.Schedule,
    weight_decay: float,
    options: Mapping[str, Any],
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """Return an optax optimizer by name, with weight decay added to the gradient.

    Args:
      name: Such as `"sgd"` or `"adamw"`.
      rate: Schedule of the learning rate.
      weight_decay: Factor of the parameters in the gradient; for decoupled decay, put 0 here and
        `weight_decay` among the options of `"adamw"`.
      options: Further arguments of the optimizer.
      accumulate: Number of gradients that are averaged before the parameters move; the schedule
        is of the number of moves.

    Raises:
      ConfigError: If optax has no such optimizer, or it does not take the options.

    Example:
      >>> tx = optimizer("sgd", optax.constant_schedule(0.1), 5e-4, {"momentum": 0.9})
    """
    factory = getattr(optax, name, None)
    if not callable(factory):
        raise ConfigError(f"optax has no optimizer {name!r}; sgd and adamw are two of its names.")
    try:
        inner: Any = factory(rate, **options)
    except TypeError as error:
        raise ConfigError(f"config.optimizer does not fit optax.{name}: {error}.") from error
    trial = {"weight": jnp.zeros(2)}
    try:
        jax.eval_shape(lambda: inner.update(trial, inner.init(trial), trial))
    except Exception as error:  # Of any kind: whatever else optax has under that name.
        raise ConfigError(
            f"optax.{name} is no optimizer that needs nothing but a learning rate and gradients; "
            "sgd and adamw are two."
        ) from error
    if weight_decay:
        inner = optax.chain(optax.add_decayed_weights(weight_decay), inner)
    if accumulate == 1:
        return inner
    return optax.MultiSteps(inner, accumulate).gradient_transformation()
