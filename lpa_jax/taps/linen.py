"""Names the values of `flax.linen` models; the only file that knows Flax's interceptors."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import optax

from lpa_jax.core.program import Program, tap
from lpa_jax.perturb import engine, sites

# In which every module finds its path; it does not leave the trace.
COLLECTION = "lpa_jax"


def value_and_grad(
    apply_fn: Callable[..., Any],
    perturbation: sites.Perturbation | sites.Chain,
    *,
    num_classes: int,
    loss_fn: engine.LossFn | None = None,
) -> engine.Step:
    """Build a training step's loss and gradient, with perturbations at their sites.

    The result is a pure function, to be used inside the caller's own `jax.jit` (outside of one,
    parts of it are compiled anew at every call):
    `(loss, aux), grads, state = step(variables, state, inputs, labels, key, weights=w, examples=i,
    **kwargs)`

    - `variables`: what `model.init` returned; the gradient is with respect to its `"params"`.
    - `state`: from `step.init(variables, inputs, labels, **kwargs)`.
    - `inputs`: `[B, ...]`. `labels`: int `[B]` in `[0, C)`, or float `[B, C]`. The label -1 says
      that an example does not count, as a weight of 0 does. Any other label outside of the classes
      is an error; where labels are traced, as in `jax.jit`, the loss is NaN.
    - `key`: a PRNG key. The step count is folded in, so the same key may be given at every step.
    - `weights`: float `[B]`, at least 0: 1 for real examples (default) and 0 for padding, whose
      inputs and labels are taken as 0. Batch normalization sees padding all the same.
    - `examples`: int `[B]`, which examples of the training set these are, for the perturbations
      that remember each of them (`elr`); others do without.
    - `kwargs`: passed on to `apply_fn`, such as `train=True, mutable=["batch_stats"]`.
    - `loss`: the weighted mean, float32. `aux["logits"]`: the network's output `[B, C]` before
      perturbations of the logits. `aux["labels"]`: the labels, mixed where the examples were;
      integer labels are -1 where an example does not count.
      `aux["updates"]`: the mutated collections. `aux["metrics"]`: for each site perturbed, how far
      each class was moved (`"norm"`, `"relative"` to the value, `"count"` of examples; `[C]`), and
      the `"sign"` and `"radius"` that LPA, LPL and LPG chose, and LPL's number of `"steps"`.

    A transform's `update` receives, keyword-only: `site`, `key`, `step`, `labels` (the class
    membership: int `[B]`, or float `[B, C]` after mixing), `targets` `[B, C]`, `weights`,
    `examples` (None where the step was given none), `class_stats` (`statistics.ClassStats`), and
    `gradient_fn(value)`, which returns per-example losses `[B]` and their gradient through the rest
    of the network (None where the site has none). At `"logit_grads"` there are also the `logits` at
    which the gradient was taken. At `"param_grads"` the value is the gradient tree, and
    `gradient_fn(params)` returns loss and gradient. Optax's third argument, `params`, is the
    network's parameters, through which gradients flow.

    Args:
      apply_fn: `model.apply` of a Flax linen model that returns logits `[B, num_classes]`.
      perturbation: A chain, or a single perturbation; `chain()` gives plain training.
      num_classes: Number of classes C.
      loss_fn: Maps float32 logits and targets, both `[B, C]`, to losses `[B]`, by operations that
        JAX can trace; default `optax.softmax_cross_entropy`.

    Returns:
      The step.

    Raises:
      TypeError: If an entry of the chain has no site.
      ValueError: If `num_classes` is less than 2. The step raises `SiteError` (a ValueError) where
        a perturbation cannot stand at its site, and ValueError where labels, weights, logits or
        losses have the wrong shape.

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
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}.")
    loss_fn = optax.softmax_cross_entropy if loss_fn is None else loss_fn
    return engine.Step(LinenNetwork(apply_fn), sites.chain(perturbation), num_classes, loss_fn)


def list_sites(
    apply_fn: Callable[..., Any],
    variables: PyTree,
    inputs: Float[Array, "batch ..."],
    **apply_kwargs: Any,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Name the sites of a model with their shapes, in the order in which they are computed.

    A module called several times, and a layer stack under `nn.scan`, is one site for all its calls
    and one for each, `"layers[0]"`, `"layers[1]"`... Each array of a module that returns several
    is one, `"block:0"`, `"block:1"`. Values within loops whose number of turns is not known,
    branches and functions with derivatives of their own are none. The site `"param_grads"`, whose
    value is a tree like the parameters, is not listed. A module that has the name of another site,
    such as `"logits"`, is no site of its own. Nothing is computed.

    Args:
      apply_fn: `model.apply` of a Flax linen model that returns logits.
      variables: What `model.init` returned.
      inputs: A batch, `[B, ...]`; its shape and dtype count.
      **apply_kwargs: What a training step passes to `apply_fn`.

    Returns:
      Shape and dtype of the value at each site.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lpa_jax
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(3)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 5)))
      >>> for name, value in lpa_jax.list_sites(model.apply, variables, jnp.ones((4, 5))).items():
      ...     print(name, value.shape)
      inputs (4, 5)
      labels (4, 3)
      layers_0 (4, 8)
      layers_1 (4, 3)
      logits (4, 3)
      logit_grads (4, 3)
    """
    shapes = jax.tree.map(engine.shape_of, variables)
    program = LinenNetwork(apply_fn).program(shapes, engine.shape_of(inputs), apply_kwargs)
    logits = jax.ShapeDtypeStruct(program.shapes[0].shape, jnp.float32)
    found = {
        name: engine.shape_of(site)
        for site in engine.sites_of(program, inputs)
        for name in (site.given, site.name)
        if name not in engine.FIXED
    }
    ends = {sites.LOGITS: logits, sites.LOGIT_GRADS: logits}
    return {sites.INPUTS: engine.shape_of(inputs), sites.LABELS: logits, **found, **ends}


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Flax linen model as the engine's `Network`."""

    apply_fn: Callable[..., Any]

    def program(self, variables: PyTree, inputs: Any, kwargs: Mapping[str, Any]) -> Program:
        """Trace `(variables, inputs) -> (logits, mutated variables)` by their shapes alone."""

        def run(variables, inputs):
            told = {**variables, COLLECTION: _paths(variables["params"])}
            with nn.intercept_methods(_namer()):
                result = self.apply_fn(told, inputs, **kwargs)
            logits, updates = result if kwargs.get("mutable", False) else (result, {})
            if len(jax.tree.leaves(logits)) != 1:
                raise ValueError("The model must return logits alone; wrap apply_fn to pick them.")
            return logits, {name: new for name, new in updates.items() if name != COLLECTION}

        return Program.trace(run, variables, inputs)


def _paths(params: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a collection in which every module finds its path.

    Modules under `nn.jit` that are alike are traced once, unless their variables have other names.
    """
    below = {
        name: _paths(scope, f"{path}/{name}")
        for name, scope in params.items()
        if isinstance(scope, Mapping)
    }
    return {path or "/": jnp.zeros(())} | below


def _namer() -> Callable[..., Any]:
    """Make the interceptor: at every call of a module, name its output."""
    running: list[tuple[str, ...]] = []

    def intercept(next_fun, args, kwargs, context):
        path = context.module.path
        # A `super().__call__` inside a module's own is a part of it, not a second call.
        if context.method_name != "__call__" or not path or (running and running[-1] == path):
            return next_fun(*args, **kwargs)
        running.append(path)
        try:
            return tap("/".join(path), next_fun(*args, **kwargs))
        finally:
            running.pop()

    return intercept
