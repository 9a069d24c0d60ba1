"""Perturbations, the sites they act at, and chains of them."""

from collections.abc import Callable, Sequence
import difflib
import functools
import inspect
import re
from typing import Any, cast, Protocol

from jaxtyping import Array
import optax

from lpa_jax.core.class_stats import ClassStats

INPUTS = "inputs"
LABELS = "labels"
LOGITS = "logits"
LOGIT_GRADS = "logit_grads"
PARAM_GRADS = "param_grads"


class SiteError(ValueError):
    """A perturbation is placed at a site that does not exist or that it cannot act at."""


class Update(Protocol):
    """What `update` of a perturbation is given, and what it returns: `(new value, new state)`.

    Arguments after `params` are given by name; an update names those it uses and takes the others
    as `**_`. B is the number of examples, of labels `[B, T]` that of all positions, `B * T`. The
    axis of the batch comes first, wherever it is in the network.

    Args:
      value: The value at the site, optax's *updates*: `[B, ...]` at `"inputs"` (a tree of such
        arrays if the inputs are one) and at layers, float32 `[B, C]` at `"labels"`, `"logits"` and
        `"logit_grads"`, a tree like the parameters at `"param_grads"`.
      state: From `init` or the update before, at any site of the perturbation.
      params: Parameters of the network, through which gradients flow.
      site: Name of the site, as the perturbation names it.
      key: A PRNG key, the same at all sites of a perturbation in one step. Where a layer is called
        several times, and on each device of `axis_name`, there is a key of its own.
      step: Number of steps taken, int32 scalar; what schedules are evaluated at.
      labels: The class membership: int `[B]` in `[0, C)`, or float32 `[B, C]` where labels are soft
        or examples are mixed.
      targets: What the loss is taken at, float32 `[B, C]`.
      weights: Of the examples, float32 `[B]`, at least 0; 0 for padding, which may hold anything.
      class_stats: What is known of each class, with the present batch as it was before class-level
        work moved any value. Using it raises `SiteError` unless the perturbation is class-level.
      gradient_fn: `gradient_fn(value)` returns the losses `[B]` of the examples and their gradient,
        a value, through the rest of the network; at `"param_grads"` `gradient_fn(params)` returns
        the mean loss and its gradient. Both are constants for back-propagation. Calling it raises
        `SiteError` where the site has no gradient (`"labels"`, `"logit_grads"`), or the
        perturbation declares that it needs none.
      logits: At `"logit_grads"` the logits `[B, C]` at which the gradient was taken; else None.
      losses: At `"logit_grads"` the losses `[B]` of the examples there; else None.
      axis_name: Axes of devices over which the step is mapped, each of which has a part of the
        batch; usually `()`.
      **extra: The arrays `[B, ...]` that the step was given in its `extra`, by their names.
    """

    def __call__(
        self,
        value: Any,
        state: Any,
        params: Any = None,
        /,
        *,
        site: str,
        key: Array,
        step: Any,
        labels: Array,
        targets: Array,
        weights: Array,
        class_stats: ClassStats,
        gradient_fn: Callable[[Any], tuple[Array, Any]],
        logits: Array | None,
        losses: Array | None,
        axis_name: tuple[str, ...],
        **extra: Array,
    ) -> tuple[Any, Any]:
        """Return the perturbed value, of the same shape and dtype, and the new state."""
        ...


class StatelessUpdate(Protocol):
    """An `Update` without a state; `params` is given by name, as the arguments of `Update` are."""

    def __call__(
        self,
        value: Any,
        /,
        *,
        params: Any,
        site: str,
        key: Array,
        step: Any,
        labels: Array,
        targets: Array,
        weights: Array,
        class_stats: ClassStats,
        gradient_fn: Callable[[Any], tuple[Array, Any]],
        logits: Array | None,
        losses: Array | None,
        axis_name: tuple[str, ...],
        **extra: Array,
    ) -> Any:
        """Return the perturbed value, of the same shape and dtype."""
        ...


GIVEN = (*list(inspect.signature(Update.__call__).parameters)[1:-1], "updates")
"""Names of what an update is given, optax's among them; no array of `extra` can have one."""


