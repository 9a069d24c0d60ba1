"""Model families, each with what a step with LPA is compared with: the model alone, and by hand.

A family is a function that builds a `Case`. Nothing here looks at how the library works: what comes
after a site is obtained by running the whole model with something added to the output of one layer.
"""

from collections.abc import Callable, Mapping
import dataclasses
import importlib.metadata
import math
import re
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import lpa_jax

EPSILON, STEPS = 0.3, 3
BATCH, CLASSES = 6, 4
# Classes of unequal size, and class 3 absent.
LABELS = np.array([0, 1, 2, 0, 1, 0])
# What XLA would gain by optimizing tiny programs is lost many times over in compiling; the FLOPs
# that it counts are the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

MODULES = ("own_linen", "own_nnx", "functional", "packages")
# What a package is imported as, where that is not its name.
IMPORTED = {
    "dm-haiku": "haiku",
    "jax-resnet": "jax_resnet",
    "long-range-models": "long_range_models",
    "mamba2-jax": "mamba2_jax",
}

Offsets = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch, and the same model written so that something is added within it.

    Attributes:
      model: What `lpa_jax.value_and_grad` takes.
      variables: What its step takes.
      params: The parameters among them.
      inputs: A batch.
      alone: Maps parameters and inputs to the logits of the model as it is.
      forward: Maps parameters, inputs and what to add to the outputs of layers, by the names of
        sites, to logits.
      middle: A site in the middle of the network.
      late: A site close to its end.
      labels: Integers, one for each row of the logits.
      num_classes: Number of classes.
      kwargs: What the model is called with besides.
      logits: Which part of the model's output is the logits.
      per_example: Names of keyword arguments that hold a value for each example.
      axes: Which axis of the value at a site is that of the batch, where it is not the first.
    """

    model: Any
    variables: Any
    params: Any
    inputs: Any
    alone: Callable[[Any, Any], jax.Array]
    forward: Callable[[Any, Any, Offsets], jax.Array]
    middle: str
    late: str
    labels: Any = dataclasses.field(default_factory=lambda: jnp.asarray(LABELS))
    num_classes: int = CLASSES
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    logits: Callable[[Any], jax.Array] | None = None
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a case is built, and where its model comes from.

    Attributes:
      name: Its name in the table.
      library: The library of layers.
      package: The package on PyPI that holds the model, empty where it is written here.
      build: Builds the case.
    """

    name: str
    library: str
    package: str
    build: Callable[[], Case]


FAMILIES: dict[str, Family] = {}


def family(name: str, library: str, package: str = "") -> Callable[[Any], Any]:
    """Register what builds the case of a family."""

    def register(build):
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, library, package, build)
        return build

    return register


# ---------------------------------------------------------------- batches and parameters


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(*shape: int, vocabulary: int = 11, seed: int = 1) -> jax.Array:
    # 0 to 2 often are padding and the ends of a text.
    return jnp.asarray(np.random.default_rng(seed).integers(3, vocabulary, shape), jnp.int32)


def labels_like(*shape: int, num_classes: int = CLASSES) -> jax.Array:
    """Return labels of all classes but the last."""
    return jnp.asarray(np.random.default_rng(2).integers(0, num_classes - 1, shape), jnp.int32)


