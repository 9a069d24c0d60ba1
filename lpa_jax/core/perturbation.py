"""Perturbations, the sites they stand at, and chains of them."""

from collections.abc import Callable, Sequence
import difflib
import inspect
import re
from typing import Any

from jaxtyping import Array
import optax

INPUTS = "inputs"
LABELS = "labels"
LOGITS = "logits"
LOGIT_GRADS = "logit_grads"
PARAM_GRADS = "param_grads"


class SiteError(ValueError):
    """A perturbation stands at a site that does not exist or cannot serve it."""


class Perturbation(optax.GradientTransformationExtraArgs):
    """An optax transform together with the sites it stands at.

    It is an ordinary `optax.GradientTransformationExtraArgs`, whose *updates* are the value at the
    site, so every optax wrapper accepts it. A wrapper forgets the site: give it back with `at`.

    Attributes:
      sites: Names of the sites, at least one. A perturbation of several sites keeps one state,
        threaded through them in the order in which they are computed.
      report: What to show of the perturbation at a site, `report(site, class_stats, step)`, a dict
        of arrays; None if there is nothing beyond the change of the value.
      class_level: Whether it may read the class statistics, which are then measured before it. They
        are measured only where something may read them. If not told: whether `update` names
        `class_stats`, or takes its extra arguments under a name other than `_`.
    """

    sites: tuple[str, ...]
    report: Callable[..., dict[str, Array]] | None
    class_level: bool

    def __new__(
        cls,
        sites: str | Sequence[str],
        init: Callable[..., Any],
        update: Callable[..., Any],
        report: Callable[..., dict[str, Array]] | None = None,
        class_level: bool | None = None,
    ) -> "Perturbation":
        """Place the transform `(init, update)` at `sites`."""
        self = super().__new__(cls, init, update)
        self.report = report
        self.class_level = _class_level(update, report) if class_level is None else class_level
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        if not self.sites or not all(isinstance(site, str) and site for site in self.sites):
            raise SiteError(f"A perturbation needs the name of at least one site, not {sites!r}.")
        if len(set(self.sites)) < len(self.sites):
            raise SiteError(f"A perturbation names a site twice: {self.sites}.")
        return self

    @property
    def mixes(self) -> bool:
        """Whether examples are mixed with their targets, as a site of both tells."""
        return LABELS in self.sites and len(self.sites) > 1

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.sites, *self, self.report, self.class_level)

    def __repr__(self) -> str:
        return f"Perturbation(sites={self.sites})"


Chain = tuple[Perturbation, ...]


def stateless(
    sites: str | Sequence[str],
    update: Callable[..., Any],
    report: Callable[..., dict[str, Array]] | None = None,
) -> Perturbation:
    """Place a function `update(value, **extra) -> value` at `sites`.

    The extra arguments, all keyword-only, are those `value_and_grad` describes; name the ones used
    and swallow the others with `**_`.

    Example:
      >>> import lpa_jax
      >>> halve = lpa_jax.stateless("logits", lambda value, **_: 0.5 * value)
      >>> halve.update(4.0, halve.init(4.0))
      (2.0, EmptyState())
    """

    def stateful(value, state, params=None, **extra):
        return update(value, params=params, **extra), state

    return Perturbation(
        sites, optax.init_empty_state, stateful, report, _class_level(update, report)
    )


def _class_level(update: Callable[..., Any], report: Callable[..., Any] | None) -> bool:
    if report is not None:
        return True
    parameters = inspect.signature(update).parameters
    rest = [p.name for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    return "class_stats" in parameters or rest not in ([], ["_"])


def at(site: str | Sequence[str], transform: optax.GradientTransformation) -> Perturbation:
    """Place any optax transform at a site.

    Optax's wrappers take perturbations as they take any transform. `optax.inject_hyperparams`
    needs to be told what is not a number to inject: the arguments that count or choose.

    Args:
      site: `"inputs"`, `"labels"`, the path of a layer, `"logits"`, `"logit_grads"` or
        `"param_grads"`. Of a perturbation that was wrapped: exactly its own sites, in its order
        (`("inputs", "labels")` of `mixup`), which the wrapper does not tell.
      transform: What to apply to the value at the site, taken as optax's *updates*. A perturbation
        that is not wrapped has its sites already, and is returned as it is.

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
    if isinstance(transform, Perturbation):
        if transform.sites != ((site,) if isinstance(site, str) else tuple(site)):
            raise SiteError(
                f"{transform!r} has sites of its own: name {site!r} where it is made, not in at()."
            )
        return transform
    # A wrapper does not tell what it wraps, but without extra arguments nothing is class-level.
    class_level = isinstance(transform, optax.GradientTransformationExtraArgs)
    update = optax.with_extra_args_support(transform).update
    return Perturbation(site, transform.init, update, class_level=class_level)


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


def check_climbable(name: str, sites: Sequence[str]) -> None:
    """Raise `SiteError` unless the loss of an example has a gradient at each of the sites."""
    for site in sites:
        if site in (LABELS, LOGIT_GRADS, PARAM_GRADS):
            require_gradient(name, site, None)


def check_activations(name: str, sites: Sequence[str]) -> None:
    """Raise `SiteError` unless each of the sites holds activations `[B, ...]`."""
    for site in sites:
        if site in (LABELS, LOGIT_GRADS, PARAM_GRADS):
            raise SiteError(f"{name} stands at 'inputs', a module or 'logits', not at {site!r}.")


def require_gradient(name: str, site: str | None, gradient_fn: Any) -> Any:
    """Return `gradient_fn`, or raise `SiteError` where the site has none to offer."""
    if gradient_fn is None:
        raise SiteError(
            f"{name} needs the gradient of the loss at its site, which {site!r} does not have; "
            "place it at 'inputs', a module or 'logits'."
        )
    return gradient_fn
