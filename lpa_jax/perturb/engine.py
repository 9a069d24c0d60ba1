"""One training step with perturbations: capture, perturb, replace, back-propagate."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from lpa_jax.perturb import membership, pgd, sites, statistics
from lpa_jax.perturb.network import Network, Position, Tap, Trace

LossFn = Callable[[Float[Array, "batch classes"], Float[Array, "batch classes"]], Array]
FIXED = (sites.INPUTS, sites.LABELS, sites.LOGITS, sites.LOGIT_GRADS, sites.PARAM_GRADS)


class StepState(NamedTuple):
    """State of a perturbed step, a pytree of arrays.

    Attributes:
      step: Number of steps taken, int32 scalar; what schedules are evaluated at.
      class_stats: What is known of each class.
      perturbations: State of each perturbation of the chain.
    """

    step: Int[Array, ""]
    class_stats: statistics.ClassStats
    perturbations: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A perturbed `value_and_grad`; made and described by `lpa_jax.value_and_grad`."""

    network: Network
    chain: sites.Chain
    num_classes: int
    loss_fn: LossFn

    def init(
        self, variables: PyTree, inputs: Array, labels: membership.Labels, **apply_kwargs: Any
    ) -> StepState:
        """Return the first state; the batch given counts for its shapes alone.

        Raises:
          SiteError: If a perturbation stands at a site the network does not have.
          ValueError: If the labels or the logits do not fit `num_classes`.
        """
        _check_labels(labels, inputs.shape[0], self.num_classes)
        taps = self._taps(self.network.trace(variables, inputs, apply_kwargs))
        by_class = jnp.zeros((inputs.shape[0], self.num_classes), jnp.float32)
        values = dict.fromkeys(FIXED, by_class)
        values |= {sites.INPUTS: inputs, sites.PARAM_GRADS: variables["params"]}
        values |= {n: jnp.zeros(tap.shape, tap.dtype) for tap in taps for n in tap[:2]}
        return StepState(
            step=jnp.zeros((), jnp.int32),
            class_stats=statistics.init(self.num_classes),
            perturbations=tuple(p.init(values[p.sites[0]]) for p in self.chain),
        )

    def end_epoch(self, state: StepState) -> StepState:
        """Close the epoch for the splits with `window="epoch"`; others are unaffected."""
        return state._replace(class_stats=statistics.end_epoch(state.class_stats))

    def __call__(
        self,
        variables: PyTree,
        state: StepState,
        inputs: Array,
        labels: membership.Labels,
        key: Array,
        *,
        weights: Float[Array, "batch"] | None = None,
        **apply_kwargs: Any,
    ) -> tuple[tuple[Array, dict[str, Any]], PyTree, StepState]:
        """Return `((loss, aux), grads, state)`; see `lpa_jax.value_and_grad`."""
        batch = inputs.shape[0]
        _check_labels(labels, batch, self.num_classes)
        weights = jnp.ones(batch, jnp.float32) if weights is None else jnp.asarray(weights)
        if weights.shape != (batch,):
            raise ValueError(f"weights must have shape ({batch},), not {weights.shape}.")
        start = _Walk(
            chain=self.chain,
            key=jax.random.fold_in(key, state.step),
            states=list(state.perturbations),
            extras={
                "step": state.step,
                "class_stats": state.class_stats,
                "labels": labels,
                "targets": _soft(labels, self.num_classes),
                "weights": weights,
            },
            metrics={},
        )

        def loss_and_grads(params):
            def to_logits(params):
                walk = start.copy()
                perturbed, raw, updates = self._forward(
                    walk, {**variables, "params": params}, inputs, apply_kwargs
                )
                return perturbed, (walk.contents(), raw, updates)

            logits, pullback, (contents, raw, updates) = jax.vjp(to_logits, params, has_aux=True)
            walk = start.copy(**contents)
            loss, cotangent = self._loss(walk, logits)
            return loss, pullback(cotangent)[0], walk, raw, updates

        params = variables["params"]
        loss, grads, walk, raw, updates = loss_and_grads(params)
        grads = walk.perturb(
            (sites.PARAM_GRADS,), grads, lambda moved: loss_and_grads(moved)[:2], params
        )
        state = StepState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            class_stats=statistics.end_batch(walk.extras["class_stats"], walk.members()),
            perturbations=tuple(walk.states),
        )
        return (loss, {"logits": raw, "updates": updates, "metrics": walk.metrics}), grads, state

    def _forward(
        self, walk: "_Walk", variables: PyTree, inputs: Array, kwargs: Mapping[str, Any]
    ) -> tuple[Array, Array, PyTree]:
        """Walk to the logits; return them perturbed and as computed, and the mutated variables."""
        trace = self.network.trace(variables, inputs, kwargs)
        frozen = jax.lax.stop_gradient(variables)

        def gradient_through(tail):
            """Make the `gradient_fn` of a site out of the network beyond it."""
            targets, real = walk.extras["targets"], walk.extras["weights"] > 0

            def total(value):
                losses = jnp.where(real, self.loss_fn(tail(value), targets), 0.0)
                return jnp.sum(losses), losses

            def gradient_fn(value):
                gradient, losses = jax.grad(total, has_aux=True)(jax.lax.stop_gradient(value))
                return losses, gradient

            return gradient_fn

        def network_from_inputs(value):
            return self._run(frozen, value, {}, (), kwargs)[0]

        def network_from(tap, inputs, earlier, value):
            return self._run(frozen, inputs, {**earlier, tap: value}, (), kwargs)[0]

        if walk.standing((sites.INPUTS,)):
            walk.measure(network_from_inputs(inputs))
            inputs = walk.perturb((sites.INPUTS,), inputs, gradient_through(network_from_inputs))
        walk.perturb_targets()

        replaced: dict[Tap, Array] = {}
        passes: list[tuple[Position, PyTree]] = []
        for tap in self._taps(trace):
            # This pass costs the segment up to the tap: XLA drops what nothing uses.
            logits, (value,), updates = self._run(variables, inputs, replaced, (tap,), kwargs)
            passes.append((tap.position, updates))
            walk.measure(logits)
            earlier = {tap: jax.lax.stop_gradient(value) for tap, value in replaced.items()}
            tail = functools.partial(network_from, tap, jax.lax.stop_gradient(inputs), earlier)
            replaced[tap] = walk.perturb((tap.name, tap.site), value, gradient_through(tail))

        raw, _, updates = self._run(variables, inputs, replaced, (), kwargs)
        walk.measure(raw)
        logits = walk.perturb((sites.LOGITS,), raw, gradient_through(lambda value: value))
        return logits, raw, _earliest(trace.updates, passes, updates)

    def _run(self, *arguments: Any) -> tuple[Array, list[Array], PyTree]:
        logits, values, updates = self.network.run(*arguments)
        return logits.astype(jnp.float32), values, updates

    def _loss(self, walk: "_Walk", logits: Array) -> tuple[Array, Array]:
        """Return the weighted mean loss and its perturbed gradient at the logits."""
        weights, targets = walk.extras["weights"], walk.extras["targets"]

        def total(logits):
            losses = self.loss_fn(logits, targets)
            return jnp.sum(losses), losses

        grads, losses = jax.grad(total, has_aux=True)(logits)
        grads = walk.perturb((sites.LOGIT_GRADS,), grads)
        # The floor serves a batch that is all padding: its loss and gradient are 0.
        share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
        real = weights > 0
        loss = jnp.sum(jnp.where(real, losses * share, 0.0))
        return loss, jnp.where(real[:, None], grads * share[:, None], 0.0)

    def _taps(self, trace: Trace) -> tuple[Tap, ...]:
        """Return the taps to perturb, in order, having checked every site of the chain."""
        if len(trace.logits.shape) != 2 or trace.logits.shape[1] != self.num_classes:
            raise ValueError(
                f"The network returns {trace.logits.shape}, but num_classes is {self.num_classes}: "
                "its output must be logits [batch, num_classes]."
            )
        wanted = {site for perturbation in self.chain for site in perturbation.sites}
        known = dict.fromkeys([*FIXED, *(n for tap in trace.taps for n in (tap.site, tap.name))])
        for site in sorted(wanted):
            if site not in known:
                raise sites.SiteError(
                    f"There is no site {site!r}; {sites.near(site, list(known))}. "
                    "lpa_jax.list_sites names them all (layers of an nn.scan are sites only if "
                    "its variable_axes have 'perturbation': 0)."
                )
        return tuple(tap for tap in trace.taps if wanted & ({tap.site, tap.name} - set(FIXED)))