def filled(shapes: Any) -> Any:
    """Return random numbers of these shapes; no bias is 0 and no scale 1, so that errors show."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            abstract = isinstance(leaf, jax.ShapeDtypeStruct)
            return jnp.zeros(leaf.shape, leaf.dtype) if abstract else leaf
        name = jax.tree_util.keystr(path[-1:] if len(path) < 2 else path[-2:])
        values = rng.normal(size=leaf.shape)
        if leaf.ndim < 2:
            unit = 1.0 if re.search("scale|var|weight|gamma", name) else 0.0
            values = unit + 0.1 * (np.abs(values) if unit else values)
        else:
            values *= 1.3 / math.sqrt(math.prod(leaf.shape[:-1]))
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# ---------------------------------------------------------------- adding to what a layer returns


class Adder:
    """Adds to what layers return, by the names of sites: `path`, `path:leaf`, `path[call]`."""

    def __init__(self, offsets: Offsets):
        self.wanted: dict[str, list[tuple[int, int, jax.Array]]] = {}
        for name, offset in offsets.items():
            path, leaf, call = re.fullmatch(r"(.*?)(?::(\d+))?(?:\[(\d+)\])?", name).groups()
            self.wanted.setdefault(path, []).append((int(leaf or 0), int(call or 0), offset))
        self.calls: dict[str, int] = {}
        self.used = 0

    def __call__(self, path: str, output: Any) -> Any:
        if path not in self.wanted:
            return output
        number = self.calls[path] = self.calls.get(path, -1) + 1
        leaves, tree = jax.tree.flatten(output)
        for leaf, call, offset in self.wanted[path]:
            if call == number:
                leaves[leaf] = leaves[leaf] + offset
                self.used += 1
        return tree.unflatten(leaves)

    def interceptor(self, path_of: Callable[[Any], str]) -> Callable[..., Any]:
        """Return what adds to the outputs of layers, for a library that has interceptors."""

        def intercept(next_fun, args, kwargs, context):
            output = next_fun(*args, **kwargs)
            if context.method_name != "__call__":
                return output
            return self(path_of(context.module), output)

        return intercept

    def finish(self) -> None:
        assert self.used >= sum(map(len, self.wanted.values())), "a layer was never called"


def of_linen(apply_fn: Callable[..., Any], variables: Any, inputs: Any, **fields: Any) -> Case:
    """Return the case of a Linen model, given what `model.init` would return."""
    kwargs, logits = fields.get("kwargs", {}), fields.get("logits")

    def alone(params, inputs):
        output = apply_fn({**variables, "params": params}, inputs, **kwargs)
        output = output[0] if kwargs.get("mutable") else output
        return output if logits is None else logits(output)

    def forward(params, inputs, offsets):
        adder = Adder(offsets)
        with nn.intercept_methods(adder.interceptor(lambda module: "/".join(module.path))):
            result = alone(params, inputs)
        adder.finish()
        return result

    fields.setdefault("forward", forward)
    return Case(apply_fn, variables, variables["params"], inputs, alone, **fields)


def linen(model: nn.Module, inputs: Any, init_kwargs: Any = None, **fields: Any) -> Case:
    """Return the case of a Linen model with random parameters."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: model.init(keys, inputs, **(init_kwargs or {})))
    return of_linen(model.apply, filled(shapes), inputs, **fields)


class Shifted(nnx.Module):
    """An NNX module in the place of another, that adds to what it returns."""

    def __init__(self, inner: nnx.Module, path: str, adder: Adder):
        self.inner = inner
        self.add = lambda output: adder(path, output)

    def __call__(self, *args, **kwargs):
        return self.add(self.inner(*args, **kwargs))


