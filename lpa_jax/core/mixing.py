"""Where mixing is in a chain; what would see targets mixed before the examples is refused."""

from collections.abc import Mapping
from typing import Any

from lpa_jax.core.network import Place
from lpa_jax.core.perturbation import Chain, INPUTS, SiteError


def unmatched(chain: Chain, found: list[Place]) -> tuple[tuple[tuple[str, int], str], ...]:
    """Find what acts where the targets are mixed and the examples are not yet.

    Returns:
      The sites of the mixing, in words, for each name of a value and place in the chain.

    Raises:
      SiteError: If class-level work comes before mixing, or something is mixed twice.
    """
    found_early = {}
    order = [INPUTS, *(place.site.name for place in found)]
    at: dict[str, list[int]] = {name: [order.index(name)] for name in order}
    for place in found:
        for name in place.names[1:]:
            if name != place.site.name:
                at.setdefault(name, []).append(order.index(place.site.name))

    def places(rank):
        # At one site the order of the chain decides.
        return [(place, rank) for site in chain[rank].sites for place in at.get(site, [])]

    for mixing_rank, mixing in enumerate(chain):
        if not mixing.mixes:
            continue
        for site in mixing.sites:
            if len(at.get(site, [])) > 1:
                raise SiteError(
                    f"{site!r} is computed several times, and mixing more than once would not "
                    f"fit the targets; name one, such as {order[at[site][0]]!r}."
                )
        mixed = (0, mixing_rank if INPUTS in mixing.sites else len(chain))
        last = max(places(mixing_rank), default=(0, 0))
        for rank, other in enumerate(chain):
            for place, _ in places(rank):
                if rank == mixing_rank:
                    continue
                if other.class_level and (place, rank) < last:
                    raise SiteError(early(order[place], str(mixing.sites)))
                if mixed < (place, rank) < last:
                    found_early[order[place], rank] = str(mixing.sites)
    return tuple(found_early.items())


def check_unmixed(chain: Chain, given: Mapping[str, Any]) -> None:
    """Raise `SiteError` if examples are mixed of which a part would stay as it is."""
    for mixing in chain:
        if mixing.mixes and given:
            raise SiteError(
                f"{mixing!r} mixes examples, but {', '.join(map(repr, given))} would stay those of "
                "the first of each pair: put what can be mixed into the inputs, a dictionary of "
                "float arrays, or leave the mixing out."
            )
        if mixing.mixes:
            raise SiteError(
                f"{mixing!r} mixes examples, which is not defined for a label at each position."
            )


def early(site: str, mixing: str) -> str:
    """Return what is wrong where class-level work sees targets mixed before the examples."""
    return (
        f"A perturbation at {site!r} that reads classes, targets or the gradient would see targets "
        f"that are mixed before the examples are, at {mixing}; place it after the last of them. "
        "(What an optax wrapper contains is not known, and is taken for one that does.)"
    )
