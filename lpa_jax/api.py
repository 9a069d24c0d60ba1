"""What a user calls: `value_and_grad` and `list_sites`, for any kind of network."""

from collections.abc import Callable, Mapping, Sequence
import functools
import sys
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import optax

from lpa_jax.backends.functions import open_function
from lpa_jax.backends.haiku import open_haiku
from lpa_jax.backends.linen import open_linen
from lpa_jax.backends.naming import CALL
from lpa_jax.backends.nnx import open_nnx
from lpa_jax.core import arguments, checks
from lpa_jax.core.class_stats import ClassStatistic
from lpa_jax.core.network import Backend, Call, Network, Rows
from lpa_jax.core.perturbation import (
    Chain,
    chain,
    INPUTS,
    LABELS,
    LOGIT_GRADS,
    LOGITS,
    Perturbation,
)
from lpa_jax.core.step import FIXED, LossFn, Step
from lpa_jax.tasks.classification import softmax_statistic


def value_and_grad(
    model: Any,
    perturbation: Perturbation | Chain,
    *,
    num_classes: int,
    loss_fn: LossFn | None = None,
    logits: Callable[[Any], Array] | None = None,
    per_example: Sequence[str] = (),
    methods: Sequence[str] = (),
    axis_name: str | Sequence[str] | None = None,
    class_statistic: ClassStatistic | None = None,
) -> Step:
    """Build a training step's loss and gradient, with perturbations at their sites.

    The result is a pure function, to be used inside the caller's own `jax.jit` (outside of one,
    parts of it are compiled anew at every call):
    `(loss, aux), grads, state = step(variables, state, inputs, labels, key, weights=w,
    extra={"examples": i}, **kwargs)`

    - `variables`: of a Linen model what `model.init` returned, a mapping with `"params"`; of an NNX
      model the model, which is not mutated; of a Haiku function its parameters, or
      `(params, state)`; of a plain function its parameters. `grads` is of the form of the
      parameters: Linen's `"params"`, an `nnx.State` for `optimizer.update`, a tree.
    - `state`: from `step.init(variables, inputs, labels, **kwargs)`.
    - `inputs`: `[B, ...]`, an array or a tree of arrays, which the network takes as one argument.
    - `labels`: int `[B]` in `[0, C)`, or float `[B, C]`. The label -1 says that an example does not
      count, as a weight of 0 does. Any other label outside of the classes is an error; where labels
      are traced, as in `jax.jit`, the loss is NaN. Of logits `[B, T, C]` the labels are `[B, T]` or
      `[B, T, C]`: classes, weights and perturbations are then those of positions, and sites are the
      values `[B, T, ...]`. Of two classes a network may return one logit, `[B]` or `[B, 1]`: that
      of class 1, with that of class 0 taken as 0.
    - `key`: a PRNG key. The step count is folded in, so the same key may be given at every step.
    - `weights`: float like integer labels, or `[B]`, at least 0: 1 for real examples (default) and
      0 for padding, whose inputs and labels are taken as 0. Batch normalization sees padding all
      the same.
    - `extra`: a mapping of arrays `[B, ...]` that every transform is given by their names, such as
      `{"examples": i}`, int `[B]`, for `elr`, which remembers each example of the training set by
      its place, or `{"domains": d}` for `mixstyle`, `coral` and others. Of labels `[B, T]` they
      are `[B, T, ...]`, or `[B, ...]` where all positions of an example share an entry.
    - `kwargs`: passed on to the network, such as `train=True, mutable=["batch_stats"]` (Linen) or
      `rng=key` (Haiku). Those whose names are taken, such as `labels`, are given in the mapping
      `apply_kwargs`.
    - `loss`: the weighted mean, float32. `aux["logits"]`: the network's output before perturbations
      of the logits. `aux["labels"]`: the labels, mixed where the examples were; integer labels are
      -1 where an example does not count. `aux["updates"]`: the mutated state, for
      `variables | updates` (Linen, where `mutable` names it), `nnx.update(model, updates)` or as
      Haiku's new state. `aux["metrics"]`: for each site perturbed, how far each class was moved
      (`"norm"`, `"relative"` to the value, `"count"` of examples; `[C]`), and the `"sign"` and
      `"radius"` that LPA, LPL and LPG chose, and LPL's number of `"steps"`.

    What a transform's `update` receives is told by `lpa_jax.core.perturbation.Update`.

    Args:
      model: `model.apply` of a Flax Linen model, or a function that calls it; an NNX model; what
        `hk.transform` or `hk.transform_with_state` returned; or `fn(params, inputs, **kwargs)`,
        such as a function that combines an Equinox model, with `lpa_jax.tap("name", value)` inside.
      perturbation: A chain, or a single perturbation; `chain()` gives plain training. In the name
        of a site `*` stands for any part between slashes, as in `"layer*/mlp"`, and `**` for any.
      num_classes: Number of classes C.
      loss_fn: Maps float32 logits and targets, both `[B, C]`, to losses `[B]`, by operations that
        JAX can trace; default `optax.softmax_cross_entropy`.
      logits: Which part of the network's output is the logits, as in `lambda output: output[0]`;
        None if that is all it returns.
      per_example: Names of keyword arguments that hold a value for each example, `[B, ...]`, as
        attention masks do. Where an example is padding, those of a real one are used. Mixing is
        refused.
      methods: Names of methods of layers that make sites beside `__call__`: `"layer.encode"`.
      axis_name: Names of axes over which the step is mapped by `shard_map` or `pmap`: the means of
        classes are then those of the batches of all devices. Loss and gradient are each device's
        own, to be averaged by `jax.lax.pmean`, which gives the weighted mean over all examples; SAM
        moves by it, and draws differ.
      class_statistic: What float32 logits `[B, C]` say of each class, confidence in [0, 1] and
        correctness (0 or 1), `[B, C]` each: what `splits` decide by. Default the softmax, and 1 for
        the largest logit.

    Returns:
      The step.

    Raises:
      TypeError: If an entry of the chain has no site, or the model is of no known kind.
      ValueError: If `num_classes` is less than 2. The step raises `SiteError` (a ValueError) where
        a perturbation cannot act at its site, and ValueError where labels, weights, what is
        extra, logits or losses have the wrong shape or name.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lpa_jax
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(3)])
      >>> inputs, labels = jnp.ones((4, 5)), jnp.array([0, 1, 2, 0])
      >>> variables = model.init(jax.random.key(0), inputs)
      >>> perturbation = lpa_jax.lpa("layers_0", epsilon=0.1, split=lpa_jax.splits.all_positive())
      >>> step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=3)
      >>> state = step.init(variables, inputs, labels)
      >>> (loss, aux), grads, state = step(variables, state, inputs, labels, jax.random.key(1))
      >>> loss.shape, aux["logits"].shape, aux["metrics"]["layers_0"]["relative"].round(4).tolist()
      ((), (4, 3), [0.1, 0.1, 0.1])
    """
    arguments.check_count("num_classes", num_classes, low=2)
    functions = {"loss_fn": loss_fn, "logits": logits, "class_statistic": class_statistic}
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {function!r}.")
    return Step(
        backend_of(model, methods),
        chain(perturbation),
        num_classes,
        optax.softmax_cross_entropy if loss_fn is None else loss_fn,
        softmax_statistic if class_statistic is None else class_statistic,
        logits,
        _several("per_example", per_example),
        _axes(axis_name),
    )