def of_nnx(model: nnx.Module, inputs: Any, **fields: Any) -> Case:
    """Return the case of an NNX model, with random parameters in place of its own."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = filled(params)
    kwargs, logits = fields.get("kwargs", {}), fields.get("logits")

    def alone(params, inputs):
        output = nnx.merge(graph, params, rest, copy=True)(inputs, **kwargs)
        return output if logits is None else logits(output)

    def forward(params, inputs, offsets):
        copy, adder = nnx.merge(graph, params, rest, copy=True), Adder(offsets)
        for path in adder.wanted:
            *above, last = path.split("/")
            parent = copy
            for part in above:
                parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
            if last.isdigit():
                parent[int(last)] = Shifted(parent[int(last)], path, adder)
            else:
                setattr(parent, last, Shifted(getattr(parent, last), path, adder))
        output = copy(inputs, **kwargs)
        adder.finish()
        return output if logits is None else logits(output)

    fields.setdefault("forward", forward)
    model = nnx.merge(graph, params, rest)
    return Case(model, model, params, inputs, alone, **fields)


# ---------------------------------------------------------------- what is measured


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -chosen[..., 0]


def plain(case: Case) -> Callable[..., Any]:
    """Return `(params, inputs, labels) -> (loss, gradient)` of the model as it is."""

    def loss(params, inputs, labels):
        return cross_entropy(case.alone(params, inputs), labels).mean()

    return jax.value_and_grad(loss)


def by_hand(case: Case, site: str, shape: tuple[int, ...], steps: int = STEPS) -> Any:
    """Return loss and gradient with LPA at a site, written class by class.

    Args:
      case: The model.
      site: Where one vector for each class is added, the same at all positions.
      shape: Of the value there.
      steps: Number of steps of ascent, each `2 * EPSILON / steps` long.
    """
    axis = case.axes.get(site, 0)

    def run(params, inputs, labels):
        rows, channels = labels.reshape(-1), shape[-1]
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])

        def spread(deltas):
            each = jnp.stack(deltas)[rows]
            each = each.reshape(*labels.shape, *[1] * (len(shape) - labels.ndim - 1), channels)
            return jnp.moveaxis(jnp.broadcast_to(each, moved), 0, axis)

        def losses(params, offset):
            return cross_entropy(case.forward(params, inputs, {site: offset}), labels)

        uphill = jax.grad(lambda offset: losses(params, offset).sum())
        deltas = [jnp.zeros(channels)] * case.num_classes
        for _ in range(steps):
            gradient = jnp.moveaxis(uphill(spread(deltas)), axis, 0)
            gradient = gradient.reshape(rows.size, -1, channels).sum(1)
            for c, delta in enumerate(deltas):
                ascent = (gradient * (rows == c)[:, None]).sum(0)
                length = jnp.sqrt((ascent**2).sum())
                step = 2 * EPSILON / steps * ascent / jnp.where(length > 0, length, 1.0)
                norm = jnp.sqrt(((delta + step) ** 2).sum())
                deltas[c] = (delta + step) * jnp.minimum(1.0, EPSILON / jnp.maximum(norm, 1e-30))
        offset = jax.lax.stop_gradient(spread(deltas))
        return jax.value_and_grad(lambda params: losses(params, offset).mean())(params)

    return run


def perturbed(case: Case, perturbation: Any) -> Callable[..., Any]:
    """Return `(variables, inputs, labels) -> (loss, gradient)` by the library."""
    step = lpa_jax.value_and_grad(
        case.model, perturbation, num_classes=case.num_classes, logits=case.logits
    )

    def run(variables, inputs, labels):
        state = step.init(variables, inputs, labels, **case.kwargs)
        key = jax.random.key(3)
        (loss, _), grads, _ = step(variables, state, inputs, labels, key, **case.kwargs)
        return loss, grads

    return run


def lpa(site: str, epsilon: float = EPSILON) -> lpa_jax.Perturbation:
    everywhere_up = lpa_jax.splits.all_positive()
    return lpa_jax.lpa(site, epsilon, steps=STEPS, split=everywhere_up, radius="absolute")


def same(site: str) -> lpa_jax.Perturbation:
    """Change nothing at a site; the program is cut there all the same."""
    return lpa_jax.stateless(site, lambda value, **_: value)


def difference(actual: Any, expected: Any) -> float:
    """Return the largest difference of entries of loss or gradient.

    Each is divided by the largest entry of the loss, or of the whole gradient, if that is above 1.
    """

    def apart(a, b):
        a, b = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (a, b))
        assert [x.shape for x in a] == [x.shape for x in b]
        size = max(float(np.abs(x).max()) for x in b if x.size)
        gap = max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True) if x.size)
        assert math.isfinite(gap)
        return gap / max(size, 1.0)

    return max(map(apart, actual, expected))


def kind_of(reason: str) -> str:
    """Return a reason why a layer is no site without the numbers and shapes that are its own."""
    general = re.sub(r",? ?[\[(][^()\[\]]*\d[^()\[\]]*[\])],?| \d+,| of \d+,", "", reason)
    return re.sub(r",? of \d+|\s\d+", "", general).strip()


def has_loop(case: Case) -> bool:
    """Return whether there is a loop in the model, of which XLA counts the FLOPs of one turn."""
    jaxpr = str(jax.make_jaxpr(plain(case))(case.params, case.inputs, case.labels))
    return "scan[" in jaxpr or "while[" in jaxpr


def measure(case: Case, hand_steps: int = STEPS) -> dict[str, Any]:
    """Compare a step with the model alone and with LPA by hand, and count its FLOPs."""
    found = lpa_jax.list_sites(
        case.model, case.variables, case.inputs, logits=case.logits, apply_kwargs=case.kwargs
    )
    # Without the names for all calls of a layer.
    names = [name for name in found.costs if f"{name}[0]" not in found.costs]
    reasons: dict[str, int] = {}
    for reason in found.refused.values():
        reasons[kind_of(reason)] = reasons.get(kind_of(reason), 0) + 1
    assert {case.middle, case.late} <= set(names), names
    data = (case.inputs, case.labels)

    def compiled(function, variables):
        # The parameters are arguments, so that nothing is computed while compiling.
        program = jax.jit(function).lower(variables, *data).compile(compiler_options=QUICK)
        return program(variables, *data), program.cost_analysis()["flops"]

    expected, plain_flops = compiled(plain(case), case.params)
    figures = {
        "sites": len(names),
        "refused": len(found.refused),
        "reasons": reasons,
        "middle": case.middle,
        "late": case.late,
        "loss": float(expected[0]),
        "loop": has_loop(case),
    }
    at_all = lpa_jax.chain(*map(same, names), lpa(case.middle, 0.0))
    for name, perturbation in (("empty", lpa_jax.chain()), ("zero", at_all)):
        actual, _ = compiled(perturbed(case, perturbation), case.variables)
        figures[name] = difference(actual, expected)
    actual, flops = compiled(perturbed(case, lpa(case.late)), case.variables)
    by_classes = by_hand(case, case.late, found[case.late].shape, hand_steps)
    wanted, _ = compiled(by_classes, case.params)
    figures["lpa"] = difference(actual, wanted)
    figures["rise"] = float(actual[0] - expected[0])
    figures["flops"] = flops / plain_flops
    figures["tail"] = found.costs[case.late]
    return figures


def version_of(package: str) -> str:
    return importlib.metadata.version(package)
