"""A complete trainer of a Flax NNX model with LPA and LPL: about a minute on a CPU.

    python examples/nnx_trainer.py

It uses public names alone: put your own model, data and chain in their places. The chain acts in
training alone, so that evaluation calls the model as it is.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import data

EPOCHS, BATCH, SEED = 10, 64, 0


class Network(nnx.Module):
    """A small convolutional network; `middle` is the name that LPA is given."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs):
        """Make the layers."""
        self.first = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.first_norm = nnx.BatchNorm(16, rngs=rngs)
        self.middle = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.middle_norm = nnx.BatchNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, num_classes, rngs=rngs)

    def __call__(self, images):
        """Return logits `[B, C]`."""
        x = nnx.relu(self.first_norm(self.first(images)))
        x = nnx.relu(self.middle_norm(self.middle(x)))
        return self.head(x.mean((1, 2)))


def main():
    """Train, and print the loss and the test accuracy of each epoch."""
    digits = data.load("digits")
    train, test = digits.train, digits.splits["test"]
    images = data.to_float(jnp.asarray(train.images))
    labels = jnp.asarray(train.labels)
    network = Network(digits.num_classes, nnx.Rngs(SEED))

    steps = len(train) // BATCH
    rate = optax.cosine_decay_schedule(0.1, EPOCHS * steps)
    tx = optax.sgd(rate, momentum=0.9, nesterov=True)
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    perturbation = lpa_jax.chain(
        lpa_jax.lpa("middle", epsilon=0.05),
        lpa_jax.lpl(epsilon=0.5),
    )
    step = lpa_jax.value_and_grad(network, perturbation, num_classes=digits.num_classes)
    state = step.init(network, images[:BATCH], labels[:BATCH])

    @nnx.jit
    def train_step(network, optimizer, state, images, labels, key):
        (loss, aux), grads, state = step(network, state, images, labels, key)
        # What the model itself updates, here the running statistics.
        nnx.update(network, aux["updates"])
        optimizer.update(network, grads)
        return state, loss

    @nnx.jit
    def accuracy(network, images, labels):
        return jnp.mean(jnp.argmax(network(images), axis=-1) == labels)

    key = jax.random.key(SEED + 1)
    for epoch in range(EPOCHS):
        network.train()
        losses = []
        for number, rows in enumerate(data.train_batches(SEED, epoch, train.labels, BATCH)):
            step_key = jax.random.fold_in(key, epoch * steps + number)
            state, loss = train_step(
                network, optimizer, state, images[rows], labels[rows], step_key
            )
            losses.append(loss)
        # Some splits go by the statistics of the epoch before.
        state = step.end_epoch(state)
        network.eval()
        found = accuracy(network, data.to_float(jnp.asarray(test.images)), test.labels)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, test accuracy {100 * found:.2f} %")


if __name__ == "__main__":
    main()
