"""One training step with perturbations: walk, perturb, replace, back-propagate."""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Integer, PyTree
import optax

from lpa_jax.core import checks, class_stats, meshes, mixing, pgd
from lpa_jax.core.network import (
    Backend,
    Call,
    is_bound,
    mapped_axes,
    Network,
    Place,
    Rows,
    varying,
)
from lpa_jax.core.perturbation import (
    Chain,
    GIVEN,
    INPUTS,
    LABELS,
    LOGIT_GRADS,
    LOGITS,
    matches,
    near,
    PARAM_GRADS,
    SiteError,
)
from lpa_jax.core.program import Program, Site
from lpa_jax.core.walk import Walk

Labels = Integer[Array, "batch ..."] | Float[Array, "batch ... classes"]
"""Of the examples, or of all positions of them."""
LossFn = Callable[[Float[Array, "batch classes"], Float[Array, "batch classes"]], Array]
FIXED = (INPUTS, LABELS, LOGITS, LOGIT_GRADS, PARAM_GRADS)
Tail = Callable[[Any], Float[Array, "batch classes"]]


class StepState(NamedTuple):
    """State of a perturbed step, a pytree of arrays.

    Attributes:
      step: Number of steps taken, int32 scalar; what schedules are evaluated at.
      class_stats: What is known of each class.
      perturbations: State of each perturbation of the chain.
    """

    step: Int[Array, ""]
    class_stats: class_stats.ClassStats
    perturbations: tuple[PyTree, ...]


