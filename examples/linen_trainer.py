"""A complete trainer of a Flax Linen model with LPA and LPL: about a minute on a CPU.

    python examples/linen_trainer.py

It uses public names alone: put your own model, data and chain in their places. The chain acts in
training alone, so that evaluation is `model.apply` as it is.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import data

EPOCHS, BATCH, SEED = 10, 64, 0


class Network(nn.Module):
    """A small convolutional network; `middle` is the name that LPA is given."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train: bool):
        """Return logits `[B, C]`."""
        x = nn.Conv(16, (3, 3), use_bias=False, name="first")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(32, (3, 3), strides=2, use_bias=False, name="middle")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def main():
    """Train, and print the loss and the test accuracy of each epoch."""
    digits = data.load("digits")
    train, test = digits.train, digits.splits["test"]
    model = Network(digits.num_classes)
    images = data.to_float(jnp.asarray(train.images))
    labels = jnp.asarray(train.labels)
    variables = model.init(jax.random.key(SEED), images[:1], train=False)

    steps = len(train) // BATCH
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * steps), momentum=0.9, nesterov=True)
    opt_state = tx.init(variables["params"])
    perturbation = lpa_jax.chain(
        lpa_jax.lpa("middle", epsilon=0.05),
        lpa_jax.lpl(epsilon=0.5),
    )
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=digits.num_classes)
    arguments = {"train": True, "mutable": ["batch_stats"]}
    state = step.init(variables, images[:BATCH], labels[:BATCH], **arguments)

    @jax.jit
    def train_step(variables, opt_state, state, images, labels, key):
        (loss, aux), grads, state = step(variables, state, images, labels, key, **arguments)
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        # What the model itself updates, here the running statistics.
        return {"params": params, **aux["updates"]}, opt_state, state, loss

    @jax.jit
    def accuracy(variables, images, labels):
        logits = model.apply(variables, images, train=False)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    key = jax.random.key(SEED + 1)
    for epoch in range(EPOCHS):
        losses = []
        for number, rows in enumerate(data.train_batches(SEED, epoch, train.labels, BATCH)):
            step_key = jax.random.fold_in(key, epoch * steps + number)
            variables, opt_state, state, loss = train_step(
                variables, opt_state, state, images[rows], labels[rows], step_key
            )
            losses.append(loss)
        # Some splits go by the statistics of the epoch before.
        state = step.end_epoch(state)
        found = accuracy(variables, data.to_float(jnp.asarray(test.images)), test.labels)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, test accuracy {100 * found:.2f} %")


if __name__ == "__main__":
    main()