@dataclasses.dataclass
class _Walk:
    """What is handed from site to site during one pass; it lives no longer than the trace."""

    chain: sites.Chain
    key: Array
    states: list[PyTree]
    extras: dict[str, Any]
    metrics: dict[str, dict[str, Array]]

    def contents(self) -> dict[str, Any]:
        return {"states": self.states, "extras": self.extras, "metrics": self.metrics}

    def copy(self, **contents: Any) -> "_Walk":
        fresh = {name: type(value)(value) for name, value in self.contents().items()}
        return dataclasses.replace(self, **(fresh | contents))

    def members(self) -> membership.Membership:
        targets = self.extras["targets"]
        return membership.by_class(self.extras["labels"], self.extras["weights"], targets.shape[1])

    def measure(self, logits: Array) -> None:
        """Take the present batch's statistics from logits of which this site is not yet part."""
        stats = statistics.observe_batch(self.extras["class_stats"], logits, self.members())
        self.extras["class_stats"] = stats

    def standing(self, names: tuple[str, ...]) -> list[tuple[int, str]]:
        """Return index and site of each perturbation at a site of one of these names."""
        found = [(i, n) for i, p in enumerate(self.chain) for n in names if n in p.sites]
        return list(dict(found).items())

    def perturb(
        self,
        names: tuple[str, ...],
        value: PyTree,
        gradient_fn: Callable[[PyTree], tuple[Array, PyTree]] | None = None,
        params: PyTree = None,
    ) -> PyTree:
        """Let the transforms at a site have its value, in the order of the chain."""
        standing = self.standing(names)
        if not standing:
            return value
        before, report, targets = value, {}, self.extras["targets"]
        for i, site in standing:
            perturbation = self.chain[i]
            value, self.states[i] = perturbation.update(
                value,
                self.states[i],
                params,
                site=site,
                # The same key at all sites of a perturbation: its draws agree without a state.
                key=jax.random.fold_in(self.key, i),
                gradient_fn=gradient_fn,
                **self.extras,
            )
            if perturbation.report is not None:
                stats, step = self.extras["class_stats"], self.extras["step"]
                report |= perturbation.report(site, stats, step)
        if names == (sites.PARAM_GRADS,):
            self.metrics[names[0]] = {"norm": optax.tree.norm(value)}
        else:
            self.metrics[names[0]] = (
                _change(before, value, self.members(), targets.shape[1]) | report
            )
        return value

    def perturb_targets(self) -> None:
        """Perturb the targets, and move the membership with the examples.

        A perturbation that stands at the labels and elsewhere (mixup) moves the examples
        themselves between classes; one that stands at the labels alone (smoothing) does not.
        """
        targets: Array = self.perturb((sites.LABELS,), self.extras["targets"])
        for i, site in self.standing((sites.LABELS,)):
            if len(self.chain[i].sites) > 1:
                labels: Array = _soft(self.extras["labels"], targets.shape[1])
                key = jax.random.fold_in(self.key, i)
                extras = {**self.extras, "gradient_fn": None}
                moved, _ = self.chain[i].update(
                    labels, self.states[i], None, site=site, key=key, **extras
                )
                self.extras |= {"labels": moved}
        self.extras["targets"] = targets