class Perturbation(optax.GradientTransformationExtraArgs):
    """An optax transform together with the sites it acts at.

    It is an ordinary `optax.GradientTransformationExtraArgs`, whose *updates* are the value at the
    site, so every optax wrapper accepts it. A wrapper forgets the site and what was declared: give
    it back with `at`.

    Attributes:
      sites: Names of the sites, at least one. A perturbation of several sites keeps one state,
        threaded through them in the order in which they are computed.
      report: What to show of the perturbation at a site, `report(site, class_stats, step)`, a dict
        of arrays; None if there is nothing beyond the change of the value.
      mixes: Whether it mixes examples with their targets. It acts at `"labels"` and elsewhere,
        and the class membership moves with the targets.
      class_level: Whether it reads the class statistics, which are then measured before it. They
        are measured only where something reads them.
      needs_gradient: Whether it calls `gradient_fn`; None where that is not known.
    """

    sites: tuple[str, ...]
    report: Callable[..., dict[str, Array]] | None
    mixes: bool
    class_level: bool
    needs_gradient: bool | None

    def __new__(
        cls,
        sites: str | Sequence[str],
        init: Callable[..., Any],
        update: Update,
        report: Callable[..., dict[str, Array]] | None = None,
        *,
        mixes: bool | None = None,
        class_level: bool | None = None,
        needs_gradient: bool | None = None,
    ) -> "Perturbation":
        """Place the transform `(init, update)` at `sites`.

        Args:
          sites: One or several names of sites.
          init: `init(value)` returns the first state, of a value at the first of the sites.
          update: See `Update`.
          report: See the attributes.
          mixes: Not declared: whether it acts at `"labels"` and elsewhere.
          class_level: Not declared: whether there is a report, which is given the statistics. An
            update that uses them undeclared raises `SiteError`.
          needs_gradient: Not declared: not known.

        Raises:
          SiteError: If there is no site, one is named twice, or one cannot serve what is declared.
        """
        self = super().__new__(cls, init, cast(Any, update))
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        self.report = report
        mixing_sites = LABELS in self.sites and len(self.sites) > 1
        self.mixes = mixing_sites if mixes is None else mixes
        self.class_level = report is not None if class_level is None else class_level
        self.needs_gradient = needs_gradient
        if not self.sites or not all(isinstance(site, str) and site for site in self.sites):
            raise SiteError(f"A perturbation needs the name of at least one site, not {sites!r}.")
        if len(set(self.sites)) < len(self.sites):
            raise SiteError(f"A perturbation names a site twice: {self.sites}.")
        if self.mixes and not mixing_sites:
            raise SiteError(
                f"A perturbation that mixes examples acts at {LABELS!r} and at another site, not "
                f"at {self.sites} alone."
            )
        without = [site for site in (LABELS, LOGIT_GRADS) if site in self.sites]
        # What mixes may need it at its other sites.
        if self.needs_gradient and without and not self.mixes:
            raise SiteError(no_gradient(repr(self), without[0]))
        return self

    def _traits(self) -> dict[str, bool | None]:
        names = ("mixes", "class_level", "needs_gradient")
        return {name: getattr(self, name) for name in names}

    # A tuple's own would lose the attributes.
    def _replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, **changes: Any
    ) -> "Perturbation":
        """Return it with some of its parts and attributes changed."""
        parts = {"sites": self.sites, "init": self.init, "update": self.update}
        return type(self)(**{**parts, "report": self.report, **self._traits(), **changes})

    __replace__ = _replace

    def _all(self) -> tuple[Any, ...]:
        return (self.sites, *self, self.report, *self._traits().values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Perturbation) and self._all() == other._all()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), **self._traits())
        return make, (self.sites, *self, self.report)

    def __repr__(self) -> str:
        return f"Perturbation(sites={self.sites})"


Chain = tuple[Perturbation, ...]


def stateless(
    sites: str | Sequence[str],
    update: StatelessUpdate,
    report: Callable[..., dict[str, Array]] | None = None,
    *,
    mixes: bool | None = None,
    class_level: bool | None = None,
    needs_gradient: bool | None = None,
) -> Perturbation:
    """Place a function `update(value, **given) -> value` at `sites`.

    Args:
      sites: One or several names of sites.
      update: See `StatelessUpdate`: name what is used of `Update`'s arguments and swallow the
        others with `**_`.
      report: As of `Perturbation`.
      mixes: As of `Perturbation`, like the others.
      class_level: Whether `update` reads `class_stats`.
      needs_gradient: Whether it calls `gradient_fn`.

    Raises:
      SiteError: As `Perturbation`.

    Example:
      >>> import lpa_jax
      >>> halve = lpa_jax.stateless("logits", lambda value, **_: 0.5 * value)
      >>> halve.update(4.0, halve.init(4.0))
      (2.0, EmptyState())
    """

    def stateful(value, state, params=None, **given):
        return update(value, params=params, **given), state

    return Perturbation(
        sites,
        optax.init_empty_state,
        stateful,
        report,
        mixes=mixes,
        class_level=class_level,
        needs_gradient=needs_gradient,
    )


