"""What is handed from site to site on the way through a step, and what transforms are given."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lpa_jax.core import checks, membership, mixing, pgd
from lpa_jax.core.class_stats import ClassStatistic, ClassStats, end_batch, observe_batch
from lpa_jax.core.perturbation import (
    Chain,
    INPUTS,
    LABELS,
    LOGITS,
    no_gradient,
    PARAM_GRADS,
    SiteError,
)
from lpa_jax.core.refusal import Refusal

_UNDECLARED = (
    "{!r} uses {}, which it does not declare: give {}=True where it is made, to stateless, "
    "Perturbation or at."
)


@dataclasses.dataclass
class Walk:
    """What is handed from site to site during one pass; it lives no longer than the trace."""

    chain: Chain
    key: Array
    states: tuple[PyTree, ...]
    step: Array
    class_stats: ClassStats
    labels: membership.Labels
    targets: Array
    weights: Array
    extra: Mapping[str, Array]
    params: PyTree
    class_statistic: ClassStatistic
    axis_name: tuple[str, ...] = ()
    unmatched: tuple[tuple[tuple[str, int], str], ...] = ()
    metrics: dict[str, dict[str, Array]] = dataclasses.field(default_factory=dict)
    measured: bool = False

    def members(self) -> membership.Membership:
        """Return which classes the examples belong to, as it is now."""
        classes = self.targets.shape[1]
        return membership.by_class(self.labels, self.weights, classes, self.axis_name)

    def measured_by(self, logits: Array) -> ClassStats:
        """Return the statistics with the batch, of logits that no class-level work has moved."""
        return observe_batch(self.class_stats, logits, self.members(), self.class_statistic)

    def measure(self, logits: Array) -> None:
        """Take the batch's statistics, once."""
        if not self.measured:
            self.class_stats, self.measured = self.measured_by(logits), True

    def at_site(self, names: tuple[str, ...]) -> list[tuple[int, str]]:
        """Return index and site of each perturbation at a site; its own name comes first."""
        return [
            (i, next(name for name in names if name in perturbation.sites))
            for i, perturbation in enumerate(self.chain)
            if not set(names).isdisjoint(perturbation.sites)
        ]

    @property
    def class_level(self) -> bool:
        """Whether anything of the chain may read the class statistics."""
        return any(perturbation.class_level for perturbation in self.chain)

    def stats_after(self) -> ClassStats:
        """Return the class statistics with the batch taken in, where anything reads them."""
        if not self.class_level:
            return self.class_stats
        return end_batch(self.class_stats, self.members())

    def objective(self) -> "_Objective":
        """Return what the loss depends on besides the logits, as it is now."""
        states = {i: self.states[i] for i, _ in self.at_site((LOGITS,))}
        params = self.params if states else None
        return _Objective(self.labels, self.targets, params, self.class_stats, states)

    def at_loss(self, logits: Array, objective: "_Objective", after: int) -> Array:
        """Return the logits as the loss will see them, with nothing that needs their gradient.

        Args:
          logits: The network's logits, or what the first of the chain have made of them.
          objective: Labels, targets, parameters, class statistics and states.
          after: Place in the chain beyond which transforms at the logits are applied.
        """
        walk = dataclasses.replace(
            self,
            labels=objective.labels,
            targets=objective.targets,
            params=objective.params,
            class_stats=objective.class_stats,
        )
        for i, state in objective.states.items():
            if i > after and not self.chain[i].needs_gradient:
                walk.states = (*walk.states[:i], state, *walk.states[i + 1 :])
                gradient_fn = _Asked()
                changed, _ = walk._update(i, LOGITS, logits, gradient_fn)
                # Of a wrapper it is not known before it runs whether it asks for the gradient.
                logits = logits if gradient_fn.asked else changed
        return logits

    def reads_statistics(self, names: tuple[str, ...]) -> bool:
        """Return whether class-level work is first met at a site."""
        return not self.measured and any(self.chain[i].class_level for i, _ in self.at_site(names))

    def perturb(
        self,
        names: tuple[str, ...],
        value: PyTree,
        gradient_fn: Callable[..., tuple[Array, PyTree]] | None = None,
        *,
        logits: Array | None = None,
        losses: Array | None = None,
        times: Mapping[str, int] = types.MappingProxyType({}),
    ) -> PyTree:
        """Let the transforms at a site have its value, in the order of the chain."""
        found = self.at_site(names)
        if not found:
            return value
        before, members, report = value, self.members(), {}
        for i, site in found:
            climb = gradient_fn
            if climb is not None and names == (LOGITS,):
                climb = functools.partial(climb, after=i)
            value, state = self._update(
                i, site, value, climb, logits, losses, times.get(site, 0), names[0]
            )
            self.states = (*self.states[:i], state, *self.states[i + 1 :])
            if (describe := self.chain[i].report) is not None:
                report |= describe(site, self.class_stats, self.step)
            if names == (INPUTS,) and self.chain[i].mixes:
                self._mix(i)
        if names == (PARAM_GRADS,):
            self.metrics[names[0]] = {"norm": pgd.tree_norm(value)}
        else:
            change = _change(before, value, members, self.targets.shape[1])
            self.metrics[names[0]] = change | report
        return value

    def perturb_targets(self) -> None:
        """Perturb the targets, unless that was done at the inputs."""
        before = self.targets
        found = self.at_site((LABELS,))
        for i, site in found:
            if self.chain[i].mixes:
                if INPUTS not in self.chain[i].sites:
                    self._mix(i)
            else:
                self.targets, state = self._update(i, site, self.targets)
                self.states = (*self.states[:i], state, *self.states[i + 1 :])
        if found:
            change = _change(before, self.targets, self.members(), before.shape[1])
            self.metrics[LABELS] = change

    def _mix(self, index: int) -> None:
        """Move targets and membership with the examples.

        A perturbation that mixes (mixup) moves the examples themselves between classes; another one
        at the labels (smoothing) does not.
        """
        labels = checks.soft(self.labels, self.targets.shape[1])
        moved, _ = self._update(index, LABELS, labels)
        self.targets, state = self._update(index, LABELS, self.targets)
        self.labels = moved
        self.states = (*self.states[:index], state, *self.states[index + 1 :])

    def _update(
        self, index, site, value, gradient_fn=None, logits=None, losses=None, time=0, name=None
    ) -> tuple[Any, Any]:
        perturbation = self.chain[index]
        if perturbation.needs_gradient is False:
            gradient_fn = Refusal(_UNDECLARED.format(perturbation, "gradient_fn", "needs_gradient"))
        elif gradient_fn is None:
            gradient_fn = Refusal(no_gradient(repr(perturbation), site))
        class_stats: Any = self.class_stats
        if not perturbation.class_level:
            class_stats = Refusal(_UNDECLARED.format(perturbation, "class_stats", "class_level"))
        by_target = {
            "labels": self.labels,
            "targets": self.targets,
            "class_stats": class_stats,
            "gradient_fn": gradient_fn,
        }
        if (others := dict(self.unmatched).get((name or site, index))) is not None:
            by_target = dict.fromkeys(by_target, Refusal(mixing.early(site, others)))
        # The same key at all sites of a perturbation: its draws agree without a state.
        key = jax.random.fold_in(self.key, index)
        if self.axis_name and not perturbation.mixes and site != PARAM_GRADS:
            # Each device has other examples.
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
        given = by_target | {
            "site": site,
            # Several calls of one module draw anew.
            "key": jax.random.fold_in(key, time),
            "step": self.step,
            "weights": self.weights,
            "logits": logits,
            "losses": losses,
            "axis_name": self.axis_name,
        }
        try:
            new, state = perturbation.update(
                value, self.states[index], self.params, **given, **self.extra
            )
        except (AttributeError, TypeError) as error:
            if site != INPUTS or isinstance(value, jax.Array):
                raise
            raise SiteError(
                "The inputs are a tree of arrays, and a perturbation there takes one array: name "
                "the array in the network, by lpa_jax.tap(name, array), and perturb it there."
            ) from error
        was, now = (jax.tree.map(jnp.shape, tree) for tree in (value, new))
        if was != now:
            raise SiteError(
                f"The perturbation at {site!r} must return a value of the shape that it is given, "
                f"{was!s:.200}, not {now!s:.200}."
            )
        return new, state