def _soft(labels: membership.Labels, num_classes: int) -> Float[Array, "batch classes"]:
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return labels.astype(jnp.float32)


def _change(
    before: Array, after: Array, members: membership.Membership, num_classes: int
) -> dict[str, Array]:
    """Return how far each class was moved, `[C]`: absolutely and relative to the value itself."""
    before, after = jax.lax.stop_gradient((before, after))
    size = pgd.norms(before)
    norm = pgd.norms(after.astype(jnp.float32) - before.astype(jnp.float32))
    relative = norm / jnp.where(size > 0, size, 1.0)
    empty = jnp.zeros(num_classes, jnp.float32)
    per_row = {"norm": members.mean(norm), "relative": members.mean(relative)}
    per_row["count"] = members.counts
    return {name: members.put(empty, row) for name, row in per_row.items()}


def _earliest(
    positions: tuple[Position, ...], passes: list[tuple[Position, PyTree]], final: PyTree
) -> PyTree:
    """Take each mutated variable from the first pass in which it is computed ahead of the tap.

    It cannot depend on what a later pass replaces, so the value is the same; but taken from the
    final pass it would keep a second copy of everything ahead of the tap alive.
    """
    leaves, treedef = jax.tree.flatten(final)
    for tap_position, updates in reversed(passes):
        candidates = jax.tree.leaves(updates)
        leaves = [
            candidate if position < tap_position[: len(position)] else leaf
            for leaf, candidate, position in zip(leaves, candidates, positions, strict=True)
        ]
    return jax.tree.unflatten(treedef, leaves)


def _check_labels(labels: membership.Labels, batch: int, num_classes: int) -> None:
    """Raise `ValueError` unless the labels fit; values are checked where they are known."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape != (batch,):
            raise ValueError(f"Integer labels must have shape ({batch},), not {labels.shape}.")
        if not isinstance(labels, core.Tracer) and labels.size:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"Labels must lie in [0, {num_classes}), but range from {low} to {high}."
                )
    elif labels.shape != (batch, num_classes):
        raise ValueError(
            f"Labels must be integers [{batch}] or floats [{batch}, {num_classes}], not "
            f"{labels.dtype} {labels.shape}."
        )
