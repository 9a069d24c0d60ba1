"""One training step with perturbations: walk, perturb, replace, back-propagate."""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
from jax import core
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np
import optax

from lpa_jax.core.program import Program, Site
from lpa_jax.perturb import membership, meshes, pgd, sites, statistics


class Network(Protocol):
    """A network that can be traced."""

    def program(self, variables: PyTree, inputs: Any, kwargs: Mapping[str, Any]) -> Program:
        """Trace `(variables, inputs) -> (logits, mutated variables)` by their shapes alone."""
        ...


IGNORE = -1
"""The integer label of an example that does not count: its weight is 0."""
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
        # Shapes alone count: arrays may lie on a mesh with explicit axes.
        shapes = jax.tree.map(shape_of, variables)
        program = self.network.program(shapes, shape_of(inputs), apply_kwargs)
        found = self._wanted(program, inputs)
        self._unmatched(found)
        by_class = jnp.zeros((inputs.shape[0], self.num_classes), jnp.float32)
        values: dict[str, Any] = dict.fromkeys(FIXED, by_class)
        values |= {sites.INPUTS: inputs, sites.PARAM_GRADS: variables["params"]}
        for site in found:
            values |= dict.fromkeys(site.names, jnp.zeros(site.shape, site.dtype))
        return StepState(
            step=jnp.zeros((), jnp.int32),
            class_stats=statistics.init(self.num_classes),
            perturbations=tuple(p.init(values[p.sites[0]]) for p in self.chain),
        )

    def end_epoch(self, state: StepState) -> StepState:
        """Close the epoch for the splits with `window="epoch"`; others are unaffected."""
        return state._replace(class_stats=statistics.end_epoch(state.class_stats))

    def diagnose(
        self,
        variables: PyTree,
        state: StepState,
        inputs: Array,
        labels: membership.Labels,
        key: Array,
        *,
        examples: Int[Array, "batch"] | None = None,
        **apply_kwargs: Any,
    ) -> tuple[collections.OrderedDict[str, Array], PyTree]:
        """Return in words, in the order of computation, whether each value of a step is finite.

        First come those of the network as it is, then what the perturbations make of them. The
        step's gradients are returned as well.
        """
        program = self.network.program(variables, inputs, apply_kwargs)
        values: dict[str, Array] = {}

        def keep(site, value, _):
            values[site.name] = value
            return value

        names = [site.name for site in sites_of(program, inputs)]
        logits, _ = program.walk((variables, inputs), names, keep)
        (loss, aux), grads, _ = self(
            variables, state, inputs, labels, key, examples=examples, **apply_kwargs
        )
        parts = {"the parameters": variables, "the inputs": inputs}
        parts |= {f"{name!r}": value for name, value in values.items()}
        parts |= {"the logits": logits}
        parts |= {f"the perturbation at {site!r}": r for site, r in aux["metrics"].items()}
        parts |= {"the loss": loss, "the gradient": grads}
        # A jitted function returns a plain dict in alphabetical order.
        finite = ((name, all_finite(part)) for name, part in parts.items())
        return collections.OrderedDict(finite), grads

    def __call__(
        self,
        variables: PyTree,
        state: StepState,
        inputs: Array,
        labels: membership.Labels,
        key: Array,
        *,
        weights: Float[Array, "batch"] | None = None,
        examples: Int[Array, "batch"] | None = None,
        **apply_kwargs: Any,
    ) -> tuple[tuple[Array, dict[str, Any]], PyTree, StepState]:
        """Return `((loss, aux), grads, state)`; see `lpa_jax.value_and_grad`."""
        given = (variables, state, inputs, labels, key, weights, examples, apply_kwargs)
        mesh = meshes.explicit(given)
        if mesh is None:
            return self._step(*given)
        on = functools.partial(meshes.on, mesh)
        by_example = NamedSharding(mesh, PartitionSpec(*on(inputs).spec[:1]))
        aux = {"logits": by_example, "labels": by_example, "updates": on(), "metrics": on()}
        kept = jax.tree.map(on, (variables["params"], state))
        return meshes.run_automatic(self._step, mesh, ((on(), aux), *kept), *given)

    def _step(
        self,
        variables: PyTree,
        state: StepState,
        inputs: Array,
        labels: membership.Labels,
        key: Array,
        weights: Float[Array, "batch"] | None,
        examples: Int[Array, "batch"] | None,
        apply_kwargs: Mapping[str, Any],
    ) -> tuple[tuple[Array, dict[str, Any]], PyTree, StepState]:
        batch = inputs.shape[0]
        _check_labels(labels, batch, self.num_classes)
        labels, padded = jnp.asarray(labels), weights is not None
        weights = jnp.ones(batch, jnp.float32) if weights is None else weights
        weights = _checked_weights(weights, batch)
        if jnp.issubdtype(labels.dtype, jnp.integer):
            labels, padded = labels.astype(jnp.int32), True
            weights = jnp.where(labels == IGNORE, 0.0, weights)
        if padded:
            # Padding may hold anything, NaN included, which a weight of 0 would not keep out.
            inputs, labels = (
                jnp.where(pgd.column(weights, values) > 0, values, jnp.zeros_like(values))
                for values in (inputs, labels)
            )
        if examples is not None:
            examples = _checked_examples(examples, batch)
        params = variables["params"]
        start = _Walk(
            chain=self.chain,
            key=jax.random.fold_in(key, state.step),
            states=state.perturbations,
            step=state.step,
            class_stats=state.class_stats,
            labels=labels,
            targets=_soft(labels, self.num_classes),
            weights=weights,
            examples=examples,
            params=params,
        )

        def loss_and_grads(params):
            def to_logits(params):
                return self._forward(start, {**variables, "params": params}, inputs, apply_kwargs)

            logits, pullback, (walk, raw, updates) = jax.vjp(to_logits, params, has_aux=True)
            loss, cotangent = self._loss(walk, logits)
            return loss, pullback(cotangent)[0], walk, raw, updates

        def at_moved(moved):
            if jax.tree.structure(moved) != jax.tree.structure(params):
                raise sites.SiteError(
                    "The gradient at moved parameters needs all of them: a perturbation that asks "
                    "for it cannot stand behind optax.masked or optax.partition. Give sam and asam "
                    "the mask instead, as in lpa_jax.sam(rho, mask=...)."
                )
            return loss_and_grads(moved)[:2]

        loss, grads, walk, raw, updates = loss_and_grads(params)
        grads = walk.perturb((sites.PARAM_GRADS,), grads, at_moved)
        state = StepState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            class_stats=walk.stats_after(),
            perturbations=walk.states,
        )
        labels = walk.labels
        if labels.ndim == 1:
            labels = jnp.where(weights > 0, labels, IGNORE)
        aux = {"logits": raw, "labels": labels, "updates": updates, "metrics": walk.metrics}
        return (loss, aux), grads, state

    def _forward(
        self, start: "_Walk", variables: PyTree, inputs: Array, kwargs: Mapping[str, Any]
    ) -> tuple[Array, tuple["_Walk", Array, PyTree]]:
        """Walk to the logits; return them perturbed, and the walk, them raw, and the mutated."""
        program = self.network.program(variables, inputs, kwargs)
        found = self._wanted(program, inputs)
        # Gradients flow into the parameters that a transform uses, as into those of the network.
        walk = dataclasses.replace(
            start, metrics={}, params=variables["params"], unmatched=self._unmatched(found)
        )
        frozen = jax.lax.stop_gradient(variables)

        def perturb(names, value, tail, time=0):
            """Perturb the value at a site, the network beyond which is `tail`."""
            if names == (sites.LOGITS,) and walk.reads_statistics(names):
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
            # What stands at the logits is part of the loss at every site before them.
            measured_at = walk.objective()

            def gradient_fn(moved, after=-1):
                # The statistics and a transform that starts from the value share one pass.
                same = moved is value and after == -1 and walk.objective().same_as(measured_at)
                return first if first and same else evaluate(moved, after)[0]

            return walk.perturb(names, value, gradient_fn, time=time)

        if walk.standing((sites.INPUTS,)):

            def from_inputs(value):
                return _logits(program.walk((frozen, value), (), _keep))

            inputs = perturb((sites.INPUTS,), inputs, from_inputs)
        walk.perturb_targets()

        times: collections.Counter[str] = collections.Counter()

        def visit(site, value, tail):
            time = times[site.given]
            times[site.given] += 1
            return perturb(site.names, value, lambda value: _logits(tail(value)), time)

        names = [site.name for site in found]
        raw, updates = program.walk((variables, inputs), names, visit)
        raw = raw.astype(jnp.float32)
        logits = perturb((sites.LOGITS,), raw, lambda value: value)
        if walk.class_level:
            walk.measure(raw)
        return logits, (walk, raw, updates)

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

    def _loss(self, walk: "_Walk", logits: Array) -> tuple[Array, Array]:
        """Return the weighted mean loss and its perturbed gradient at the logits."""
        losses, grads = self._losses_and_grads(logits, walk.targets)
        grads = walk.perturb((sites.LOGIT_GRADS,), grads, logits=logits)
        # The loss and gradient of a batch that is all padding are 0.
        total_weight = jnp.sum(walk.weights)
        share = walk.weights / jnp.where(total_weight == 0, 1.0, total_weight)
        real = walk.weights > 0
        loss = jnp.sum(jnp.where(real, losses * share, 0.0))
        return loss, jnp.where(real[:, None], grads * share[:, None], 0.0)

    def _wanted(self, program: Program, inputs: Array) -> list[Site]:
        """Return the sites to perturb, in order, having looked for every site of the chain."""
        logits, _ = program.shapes
        if len(logits.shape) != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"The network returns {logits.shape}, but num_classes is {self.num_classes}: "
                "its output must be logits [batch, num_classes]."
            )
        wanted = {site for perturbation in self.chain for site in perturbation.sites}
        if sites.INPUTS in wanted and not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise sites.SiteError(
                f"The inputs are {inputs.dtype}, and perturbations need floats: scale pixels "
                "to [0, 1] first, or name a module."
            )
        found = sites_of(program, inputs)
        known = dict.fromkeys([*FIXED, *(name for site in found for name in site.names)])
        for site in sorted(wanted):
            if site in program.unreachable and site not in known:
                raise sites.SiteError(f"{site!r} is no site: {program.unreachable[site]}.")
            if site not in known:
                raise sites.SiteError(
                    f"There is no site {site!r}; {sites.near(site, list(known))}. "
                    "lpa_jax.list_sites names them all."
                )
        return [site for site in found if wanted & (set(site.names) - set(FIXED))]

    def _unmatched(self, found: list[Site]) -> tuple[tuple[tuple[str, int], str], ...]:
        """Find what stands where the targets are mixed and the examples are not yet.

        Returns:
          The sites of the mixing, in words, for each name of a value and place in the chain.

        Raises:
          SiteError: If class-level work stands ahead of mixing, or something is mixed twice.
        """
        unmatched = {}
        order = [sites.INPUTS, *(site.name for site in found)]
        at = {name: [order.index(name)] for name in order}
        for site in found:
            if site.name != site.given:
                at.setdefault(site.given, []).append(order.index(site.name))

        def places(rank):
            # At one site the order of the chain decides.
            return [(place, rank) for site in self.chain[rank].sites for place in at.get(site, [])]

        for mixing_rank, mixing in enumerate(self.chain):
            if sites.LABELS not in mixing.sites or len(mixing.sites) == 1:
                continue
            for site in mixing.sites:
                if len(at.get(site, [])) > 1:
                    raise sites.SiteError(
                        f"{site!r} is computed several times, and mixing more than once would not "
                        f"fit the targets; name one, such as '{site}[0]'."
                    )
            mixed = (0, mixing_rank if sites.INPUTS in mixing.sites else len(self.chain))
            last = max(places(mixing_rank), default=(0, 0))
            for rank, other in enumerate(self.chain):
                for place, _ in places(rank):
                    if rank == mixing_rank:
                        continue
                    if other.class_level and (place, rank) < last:
                        raise sites.SiteError(_early(order[place], str(mixing.sites)))
                    if mixed < (place, rank) < last:
                        unmatched[order[place], rank] = str(mixing.sites)
        return tuple(unmatched.items())


