"""Taps into unmodified `flax.linen` models; the only file that knows Flax's interceptors.

Values leave and enter through the modules' own scopes, in the collection `COLLECTION`. The
interceptor is the same for every pass and compares no paths: Flax's lifted transforms (`nn.remat`,
`nn.jit`, `nn.scan`) then treat what it does as part of the model, where a closure over traced
values would leak, or be shared by siblings that are traced once.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
from flax.core.scope import union_filters
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import optax

from lpa_jax.perturb import engine, sites
from lpa_jax.perturb.network import Position, Tap, Trace

COLLECTION = "perturbation"
# Names that no module or variable of a model will have.
_OUT, _IN = "__out__", "__in__"


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
    and one for each, `"layers[0]"`, `"layers[1]"`... The site `"param_grads"`, whose value is a
    tree like the parameters, is not listed. A module that has the name of another site, such as
    `"logits"`, is no site of its own. Nothing is computed.

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
    trace = LinenNetwork(apply_fn).trace(variables, inputs, apply_kwargs)
    logits = jax.ShapeDtypeStruct(trace.logits.shape, jnp.float32)
    taps = {name: _shape(tap) for tap in trace.taps for name in (tap.site, tap.name)}
    taps = {name: shape for name, shape in taps.items() if name not in engine.FIXED}
    ends = {sites.LOGITS: logits, sites.LOGIT_GRADS: logits}
    return {sites.INPUTS: trace.inputs, sites.LABELS: logits, **taps, **ends}


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Flax linen model as the engine's `Network`."""

    apply_fn: Callable[..., Any]

    def trace(self, variables: PyTree, inputs: Array, kwargs: Mapping[str, Any]) -> Trace:
        """Find the taps by one abstract pass."""
        # Shapes alone count: arrays may lie on a mesh with explicit axes.
        variables, inputs = jax.tree.map(_shape, (variables, inputs))

        def run(variables, inputs):
            logits, captured, updates = self._apply(variables, inputs, {}, kwargs)
            return logits, dict(_leaves(captured)), updates

        closed, shapes = jax.make_jaxpr(run, return_shape=True)(variables, inputs)
        logits, captured, updates = shapes
        # The outputs of a jaxpr are in the order of the leaves of what the function returned.
        places = iter(_places(closed.jaxpr))
        if len(jax.tree.leaves(logits)) != 1:
            raise ValueError("The model must return logits alone; wrap apply_fn to pick them.")
        next(places)
        found = []
        for site, call in sorted(captured):
            value = captured[site, call]
            found += _taps_of(site, call, value, next(places), inputs.shape[0])
        calls = collections.Counter(site for site, _ in captured)
        several = {tap.site for tap in found if tap.call or (tap.layer and tap.layer[1] > 1)}

        def named(tap):
            layer = tap.layer[0] if tap.layer else 0
            number = layer * calls[tap.site] + tap.call
            return tap._replace(name=f"{tap.site}[{number}]") if tap.site in several else tap

        taps = tuple(named(tap) for tap in sorted(found, key=lambda tap: tap.position))
        positions = tuple(position for position, _ in places)
        assert len(positions) == len(jax.tree.leaves(updates))
        return Trace(taps, _shape(inputs), logits, positions)

    def run(
        self,
        variables: PyTree,
        inputs: Array,
        replaced: Mapping[Tap, Array],
        wanted: Sequence[Tap],
        kwargs: Mapping[str, Any],
    ) -> tuple[Array, list[Array], PyTree]:
        """Return the logits, the wanted values and the mutated variables, with taps replaced."""
        given: dict[str, Any] = {}
        for tap, value in replaced.items():
            scope = given
            for name in tap.site.split("/"):
                scope = scope.setdefault(name, {})
            scope[_IN] = _insert(scope.get(_IN, ()), tap, value)
        logits, captured, updates = self._apply(variables, inputs, given, kwargs)
        values = dict(_leaves(captured))
        return logits, [_pick(values, tap) for tap in wanted], updates

    def _apply(
        self, variables: PyTree, inputs: Array, given: PyTree, kwargs: Mapping[str, Any]
    ) -> tuple[Array, PyTree, PyTree]:
        mutable = kwargs.get("mutable", False)
        with nn.intercept_methods(_interceptor()):
            logits, updates = self.apply_fn(
                {**variables, COLLECTION: given},
                inputs,
                **{**kwargs, "mutable": union_filters(mutable, COLLECTION)},
            )
        updates = dict(updates)
        return logits, updates.pop(COLLECTION, {}), updates


