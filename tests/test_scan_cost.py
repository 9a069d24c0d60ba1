"""LPA in a scanned stack costs what it costs in the unrolled loop, and computes the same."""

import jax
import numpy as np
from probes import quick_jit
import pytest
import scan_cost
import trace_time

LAYERS = 3


@pytest.fixture(scope="module")
def work():
    """The FLOPs of a step of each kind with LPA at some layers, relative to its plain step."""
    models, variables = scan_cost.models_of(LAYERS)
    patches, labels = trace_time.batch()
    plain = {}

    def flops(kind, layers):
        run, init = scan_cost.step_at(models[kind], layers)
        given = variables[kind], init(variables[kind], patches, labels), patches, labels
        return scan_cost.flops(run, *given, jax.random.key(2))

    def ratio(kind, layers):
        if kind not in plain:
            plain[kind] = flops(kind, ())
        return flops(kind, layers) / plain[kind]

    return ratio


@pytest.mark.parametrize("layer", [0, LAYERS // 2, LAYERS - 1], ids=["first", "middle", "last"])
def test_a_layer_of_a_scan_costs_what_it_costs_in_the_loop(work, layer):
    loop, scan = (work(kind, (layer,)) for kind in ("loop", "scan"))
    assert scan == pytest.approx(loop, rel=0.02)
    # Three gradient steps through the layers beyond the site, of 3 F in all.
    passes = 1 + 3 * 2 * (LAYERS - 1 - layer) / LAYERS / 3
    print("DBG", layer, scan, loop, passes)
    assert scan == pytest.approx(passes, rel=0.05)


def test_a_scan_and_the_loop_have_the_same_loss_and_gradient():
    models, variables = scan_cost.models_of(LAYERS, width=16)
    patches, labels = trace_time.batch(examples=8)

    def results(kind, layers):
        run, init = scan_cost.step_at(models[kind], layers)
        given = variables[kind], init(variables[kind], patches, labels), patches, labels
        return quick_jit(run)(*given, jax.random.key(2))[:2]

    loss, grads = results("loop", range(LAYERS))
    for kind in ("scan", "remat"):
        scanned_loss, scanned_grads = results(kind, range(LAYERS))
        np.testing.assert_allclose(scanned_loss, loss, rtol=1e-5)
        assert scan_cost.distance(scan_cost.unrolled(scanned_grads), grads) < 1e-5
    # It depends on which layers are perturbed.
    assert abs(results("loop", range(1, LAYERS))[0] / loss - 1) > 1e-3
    print("DBG", scanned_loss/loss-1, scan_cost.distance(scan_cost.unrolled(scanned_grads), grads), results("loop", range(1, LAYERS))[0] / loss - 1)