@dataclasses.dataclass
class _Walk:
    """What is handed from site to site during one pass; it lives no longer than the trace."""

    chain: sites.Chain
    key: Array
    states: tuple[PyTree, ...]
    step: Array
    class_stats: statistics.ClassStats
    labels: membership.Labels
    targets: Array
    weights: Array
    examples: Array | None
    params: PyTree
    unmatched: tuple[tuple[tuple[str, int], str], ...] = ()
    metrics: dict[str, dict[str, Array]] = dataclasses.field(default_factory=dict)
    measured: bool = False

    def members(self) -> membership.Membership:
        return membership.by_class(self.labels, self.weights, self.targets.shape[1])

    def measured_by(self, logits: Array) -> statistics.ClassStats:
        """Return the statistics with the batch, of logits that no class-level work has moved."""
        return statistics.observe_batch(self.class_stats, logits, self.members())

    def measure(self, logits: Array) -> None:
        """Take the batch's statistics, once."""
        if not self.measured:
            self.class_stats, self.measured = self.measured_by(logits), True

    def standing(self, names: tuple[str, ...]) -> list[tuple[int, str]]:
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

    def stats_after(self) -> statistics.ClassStats:
        """Return the class statistics with the batch taken in, where anything reads them."""
        if not self.class_level:
            return self.class_stats
        return statistics.end_batch(self.class_stats, self.members())

    def objective(self) -> "_Objective":
        """Return what the loss depends on besides the logits, as it is now."""
        states = {i: self.states[i] for i, _ in self.standing((sites.LOGITS,))}
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
            if i > after:
                walk.states = (*walk.states[:i], state, *walk.states[i + 1 :])
                gradient_fn = _Asked()
                changed, _ = walk._update(i, sites.LOGITS, logits, gradient_fn)
                logits = logits if gradient_fn.asked else changed
        return logits

    def reads_statistics(self, names: tuple[str, ...]) -> bool:
        """Return whether class-level work is first met at a site."""
        return not self.measured and any(self.chain[i].class_level for i, _ in self.standing(names))

    def perturb(
        self,
        names: tuple[str, ...],
        value: PyTree,
        gradient_fn: Callable[..., tuple[Array, PyTree]] | None = None,
        *,
        logits: Array | None = None,
        time: int = 0,
    ) -> PyTree:
        """Let the transforms at a site have its value, in the order of the chain."""
        standing = self.standing(names)
        if not standing:
            return value
        before, members, report = value, self.members(), {}
        for i, site in standing:
            climb = gradient_fn
            if climb is not None and names == (sites.LOGITS,):
                climb = functools.partial(climb, after=i)
            value, state = self._update(i, site, value, climb, logits, time, names[0])
            self.states = (*self.states[:i], state, *self.states[i + 1 :])
            if (describe := self.chain[i].report) is not None:
                report |= describe(site, self.class_stats, self.step)
            if names == (sites.INPUTS,) and sites.LABELS in self.chain[i].sites:
                self._mix(i)
        if names == (sites.PARAM_GRADS,):
            self.metrics[names[0]] = {"norm": pgd.tree_norm(value)}
        else:
            change = _change(before, value, members, self.targets.shape[1])
            self.metrics[names[0]] = change | report
        return value

    def perturb_targets(self) -> None:
        """Perturb the targets, unless that was done at the inputs."""
        before = self.targets
        standing = self.standing((sites.LABELS,))
        for i, site in standing:
            if sites.INPUTS in self.chain[i].sites:
                continue
            if len(self.chain[i].sites) > 1:
                self._mix(i)
            else:
                self.targets, state = self._update(i, site, self.targets)
                self.states = (*self.states[:i], state, *self.states[i + 1 :])
        if standing:
            change = _change(before, self.targets, self.members(), before.shape[1])
            self.metrics[sites.LABELS] = change

    def _mix(self, index: int) -> None:
        """Move targets and membership with the examples.

        A perturbation that stands at the labels and elsewhere (mixup) moves the examples
        themselves between classes; one that stands at the labels alone (smoothing) does not.
        """
        labels = _soft(self.labels, self.targets.shape[1])
        moved, _ = self._update(index, sites.LABELS, labels)
        self.targets, state = self._update(index, sites.LABELS, self.targets)
        self.labels = moved
        self.states = (*self.states[:index], state, *self.states[index + 1 :])

    def _update(
        self, index, site, value, gradient_fn=None, logits=None, time=0, name=None
    ) -> tuple[Any, Any]:
        by_target = {
            "labels": self.labels,
            "targets": self.targets,
            "class_stats": self.class_stats,
            "gradient_fn": gradient_fn,
        }
        if (mixing := dict(self.unmatched).get((name or site, index))) is not None:
            by_target = dict.fromkeys(by_target, _Unmatched(site, mixing))
        # The same key at all sites of a perturbation: its draws agree without a state.
        key = jax.random.fold_in(self.key, index)
        new, state = self.chain[index].update(
            value,
            self.states[index],
            self.params,
            site=site,
            # Several calls of one module draw anew.
            key=jax.random.fold_in(key, time),
            step=self.step,
            weights=self.weights,
            examples=self.examples,
            logits=logits,
            **by_target,
        )
        was, now = (jax.tree.map(jnp.shape, tree) for tree in (value, new))
        if was != now:
            raise sites.SiteError(
                f"The perturbation at {site!r} must return a value of the shape that it is given, "
                f"{was!s:.200}, not {now!s:.200}."
            )
        return new, state


