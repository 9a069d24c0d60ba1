"""LPA in a scanned stack costs what it costs in the unrolled loop, and computes the same."""

import jax
import numpy as np
from probes import quick_jit
import pytest
import scan_cost
import trace_time

LAYERS = 4
PERTURBED = {"first": 0, "middle": 2, "last": 3}
BATCH = trace_time.batch(examples=8)


@pytest.fixture(scope="module")
def step_of():
    """A function to a step of a model of a kind, with LPA at some layers, and its arguments."""
    models, variables = scan_cost.models_of(LAYERS)

    def step_of(kind, layers):
        run, init = scan_cost.step_at(models[kind], layers)
        return run, (variables[kind], init(variables[kind], *BATCH), *BATCH, jax.random.key(2))

    return step_of


@pytest.fixture(scope="module")
def plain(step_of):
    """The FLOPs of a plain step, by the kinds of the models."""
    steps = {kind: step_of(kind, ()) for kind in ("loop", "scan")}
    return {kind: scan_cost.flops(run, *given) for kind, (run, given) in steps.items()}


@pytest.mark.parametrize("layer", PERTURBED.values(), ids=PERTURBED)
def test_a_layer_of_a_scan_costs_what_it_costs_in_the_loop(step_of, plain, layer):
    ratios = {}
    for kind, alone in plain.items():
        run, given = step_of(kind, (layer,))
        ratios[kind] = scan_cost.flops(run, *given) / alone
    assert ratios["scan"] == pytest.approx(ratios["loop"], rel=0.02)
    # Three gradient steps through the layers beyond it.
    passes = 1 + 3 * 2 * (LAYERS - 1 - layer) / LAYERS / 3
    assert ratios["scan"] == pytest.approx(passes, rel=0.05)


@pytest.mark.slow
def test_a_scan_and_the_loop_have_the_same_loss_and_gradient(step_of):
    def loss_and_gradient(kind, layers):
        run, given = step_of(kind, layers)
        return quick_jit(run)(*given)[:2]

    (loss, grads), (scanned_loss, scanned_grads) = (
        loss_and_gradient(kind, (0, 2)) for kind in ("loop", "scan")
    )
    np.testing.assert_allclose(scanned_loss, loss, rtol=1e-5)
    assert scan_cost.distance(scan_cost.unrolled(scanned_grads), grads) < 1e-5
    unperturbed, _ = loss_and_gradient("loop", ())
    assert abs(loss / unperturbed - 1) > 0.01
