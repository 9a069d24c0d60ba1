"""The library's promise to its users, as they would first type it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lpa_jax
from lpa_jax.models import SmallCNN


@pytest.mark.slow
def test_every_kind_of_perturbation_in_one_chain_without_jit():
    model = SmallCNN(num_classes=10, width=2)
    key = jax.random.key(0)
    inputs, labels = jax.random.uniform(key, (8, 8, 8, 3)), jnp.arange(8)
    variables = model.init(key, inputs)
    params = variables["params"]
    tx = optax.sgd(0.1)
    opt_state = tx.init(params)

    perturbation = lpa_jax.chain(
        lpa_jax.manifold_mixup(("inputs", "group1"), alpha=2.0),
        lpa_jax.lpa("group3", epsilon=0.2, steps=3, split=lpa_jax.splits.mean_threshold()),
        lpa_jax.lpl(epsilon=0.5),  # site "logits"
        lpa_jax.lpg(epsilon=0.1),  # site "logit_grads"
        lpa_jax.sam(rho=0.05),  # site "param_grads"
        lpa_jax.at("group2", optax.add_noise(0.01, 0.55, key=0)),  # any optax transform, any site
    )
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=10)
    state = step.init(variables, inputs, labels)
    (loss, aux), grads, state = step(
        variables, state, inputs, labels, key, train=True, mutable=["batch_stats"]
    )
    updates, opt_state = tx.update(grads, opt_state, params)

    assert jnp.isfinite(loss)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert aux["logits"].shape == (8, 10)
    assert set(aux["metrics"]) >= {"labels", "group3", "logits", "logit_grads", "param_grads"}
    assert int(state.step) == 1