def at(
    site: str | Sequence[str],
    transform: optax.GradientTransformation,
    *,
    mixes: bool | None = None,
    class_level: bool | None = None,
    needs_gradient: bool | None = None,
) -> Perturbation:
    """Place any optax transform at a site.

    Optax's wrappers take perturbations as they take any transform. `optax.inject_hyperparams`
    needs to be told what is not a number to inject: the arguments that count or choose.

    Args:
      site: `"inputs"`, `"labels"`, the path of a layer, `"logits"`, `"logit_grads"` or
        `"param_grads"`. Of a perturbation that was wrapped: exactly its own sites, in its order
        (`("inputs", "labels")` of `mixup`), which the wrapper does not tell.
      transform: What to apply to the value at the site, taken as optax's *updates*. A perturbation
        that is not wrapped has its sites already, and is returned as it is, but for what is
        declared here.
      mixes: Whether examples are mixed with their targets. Not declared: whether `"labels"` is one
        of several sites.
      class_level: Whether it reads the class statistics. A wrapper does not tell what it wraps:
        not declared, it is taken to read them if it takes extra arguments. They are then measured,
        which costs a pass through the rest of the network, and ahead of mixing it is refused.
      needs_gradient: Whether it asks for the gradient. Not declared, that is found out where it
        matters, from whether it calls `gradient_fn` at the logits.

    Returns:
      The perturbation, ready for `chain`.

    Raises:
      TypeError: If `transform` is not an optax transform.
      SiteError: If it is a perturbation of other sites.

    Example:
      >>> import lpa_jax, optax
      >>> lpa_jax.at("logit_grads", optax.clip(0.5))
      Perturbation(sites=('logit_grads',))
      >>> injected = optax.inject_hyperparams(lpa_jax.lpa, static_args=("steps", "low_rank"))
      >>> lpa_jax.at("group3", injected("group3", epsilon=optax.linear_schedule(0.0, 0.2, 100)))
      Perturbation(sites=('group3',))
    """
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(f"at({site!r}, ...) takes an optax transform, not {transform!r}.")
    declared = {"mixes": mixes, "class_level": class_level, "needs_gradient": needs_gradient}
    declared = {name: trait for name, trait in declared.items() if trait is not None}
    if isinstance(transform, Perturbation):
        if transform.sites != ((site,) if isinstance(site, str) else tuple(site)):
            raise SiteError(
                f"{transform!r} has sites of its own: name {site!r} where it is made, not in at()."
            )
        return transform._replace(**declared) if declared else transform
    known: dict[str, Any] = {"class_level": True}
    if not isinstance(transform, optax.GradientTransformationExtraArgs):
        # Without extra arguments there is nothing to read and nothing to ask.
        known = {"class_level": False, "needs_gradient": False}
    update = optax.with_extra_args_support(transform).update
    return Perturbation(site, transform.init, update, **{**known, **declared})


def chain(*perturbations: "Perturbation | Chain") -> Chain:
    """Put perturbations together; each acts at its own site.

    Sites are perturbed in the order in which they are computed, whatever the order given here;
    perturbations of the same site act in the order given.

    Args:
      *perturbations: Perturbations, or chains of them.

    Returns:
      The chain, for `value_and_grad`.

    Raises:
      TypeError: If an argument has no site (a bare optax transform, for instance).

    Example:
      >>> import lpa_jax
      >>> lpa_jax.chain(lpa_jax.lpg(epsilon=0.1), lpa_jax.label_smoothing(0.1))
      (Perturbation(sites=('logit_grads',)), Perturbation(sites=('labels',)))
    """
    flat: list[Perturbation] = []
    for item in perturbations:
        if isinstance(item, Perturbation):
            flat.append(item)
        elif isinstance(item, optax.GradientTransformation) or not isinstance(item, tuple):
            raise TypeError(
                f"{item!r} has no site; place it with lpa_jax.at(site, transform) before chaining."
            )
        else:
            flat.extend(chain(*item))
    return tuple(flat)


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Return whether a pattern means a value of these names.

    `*` stands for any part of a name between slashes, and `**` for any part.

    Example:
      >>> matches("layer*/mlp", ["layer3/mlp"]), matches("*", ["layer3/mlp"])
      (True, False)
    """
    parts = (re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("**"))
    return any(re.fullmatch(".*".join(parts), name) for name in names)


def near(name: str, known: Sequence[str]) -> str:
    """Return a phrase that lists the known names closest to `name`, for error messages."""
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
    return f"near names: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def check_activations(name: str, sites: Sequence[str]) -> None:
    """Raise `SiteError` unless each of the sites holds activations `[B, ...]`."""
    for site in sites:
        if site in (LABELS, LOGIT_GRADS, PARAM_GRADS):
            raise SiteError(f"{name} acts at 'inputs', a module or 'logits', not at {site!r}.")


def no_gradient(name: str, site: str) -> str:
    """Return what is wrong where a perturbation needs the gradient at a site that has none."""
    return (
        f"{name} needs the gradient of the loss at its site, which {site!r} does not have; place "
        "it at 'inputs', a module or 'logits'."
    )