class _Asked:
    """A `gradient_fn` that tells whether a transform asks for the gradient."""

    asked = False

    def __call__(self, value: Array) -> tuple[Array, Array]:
        self.asked = True
        return jnp.zeros(value.shape[:1], jnp.float32), jnp.zeros_like(value)


class _Objective(NamedTuple):
    """What the loss depends on besides the logits; it changes on the way through a step.

    Attributes:
      labels: The class membership.
      targets: The targets.
      params: The network's parameters, if anything acts at the logits.
      class_stats: The class statistics.
      states: State of each perturbation at the logits, by its place in the chain.
    """

    labels: membership.Labels
    targets: Array
    params: PyTree
    class_stats: ClassStats
    states: dict[int, PyTree]

    def same_as(self, other: "_Objective") -> bool:
        """Return whether all arrays are the same ones."""
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return all(mine is its for mine, its in pairs)


jax.tree_util.register_dataclass(
    Walk,
    data_fields=[
        "key", "states", "step", "class_stats", "labels", "targets", "weights", "extra",
        "params", "metrics",
    ],
    meta_fields=["chain", "axis_name", "measured", "unmatched", "class_statistic"],
)  # fmt: skip


def _change(
    before: PyTree, after: PyTree, members: membership.Membership, num_classes: int
) -> dict[str, Array]:
    """Return how far each class was moved, `[C]`: absolutely and relative to the value itself."""
    before, after = (_joined(jax.lax.stop_gradient(value)) for value in (before, after))
    size = pgd.norms(before)
    norm = pgd.norms(after - before)
    relative = norm / jnp.where(size > 0, size, 1.0)
    empty = jnp.zeros(num_classes, jnp.float32)
    per_row = {"norm": members.mean(norm), "relative": members.mean(relative)}
    per_row["count"] = members.counts
    return {name: members.put(empty, row) for name, row in per_row.items()}


def _joined(value: PyTree) -> Array:
    """Return a value by rows, an array or a tree of them, as one in float32."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(value)]
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