class _Unmatched:
    """Stands for what depends on the targets where they are mixed and the examples not yet."""

    def __init__(self, site: str, mixing: str):
        self._told = _early(site, mixing)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise sites.SiteError(self._told)

    # Python looks these up on the class.
    __call__ = __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = _refuse
    __array__ = __jax_array__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __invert__ = __abs__ = __and__ = __or__ = __xor__ = _refuse
    __hash__ = object.__hash__


def _early(site: str, mixing: str) -> str:
    return (
        f"A perturbation at {site!r} that reads classes, targets or the gradient would see targets "
        f"that are mixed before the examples are, at {mixing}; place it after the last of them. "
        "(What an optax wrapper contains is not known, and is taken for one that does.)"
    )


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
      params: The network's parameters, if anything stands at the logits.
      class_stats: The class statistics.
      states: State of each perturbation at the logits, by its place in the chain.
    """

    labels: membership.Labels
    targets: Array
    params: PyTree
    class_stats: statistics.ClassStats
    states: dict[int, PyTree]

    def same_as(self, other: "_Objective") -> bool:
        """Return whether all arrays are the same ones."""
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return all(mine is its for mine, its in pairs)


jax.tree_util.register_dataclass(
    _Walk,
    data_fields=[
        "key", "states", "step", "class_stats", "labels", "targets", "weights", "examples",
        "params", "metrics",
    ],
    meta_fields=["chain", "measured", "unmatched"],
)  # fmt: skip


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether no number in a tree is NaN or infinite."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _soft(labels: membership.Labels, num_classes: int) -> Float[Array, "batch classes"]:
    if labels.ndim == 1:
        known = (labels >= 0) & (labels < num_classes)
        targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        # A label whose value was not known when the step was traced: the loss is NaN, not 0.
        return jnp.where(known[:, None], targets, jnp.nan)
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


def shape_of(value: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def sites_of(program: Program, inputs: Array) -> list[Site]:
    """Return the sites whose first axis is that of the batch."""
    batch = inputs.shape[:1]
    return [site for site in program.sites if site.shape[:1] == batch]


def _logits(result: tuple[Array, PyTree]) -> Array:
    return result[0].astype(jnp.float32)


def _keep(site: Site, value: Array, tail: Any) -> Array:
    return value


def _checked_examples(examples: Array, batch: int) -> Int[Array, "batch"]:
    if examples.shape != (batch,) or not jnp.issubdtype(examples.dtype, jnp.integer):
        raise ValueError(
            f"examples must be integers [{batch}], the places of the batch's examples in the "
            f"training set, not {examples.dtype} {examples.shape}."
        )
    return jnp.asarray(examples)


def _checked_weights(weights: Any, batch: int) -> Float[Array, "batch"]:
    """Return weights as float32; those that are not allowed are an error, or NaN where traced."""
    array = jnp.asarray(weights, jnp.float32)
    if array.shape != (batch,):
        raise ValueError(f"weights must have shape ({batch},), not {array.shape}.")
    if _known(weights) and not (np.isfinite(weights) & (np.asarray(weights) >= 0)).all():
        raise ValueError(
            f"weights must be finite and at least 0, the weight of an example to leave out, but "
            f"are {weights}."
        )
    return jnp.where(array >= 0, array, jnp.nan)


def _known(array: Any) -> bool:
    """Return whether the values of an array can be looked at."""
    return not isinstance(array, core.Tracer) and getattr(array, "is_fully_addressable", True)


def _check_labels(labels: membership.Labels, batch: int, num_classes: int) -> None:
    """Raise `ValueError` unless the labels fit; values are checked where they are known."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape != (batch,):
            raise ValueError(f"Integer labels must have shape ({batch},), not {labels.shape}.")
        if labels.size and _known(labels):
            # Not by jax: within a jit its operations are traced, on constants too.
            low, high = np.asarray(labels).min(), np.asarray(labels).max()
            if low < IGNORE or high >= num_classes:
                raise ValueError(
                    f"Labels must lie in [0, {num_classes}), or be {IGNORE} for an example that "
                    f"does not count, but range from {low} to {high}."
                )
    elif labels.shape != (batch, num_classes):
        raise ValueError(
            f"Labels must be integers [{batch}] or floats [{batch}, {num_classes}], not "
            f"{labels.dtype} {labels.shape}."
        )