class _Traced(NamedTuple):
    """The network of one step, ready to walk.

    Attributes:
      program: The program of `(params, rest, inputs, given) -> (logits, mutated state)`.
      given: The keyword arguments that hold a value for each example.
      rows: The rows of the batch.
      places: Where to perturb, in the order of computation.
      unmatched: What acts where the targets are mixed and the examples are not yet.
    """

    program: Program
    given: Mapping[str, PyTree]
    rows: Rows
    places: list[Place]
    unmatched: tuple[tuple[tuple[str, int], str], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A perturbed `value_and_grad`; made and described by `lpa_jax.value_and_grad`."""

    backend: Backend
    chain: Chain
    num_classes: int
    loss_fn: LossFn
    class_statistic: class_stats.ClassStatistic
    pick: Callable[[Any], Array] | None = None
    per_example: tuple[str, ...] = ()
    axis_name: tuple[str, ...] = ()

    def init(
        self,
        variables: PyTree,
        inputs: PyTree,
        labels: Labels,
        *,
        weights: Float[Array, "batch ..."] | None = None,
        extra: Mapping[str, Array] | None = None,
        apply_kwargs: Mapping[str, Any] | None = None,
        **more_apply_kwargs: Any,
    ) -> StepState:
        """Return the first state; the batch given, as for a step, counts for its shapes alone.

        Raises:
          SiteError: If a perturbation is placed at a site that the network does not have.
          ValueError: If the labels or the logits do not fit `num_classes`.
        """
        checks.named_extra(extra, GIVEN)
        del weights
        checks.check_labels(labels, checks.batch_of(inputs), self.num_classes)
        kwargs = checks.merged(apply_kwargs, more_apply_kwargs)
        # Shapes alone count: arrays may lie on a mesh with explicit axes.
        network = self.backend(variables)
        params, rest, abstract = jax.tree.map(
            checks.shape_of, (network.params, network.rest, inputs)
        )
        shapes = network._replace(params=params, rest=rest)
        rows = _rows_of(labels)
        traced = self._trace(shapes, abstract, kwargs, rows)

        def value_at(name):
            if name == INPUTS:
                return jax.tree.map(rows.of, inputs)
            if name == PARAM_GRADS:
                return network.params
            for place in traced.places:
                if name in place.names:
                    shape = (rows.number, *place.shape[len(rows.shape) :])
                    return jnp.zeros(shape, place.site.dtype)
            return jnp.zeros((rows.number, self.num_classes), jnp.float32)

        return StepState(
            step=jnp.zeros((), jnp.int32),
            class_stats=class_stats.init(self.num_classes),
            perturbations=tuple(p.init(value_at(p.sites[0])) for p in self.chain),
        )

    def end_epoch(self, state: StepState) -> StepState:
        """Close the epoch for the splits with `window="epoch"`; others are unaffected."""
        return state._replace(class_stats=class_stats.end_epoch(state.class_stats))

    def diagnose(
        self,
        variables: PyTree,
        state: StepState,
        inputs: PyTree,
        labels: Labels,
        key: Array,
        *,
        weights: Float[Array, "batch ..."] | None = None,
        extra: Mapping[str, Array] | None = None,
        apply_kwargs: Mapping[str, Any] | None = None,
        **more_apply_kwargs: Any,
    ) -> tuple[collections.OrderedDict[str, Array], PyTree]:
        """Return in words, in the order of computation, whether each value of a step is finite.

        First come those of the network as it is, then what the perturbations make of them. The
        step's gradients are returned as well.
        """
        kwargs = checks.merged(apply_kwargs, more_apply_kwargs)
        network = self.backend(variables)
        call, given = self._call(network, kwargs)
        args = (network.params, network.rest, inputs, given)
        program = call.trace(*args)
        values: dict[str, Array] = {}

        def keep(site, value, _):
            values[site.name] = value
            return value

        logits, _ = program.walk(args, [site.name for site in program.sites], keep)
        (loss, aux), grads, _ = self(
            variables,
            state,
            inputs,
            labels,
            key,
            weights=weights,
            extra=extra,
            apply_kwargs=kwargs,
        )
        parts = {"the parameters": (network.params, network.rest), "the inputs": inputs}
        parts |= {f"{name!r}": value for name, value in values.items()}
        parts |= {"the logits": logits}
        parts |= {f"the perturbation at {site!r}": r for site, r in aux["metrics"].items()}
        parts |= {"the loss": loss, "the gradient": grads}
        # A jitted function returns a plain dict in alphabetical order.
        finite = ((name, checks.all_finite(part)) for name, part in parts.items())
        return collections.OrderedDict(finite), grads

    def __call__(
        self,
        variables: PyTree,
        state: StepState,
        inputs: PyTree,
        labels: Labels,
        key: Array,
        *,
        weights: Float[Array, "batch ..."] | None = None,
        extra: Mapping[str, Array] | None = None,
        apply_kwargs: Mapping[str, Any] | None = None,
        **more_apply_kwargs: Any,
    ) -> tuple[tuple[Array, dict[str, Any]], PyTree, StepState]:
        """Return `((loss, aux), grads, state)`; see `lpa_jax.value_and_grad`."""
        self._check_state(state)
        kwargs = checks.merged(apply_kwargs, more_apply_kwargs)
        network = self.backend(variables)
        extra = checks.named_extra(extra, GIVEN)
        arguments = (network, state, inputs, labels, key, weights, extra, kwargs)
        mesh = meshes.explicit(arguments)
        if mesh is None:
            return self._step(*arguments)
        on = functools.partial(meshes.on, mesh)
        by_example = NamedSharding(mesh, PartitionSpec(*on(jax.tree.leaves(inputs)[0]).spec[:1]))
        aux = {"logits": by_example, "labels": by_example, "updates": on(), "metrics": on()}
        kept = jax.tree.map(on, (network.params, state))
        return meshes.run_automatic(self._step, mesh, ((on(), aux), *kept), *arguments)

    def _check_state(self, state: StepState) -> None:
        """Raise `ValueError` if a state is not one of this step."""
        if isinstance(state, StepState):
            number, classes = len(state.perturbations), state.class_stats.frequency.shape[0]
            if (number, classes) == (len(self.chain), self.num_classes):
                return
        raise ValueError(
            f"state must be what step.init returned, of {len(self.chain)} perturbations and "
            f"{self.num_classes} classes."
        )

    def _step(
        self,
        network: Network,
        state: StepState,
        inputs: PyTree,
        labels: Labels,
        key: Array,
        weights: Float[Array, "batch ..."] | None,
        extra: Mapping[str, Array],
        kwargs: Mapping[str, Any],
    ) -> tuple[tuple[Array, dict[str, Any]], PyTree, StepState]:
        checks.check_labels(labels, checks.batch_of(inputs), self.num_classes)
        labels, padded = jnp.asarray(labels), weights is not None
        rows = _rows_of(labels)
        weights = jnp.ones(rows.shape, jnp.float32) if weights is None else weights
        weights = rows.of(checks.check_weights(weights, rows.shape))
        labels = rows.of(labels)
        if checks.are_classes(labels):
            labels, padded = labels.astype(jnp.int32), True
            weights = jnp.where(labels == checks.IGNORE, 0.0, weights)
        if padded:
            # Padding may hold anything, NaN included, which a weight of 0 would not keep out.
            example = jnp.any(weights.reshape(rows.shape[0], -1) > 0, axis=1)
            inputs, labels = _cleaned(inputs, example), _cleaned(labels, weights > 0)
            kwargs = {
                name: _filled(value, example) if name in self.per_example else value
                for name, value in kwargs.items()
            }
        extra = {
            name: rows.of(checks.for_each_label(name, array, rows.shape))
            for name, array in extra.items()
        }
        network = network._replace(params=self._varying(network.params, inputs))
        params, rest = network.params, network.rest
        traced = self._trace(network, inputs, kwargs, rows)
        start = Walk(
            chain=self.chain,
            key=jax.random.fold_in(key, state.step),
            states=state.perturbations,
            step=state.step,
            class_stats=state.class_stats,
            labels=labels,
            targets=checks.soft(labels, self.num_classes),
            weights=weights,
            extra=extra,
            params=params,
            class_statistic=self.class_statistic,
            axis_name=self.axis_name,
            unmatched=traced.unmatched,
        )

        def loss_and_grads(params):
            def to_logits(params):
                return self._forward(start, traced, params, rest, inputs)

            logits, pullback, (walk, raw, updates) = jax.vjp(to_logits, params, has_aux=True)
            loss, cotangent = self._loss(walk, logits)
            return loss, pullback(cotangent)[0], walk, raw, updates

        def at_moved(moved):
            if jax.tree.structure(moved) != jax.tree.structure(params):
                raise SiteError(
                    "The gradient at moved parameters needs all of them: a perturbation that asks "
                    "for it cannot be wrapped in optax.masked or optax.partition. Give sam and "
                    "asam the mask instead, as in lpa_jax.sam(rho, mask=...)."
                )
            return loss_and_grads(moved)[:2]

        loss, grads, walk, raw, updates = loss_and_grads(params)
        grads = walk.perturb((PARAM_GRADS,), grads, at_moved)
        state = StepState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            class_stats=walk.stats_after(),
            perturbations=walk.states,
        )
        labels = walk.labels
        if labels.ndim == 1:
            labels = jnp.where(weights > 0, labels, checks.IGNORE)
        aux = {"logits": raw, "labels": rows.back(labels), "updates": updates}
        return (loss, aux | {"metrics": walk.metrics}), grads, state

    def _varying(self, params: PyTree, inputs: PyTree) -> PyTree:
        """Return parameters of which each device has a gradient of its own.

        Raises:
          ValueError: If the axes over which the step is mapped are others than `axis_name` says.
        """
        if unbound := [name for name in self.axis_name if not is_bound(name)]:
            raise ValueError(
                f"The step is not mapped over axis_name {unbound}: call it within shard_map or "
                "pmap over an axis of this name, or leave axis_name out."
            )
        axes = mapped_axes(inputs)
        if others := axes.difference(self.axis_name):
            raise ValueError(
                f"The examples are divided over the axes {set(others)} of shard_map: name them, as "
                f"in value_and_grad(..., axis_name={min(others)!r})."
            )
        return varying(params, axes)

    def _forward(
        self, start: Walk, traced: _Traced, params: PyTree, rest: PyTree, inputs: PyTree
    ) -> tuple[Array, tuple[Walk, Array, PyTree]]:
        """Walk to the logits; return them perturbed, and the walk, them raw, and the mutated."""
        program, rows, given = traced.program, traced.rows, traced.given
        # Gradients flow into the parameters that a transform uses, as into those of the network.
        walk = dataclasses.replace(start, metrics={}, params=params)

        def to_logits(result):
            return self._by_class(rows, result[0])

        if walk.at_site((INPUTS,)):
            frozen = jax.lax.stop_gradient((params, rest))

            def from_inputs(value):
                return to_logits(program.walk((*frozen, from_rows(value), given), (), _keep))

            from_rows = functools.partial(jax.tree.map, rows.back)
            value = jax.tree.map(rows.of, inputs)
            inputs = from_rows(self._perturb(walk, (INPUTS,), value, from_inputs))
        walk.perturb_targets()

        places = {place.site: place for place in traced.places}
        before: collections.Counter[str] = collections.Counter()

        def visit(site, value, tail):
            _, axis, names = places[site]

            def from_site(value):
                return to_logits(tail(rows.back(value, axis)))

            times = {name: before[name] for name in names}
            before.update(names)
            value = self._perturb(walk, names, rows.of(value, axis), from_site, times)
            return rows.back(value, axis)

        names = [site.name for site in places]
        raw, updates = program.walk((params, rest, inputs, given), names, visit)
        raw = raw.astype(jnp.float32)
        by_class = self._by_class(rows, raw)
        logits = self._perturb(walk, (LOGITS,), by_class, lambda value: value)
        if walk.class_level:
            walk.measure(by_class)
        return logits, (walk, raw, updates)

    def _perturb(
        self,
        walk: Walk,
        names: tuple[str, ...],
        value: PyTree,
        tail: Tail,
        times: Mapping[str, int] = types.MappingProxyType({}),
    ) -> PyTree:
        """Perturb the value at a site, the network beyond which is `tail`."""
        if names == (LOGITS,) and walk.reads_statistics(names):
            walk.measure(value)
        # At other sites the statistics come with the first gradient.
        measures = walk.reads_statistics(names)

        # Jitted for being traced once, however often a transform asks.
        @functools.partial(jax.jit, static_argnames="after")
        def tail_gradient(value, objective, measuring, *, after):
            logits, pullback = jax.vjp(tail, value)
            if measures:
                # By a value and not a static argument, which would trace the tail once more.
                choose = functools.partial(jnp.where, measuring)
                stats = jax.tree.map(choose, walk.measured_by(logits), objective.class_stats)
                objective = objective._replace(class_stats=stats)

            def to_loss(logits):
                return walk.at_loss(logits, jax.lax.stop_gradient(objective), after)

            losses, cotangent = self._losses_and_grads(logits, objective.targets, to_loss)
            # Ahead of the tail, in which batch normalization mixes the examples.
            real = walk.weights > 0
            cotangent = jnp.where(real[:, None], cotangent, 0.0)
            losses = jnp.where(real, losses, 0.0)
            return (losses, pullback(cotangent)[0]), objective.class_stats

        def evaluate(value, after, measuring=False):
            held = jax.lax.stop_gradient(value)
            return tail_gradient(held, walk.objective(), measuring, after=after)

        first = None
        if measures:
            first, walk.class_stats = evaluate(value, after=-1, measuring=True)
            walk.measured = True
        # What acts at the logits is part of the loss at every site before them.
        measured_at = walk.objective()

        def gradient_fn(moved, after=-1):
            # The statistics and a transform that starts from the value share one pass.
            same = moved is value and after == -1 and walk.objective().same_as(measured_at)
            return first if first and same else evaluate(moved, after)[0]

        return walk.perturb(names, value, gradient_fn, times=times)

    def _losses_and_grads(
        self, logits: Array, targets: Array, to_loss: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Array, Array]:
        """Return the loss of each example, of `to_loss(logits)`, and its gradient at the logits."""

        def total(logits):
            losses = self.loss_fn(to_loss(logits), targets)
            if losses.shape != logits.shape[:1]:
                raise ValueError(
                    f"loss_fn must return one loss for each example, of shape {logits.shape[:1]}, "
                    f"not {losses.shape}."
                )
            return jnp.sum(losses), losses

        grads, losses = jax.grad(total, has_aux=True)(logits)
        return losses, grads

    def _loss(self, walk: Walk, logits: Array) -> tuple[Array, Array]:
        """Return the weighted mean loss and its perturbed gradient at the logits."""
        losses, grads = self._losses_and_grads(logits, walk.targets)
        grads = walk.perturb((LOGIT_GRADS,), grads, logits=logits, losses=losses)
        # The loss and gradient of a batch that is all padding are 0.
        total_weight = jnp.sum(walk.weights)
        if self.axis_name:
            # So that the mean over the devices is the weighted mean over all examples.
            total_weight = jax.lax.pmean(total_weight, self.axis_name)
        share = walk.weights / jnp.where(total_weight == 0, 1.0, total_weight)
        real = walk.weights > 0
        loss = jnp.sum(jnp.where(real, losses * share, 0.0))
        return loss, jnp.where(real[:, None], grads * share[:, None], 0.0)

    def _by_class(self, rows: Rows, logits: Array) -> Float[Array, "rows classes"]:
        """Return the network's logits by rows; one logit of two classes is that of the second."""
        logits = logits.astype(jnp.float32)
        if logits.shape == (*rows.shape, self.num_classes):
            return rows.of(logits)
        one = logits.reshape(rows.number, 1)
        return jnp.concatenate([jnp.zeros_like(one), one], axis=1)

    def _call(self, network: Network, kwargs: Mapping[str, Any]) -> tuple[Call, dict[str, Any]]:
        held, given = checks.divided(kwargs, self.per_example)
        return Call(network, held, self.pick, self.axis_name), given

    def _trace(
        self,
        network: Network,
        inputs: PyTree,
        kwargs: Mapping[str, Any],
        rows: Rows,
    ) -> _Traced:
        """Trace the network, and find what to perturb in it."""
        call, given = self._call(network, kwargs)
        args = (network.params, network.rest, inputs, given)
        program = call.trace(*args)
        checks.check_logits(program.shapes[0].shape, rows.shape, self.num_classes)
        wanted = {site for perturbation in self.chain for site in perturbation.sites}
        if INPUTS in wanted:
            _check_inputs(inputs, rows)
        wanted -= set(FIXED)
        if given or len(rows.shape) > 1:
            mixing.check_unmixed(self.chain, given)
        found, refused = [], {}
        mixes = any(perturbation.mixes for perturbation in self.chain)
        if wanted or mixes:
            larger = call.trace_larger(*args)
            if mixes and isinstance(larger, str) and call.arrays:
                raise SiteError(f"Examples cannot be mixed: {larger}.")
            found, refused = call.places(program, larger, rows, FIXED)
        patterns = [site for site in wanted if "*" in site]
        for number, place in enumerate(found):
            also = (pattern for pattern in patterns if matches(pattern, place.names))
            found[number] = place._replace(names=(*place.names, *also))
        known = dict.fromkeys([*FIXED, *(name for place in found for name in place.names)])
        for site in sorted(wanted - set(known)):
            raise _no_site(site, list(known), refused, named=bool(program.sites))
        places = [place for place in found if not wanted.isdisjoint(place.names)]
        return _Traced(program, given, rows, places, mixing.unmatched(self.chain, places))


def _no_site(site: str, known: list[str], refused: Mapping[str, str], named: bool) -> SiteError:
    """Return what is wrong with the name of a site, `named` telling if the network names any."""
    if site in refused:
        return SiteError(f"{site!r} is no site: {refused[site]}.")
    if not named and not refused:
        return SiteError(
            f"There is no site {site!r}, as no value of the network has a name: name values by "
            "lpa_jax.tap; of a Linen model give all variables, with 'params'."
        )
    if "*" in site:
        layers = ", ".join(name for name in known if name not in FIXED)
        return SiteError(
            f"There is no site {site!r}: the pattern matches none of the layers {layers}."
        )
    return SiteError(
        f"There is no site {site!r}; {near(site, known)}. lpa_jax.list_sites names them all."
    )


def _check_inputs(inputs: PyTree, rows: Rows) -> None:
    """Raise `SiteError` unless all inputs can be perturbed together."""
    for leaf in jax.tree.leaves(inputs):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise SiteError(
                f"The inputs are {leaf.dtype}, and perturbations need floats: scale pixels "
                "to [0, 1] first, or name a module."
            )
        if not rows.fit(leaf.shape):
            raise SiteError(
                f"The inputs, {leaf.shape}, are not one for each label, {rows.shape}; name a layer."
            )


def _rows_of(labels: Labels) -> Rows:
    return Rows(tuple(labels.shape if checks.are_classes(labels) else labels.shape[:-1]))


def _cleaned(values: PyTree, real: Array) -> PyTree:
    """Return values with zeros where the example is no real one."""

    def clean(value):
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return value
        return jnp.where(pgd.column(real, value), value, jnp.zeros_like(value))

    return jax.tree.map(clean, values)


def _filled(values: PyTree, real: Array) -> PyTree:
    """Return values with those of a real example where there is none.

    Of zeros, as in a mask, a network may make 0 / 0, whose gradient is NaN.
    """
    first = jnp.argmax(real)

    def fill(value):
        return jnp.where(pgd.column(real, value), value, jax.lax.dynamic_index_in_dim(value, first))

    return _cleaned(jax.tree.map(fill, values), real | jnp.any(real))


def _keep(site: Site, value: Array, tail: Any) -> Array:
    return value
