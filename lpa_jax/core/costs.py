"""What the equations of a jaxpr cost, counted by their shapes."""

import math
from typing import Any

from lpa_jax.core.jaxprs import inside, opened, Path


def flops(jaxpr: Any, after: Path = ()) -> int:
    """Return the FLOPs of a jaxpr, or of what comes after a value in it.

    Matrix products and convolutions count by their multiplications and additions, other equations
    by the entries of their results; the body of a scan counts by its turns, of a loop whose turns
    are not known once, and of a conditional the most expensive branch.
    """
    if not after:
        return sum(_of(eqn) for eqn in jaxpr.eqns)
    place, within = after[0], after[1:]
    # The equation of the site itself only names a value.
    rest = _of(jaxpr.eqns[place], within) if within else 0
    return rest + sum(_of(eqn) for eqn in jaxpr.eqns[place + 1 :])


def _of(eqn: Any, after: Path = ()) -> int:
    kind, bodies = eqn.primitive.name, [opened(sub)[0] for sub in inside(eqn)]
    size = sum(math.prod(var.aval.shape) for var in eqn.outvars if hasattr(var.aval, "shape"))
    if kind == "scan":
        (body,), length = bodies, eqn.params["length"]
        if not after:
            return length * flops(body)
        done = length - after[0] if eqn.params["reverse"] else after[0] + 1
        return (length - done) * flops(body) + flops(body, after[1:])
    if kind == "cond":
        return max(map(flops, bodies))
    if kind.startswith("custom_"):
        return flops(bodies[0]) if bodies else size
    if bodies:
        return sum(flops(body, after) for body in bodies)
    if kind == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * size * math.prod(shape[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * size * math.prod(kernel) // out_channels
    return size