class Sites(dict[str, jax.ShapeDtypeStruct]):
    """Shape and dtype of the value at each site, by its name, in the order of computation.

    Attributes:
      refused: Why each other layer or named value is no site, by its name.
      costs: What a gradient step at each site within the network costs: the FLOPs of what comes
        after it, as a share of the FLOPs of the whole network, counted by the shapes of the traced
        program and, in a scan, by its turns. Of several calls it is the sum.
    """

    def __init__(
        self,
        found: Mapping[str, jax.ShapeDtypeStruct],
        refused: Mapping[str, str],
        costs: Mapping[str, float],
    ):
        """Keep what was found."""
        super().__init__(found)
        self.refused, self.costs = dict(refused), dict(costs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell how to copy it."""
        return Sites, (dict(self), self.refused, self.costs)

    def __str__(self) -> str:
        """Return a table of the sites, and why others are none."""
        width = max(map(len, [*self, *self.refused]))
        lines = [f"{name:{width}}  {value.dtype}{[*value.shape]}" for name, value in self.items()]
        lines += [f"{name:{width}}  no site: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def list_sites(
    model: Any,
    variables: PyTree,
    inputs: PyTree,
    *,
    logits: Callable[[Any], Array] | None = None,
    per_example: Sequence[str] = (),
    methods: Sequence[str] = (),
    axis_name: str | Sequence[str] | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    **more_apply_kwargs: Any,
) -> Sites:
    """Name the sites of a model with their shapes, in the order in which they are computed.

    A layer called several times, and a stack of layers under a scan, is one site for all its calls
    and one for each, `"layers[0]"`, `"layers[1]"`... Each array of a layer that returns several
    is one, `"block:0"`, `"block:1"`. So is a value that the model names by `lpa_jax.tap` or
    `jax.ad_checkpoint.checkpoint_name`. Values within loops whose number of turns is not known,
    branches and functions with derivatives of their own are none, and neither are values without an
    axis that grows with the batch: `refused` tells why, for each. The site `"param_grads"`, whose
    value is a tree like the parameters, is not listed. A layer that has the name of another site,
    such as `"logits"`, is no site of its own. Layers of the same name, as of two models called in
    one function, are numbered on, and so are layers without parameters under `nn.jit` that are
    alike. The model is traced twice, and nothing is computed.

    Args:
      model: As in `value_and_grad`.
      variables: As in its step.
      inputs: A batch, `[B, ...]`; its shapes and dtypes count.
      logits: As in `value_and_grad`.
      per_example: As in `value_and_grad`.
      methods: As in `value_and_grad`.
      axis_name: As in `value_and_grad`.
      apply_kwargs: What a training step passes to the network under names that are taken here.
      **more_apply_kwargs: What it passes besides.

    Returns:
      Shape and dtype of the value at each site, a dictionary with `refused` and `costs`. If the
      inputs are a tree, they are listed by its paths, though they are one site.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lpa_jax
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(3)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 5)))
      >>> found = lpa_jax.list_sites(model.apply, variables, jnp.ones((4, 5)))
      >>> print(found)
      inputs       float32[4, 5]
      labels       float32[4, 3]
      layers_0     float32[4, 8]
      layers_1     float32[4, 3]
      logits       float32[4, 3]
      logit_grads  float32[4, 3]
      >>> print(found.costs)
      {'layers_0': 0.36, 'layers_1': 0.0}
    """
    network = backend_of(model, methods)(variables)
    kwargs = checks.merged(apply_kwargs, more_apply_kwargs)
    names = _several("per_example", per_example)
    held, given = checks.divided(kwargs, names)
    call = Call(network, held, logits, _axes(axis_name))
    checks.batch_of(inputs)
    whole = (network.params, network.rest, inputs)
    params, rest, abstract = jax.tree.map(checks.shape_of, whole)
    args = (params, rest, abstract, given)
    program = call.trace(*args)
    if not (raw := program.shapes[0].shape):
        raise ValueError("The network returns a single number, not logits [batch, num_classes].")
    # Of two classes there may be one logit.
    rows, classes = (raw[:1], 2) if len(raw) == 1 else (raw[:-1], max(raw[-1], 2))
    larger = call.trace_larger(*args)
    places, refused = call.places(program, larger, Rows(rows), FIXED)
    found = {
        name: jax.ShapeDtypeStruct(place.site.shape, place.site.dtype)
        for place in places
        for name in (place.site.given, place.site.name)
    }
    ends = jax.ShapeDtypeStruct((*rows, classes), jnp.float32)
    first = {
        f"{INPUTS}{jax.tree_util.keystr(path)}": value
        for path, value in jax.tree_util.tree_leaves_with_path(abstract)
    }
    last = {LOGITS: ends, LOGIT_GRADS: ends}

    each, costs = program.costs(), dict.fromkeys(found, 0.0)
    for place in places:
        for name in dict.fromkeys(place.names):
            costs[name] += each[place.site.name]
    return Sites({**first, LABELS: ends, **found, **last}, refused, costs)


def backend_of(model: Any, methods: Sequence[str] = ()) -> Backend:
    """Return what opens the variables of a model, by the kind of the model.

    Raises:
      TypeError: If it is of no known kind.
    """
    named = (CALL, *_several("methods", methods))
    if isinstance(model, nn.Module):
        raise TypeError("Give value_and_grad model.apply, not the Linen model itself.")
    if isinstance(model, nnx.Module):
        return functools.partial(open_nnx, named)
    if (haiku := sys.modules.get("haiku")) is not None and isinstance(
        model, (haiku.Transformed, haiku.TransformedWithState)
    ):
        return functools.partial(open_haiku, model, named)
    if not callable(model):
        raise TypeError(
            f"value_and_grad takes model.apply of a Linen model, an NNX model, what Haiku "
            f"transformed, or a function of parameters and inputs, not {type(model).__name__}."
        )

    def open_callable(variables: PyTree) -> Network:
        # What calls a Linen model may be any function; the variables tell.
        if isinstance(variables, Mapping) and isinstance(variables.get("params"), Mapping):
            return open_linen(model, named, variables)
        if isinstance(variables, nnx.Module):
            raise TypeError("Give value_and_grad the NNX model itself, not a function.")
        if isinstance(getattr(model, "__self__", None), nn.Module):
            raise ValueError(
                "The variables must be what model.init returned, a mapping with 'params': give "
                "{'params': params}."
            )
        return open_function(model, variables)

    return open_callable


def _several(name: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name} takes several names, as in ({names!r},), not {names!r}.")
    return tuple(names)


def _axes(axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