def _interceptor() -> Callable[..., Any]:
    """Make the interceptor: at every call of a module, sow its output and take a given one."""
    running: list[tuple[str, ...]] = []

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        # A `super().__call__` inside a module's own is a part of it, not a second call.
        if context.method_name != "__call__" or (running and running[-1] == module.path):
            return next_fun(*args, **kwargs)
        running.append(module.path)
        try:
            output = next_fun(*args, **kwargs)
        finally:
            running.pop()
        leaves, treedef = jax.tree.flatten(output)
        if len(leaves) != 1 or not module.is_mutable_collection(COLLECTION):
            return output
        earlier = module.get_variable(COLLECTION, _OUT, ())
        # The name, an identity, gives every output an equation of its own to be ordered by.
        module.put_variable(COLLECTION, _OUT, (*earlier, checkpoint_name(leaves[0], COLLECTION)))
        given = module.get_variable(COLLECTION, _IN, ())
        entry = given[len(earlier)] if len(earlier) < len(given) else None
        if entry is None:
            return output
        value, here = entry
        return treedef.unflatten([value if here is None else jnp.where(here, value, leaves[0])])

    return intercept


def _insert(given: tuple[Any, ...], tap: Tap, value: Array) -> tuple[Any, ...]:
    """Add a value to those given to a module: `(value, None)`, or stacks of both for a scan."""
    given = given + (None,) * (tap.call + 1 - len(given))
    entry = (value, None)
    if tap.layer is not None:
        layer, length = tap.layer
        stack, here = given[tap.call] or (
            jnp.zeros((length, *value.shape), value.dtype),
            jnp.zeros(length, bool),
        )
        entry = (stack.at[layer].set(value), here.at[layer].set(True))
    return (*given[: tap.call], entry, *given[tap.call + 1 :])


def _leaves(captured: Mapping[str, Any], path: str = "") -> Iterable[tuple[tuple[str, int], Array]]:
    """Yield `((path of a module, call), output)` from the collection, leaving out the root."""
    for name, scope in captured.items():
        if isinstance(scope, Mapping):
            below = f"{path}/{name}" if path else name
            yield from (((below, i), value) for i, value in enumerate(scope.get(_OUT, ())))
            yield from _leaves(scope, below)


def _taps_of(
    site: str, call: int, value: jax.ShapeDtypeStruct, place: tuple[Position, Any], batch: int
) -> Iterable[Tap]:
    """Yield the taps of one captured output: one, or one for each layer of a scan."""
    position, scan = place
    shape = value.shape if scan is None else value.shape[1:]
    if not shape or shape[0] != batch or not jnp.issubdtype(value.dtype, jnp.floating):
        return
    if scan is None:
        yield Tap(site, site, call, None, position, shape, value.dtype)
        return
    length, reverse, inner = scan
    for layer in range(length):
        turn = length - 1 - layer if reverse else layer
        at = (*position, turn, *inner)
        yield Tap(site, site, call, (layer, length), at, shape, value.dtype)


def _pick(values: Mapping[tuple[str, int], Array], tap: Tap) -> Array:
    value = values[tap.site, tap.call]
    return value if tap.layer is None else value[tap.layer[0]]


def _places(jaxpr: Any) -> list[tuple[Position, tuple[int, bool, Position] | None]]:
    """Find where a jaxpr computes each of its outputs.

    Returns for each its position, and where it is a stack of layers that comes out of a scan, their
    number, whether the last comes first, and the position inside the scan.
    """
    made = {
        id(var): (i, k) for i, eqn in enumerate(jaxpr.eqns) for k, var in enumerate(eqn.outvars)
    }
    inside: dict[int, Any] = {}

    def place(var):
        if id(var) not in made:
            return (), None
        index, output = made[id(var)]
        equation = jaxpr.eqns[index]
        inner = equation.params.get("jaxpr")
        if inner is None:
            return (index,), None
        inner = getattr(inner, "jaxpr", inner)
        if index not in inside:
            inside[index] = _places(inner)
        position, scan = inside[index][output]
        if equation.primitive.name != "scan":
            return (index, *position), scan
        # What a scan stacks has one axis more outside than inside; what it carries has not.
        if var.aval.ndim == inner.outvars[output].aval.ndim:
            return (index,), None
        return (index,), (equation.params["length"], equation.params["reverse"], position)

    return [place(var) for var in jaxpr.outvars]
