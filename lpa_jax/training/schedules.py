"""Learning rates and optimizers by name."""

from collections.abc import Callable, Mapping
import difflib
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

OPTIONS = {"sgd": {"momentum": 0.9, "nesterov": True}}
"""Of optimizers, where they are not those of optax."""


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
      ValueError: If there is no such schedule.

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
        raise ValueError(
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
    decay: Literal["all", "kernels"] = "all",
) -> optax.GradientTransformation:
    """Return an optax optimizer by name, with weight decay added to the gradient.

    Args:
      name: Of optax or `optax.contrib`, such as `"sgd"`, `"adamw"`, `"prodigy"`.
      rate: Schedule of the learning rate.
      weight_decay: Factor of the parameters in the gradient; for decoupled decay, put 0 here and
        `weight_decay` among the options of `"adamw"`.
      options: Further arguments of the optimizer. One that is None has its default: of `"sgd"` that
        in `OPTIONS`, else optax's.
      accumulate: Number of gradients that are averaged before the parameters move; the schedule
        is of the number of moves.
      decay: Which parameters decay: all, or those of at least two axes, without biases and scales.

    Raises:
      ValueError: If optax has no such optimizer, or it does not take the options.

    Example:
      >>> tx = optimizer("sgd", optax.constant_schedule(0.1), 5e-4, {"momentum": 0.9})
    """
    given = {key: OPTIONS.get(name, {}).get(key) if v is None else v for key, v in options.items()}
    given = {key: value for key, value in given.items() if value is not None}
    known = _optimizers()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"There is no optimizer {name!r} of optax or optax.contrib that takes a learning rate "
            f"first; {hint}sgd, adamw and prodigy are three that do."
        )
    if name.startswith("schedule_free"):
        raise ValueError(
            f"config.optimizer.name cannot be {name!r}: its networks are to be evaluated with "
            "other parameters than are trained, which this trainer does not do; adamw is one that "
            "can be used."
        )
    factory = known[name]
    taken = list(inspect.signature(factory).parameters)
    for key in sorted(set(given) - set(taken[1:])):
        raise ValueError(
            f"config.optimizer.options does not fit {name}: it takes no {key!r}, but "
            f"{', '.join(taken[1:])}."
        )
    trial = {"weight": jnp.zeros((2, 2))}
    try:
        inner: Any = factory(rate, **given)
        jax.eval_shape(lambda: inner.update(trial, inner.init(trial), trial))
    except Exception as error:  # Of any kind: whatever optax does with what it is given.
        reason = str(error).strip().partition("\n")[0]
        told = f"with the options {given} " if given else ""
        raise ValueError(
            f"The optimizer {name} {told}cannot be used ({reason}): give config.optimizer.options "
            "what it takes, or choose one that needs gradients and a learning rate alone, such as "
            "adamw."
        ) from error
    if weight_decay:
        mask = None if decay == "all" else _kernels
        inner = optax.chain(optax.add_decayed_weights(weight_decay, mask), inner)
    if accumulate == 1:
        return inner
    return optax.MultiSteps(inner, accumulate).gradient_transformation()


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _optimizers() -> dict[str, Callable[..., Any]]:
    """Return by name what optax and its contributions make of a learning rate."""
    found = {**vars(optax.contrib), **vars(optax)}
    return {
        name: function
        for name, function in found.items()
        if inspect.isfunction(function)
        and next(iter(inspect.signature(function).parameters), "") == "learning_rate"
        and not name.startswith(("_", "scale_by_"))
    }
