"""DANN: features that do not tell a discriminator which domain they are of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import optax

from lpa_jax.core.arguments import at_step, check_count, check_number, check_rate, Number
from lpa_jax.core.network import mapped_axes, varying
from lpa_jax.core.perturbation import Perturbation
from lpa_jax.transforms import _domains

Layers = list[tuple[Float[Array, "inputs outputs"], Float[Array, "outputs"]]]
"""The kernel and the bias of each."""


class DANNState(NamedTuple):
    """State of `dann`.

    Attributes:
      discriminator: The kernel `[inputs, outputs]` and bias `[outputs]` of each layer, float32.
      optimizer: State of the discriminator's optimizer.
    """

    discriminator: Layers
    optimizer: PyTree


def dann(
    site: str,
    strength: Number,
    num_domains: int,
    *,
    learning_rate: Number = 5e-5,
    discriminator_steps: int = 1,
    grad_penalty: float = 0.0,
    weight_decay: float = 0.0,
    beta1: float = 0.5,
    width: int = 256,
    depth: int = 3,
    dropout: float = 0.0,
    seed: int = 0,
) -> Perturbation:
    r"""DANN: learn features by which a discriminator cannot tell the domains apart.

    .. math::
        \ell - \lambda \ell_d, \qquad
        \ell_d = \frac{1}{n} \sum_i \left[ - \log q_{m_i}(a_i)
            + \eta \Big\| \frac{\partial \log q_{m_i}(a_i)}{\partial a_i} \Big\|_2^2 \right]

    where q is the discriminator's softmax over the domains, a network of linear layers and relus on
    the features a, and m the example's domain. Both means are by the weights of the examples. The
    discriminator, which is float32 and part of the state, descends its loss by an Adam of its own,
    with the penalty of its gradient that DomainBed adds. The value stays as it is: the gradient of
    `-lambda * l_d` is added to the gradient at the site, and the loss the step returns is without
    it.

    Each step is one of the network and `discriminator_steps` of the discriminator, all of them on
    the features of the present batch, which are constants for it. The network's gradient is that of
    the discriminator before them, as through the paper's gradient reversal layer: it has not been
    fitted to the examples that it judges.

    Args:
      site: Path of a layer whose output is `[B, D]`: what the head takes in.
      strength: The paper's lambda, at least 0, or a schedule. DomainBed's default: 1; the paper
        raises it from 0 to 1.
      num_domains: Number of domains M. The step's `extra` has the `domains`, int `[B]` in `[0, M)`.
      learning_rate: Of the discriminator, at least 0, or a schedule of the network's steps.
        DomainBed's default: 5e-5, and 1e-3 on its sets of digits.
      discriminator_steps: Number of its steps for each of the network, at least 1.
      grad_penalty: Weight eta of the squared norm of the gradient at the features, at least 0.
      weight_decay: Of the discriminator, at least 0: added to its gradient times the parameters.
      beta1: Decay of its mean gradient in Adam, in [0, 1). That of the squares is 0.9.
      width: Number of its hidden units.
      depth: Number of its linear layers, at least 2.
      dropout: Share of its hidden units that are dropped, in [0, 1).
      seed: Of its first parameters, at least 0: uniform within `1 / sqrt(fan in)`, as in PyTorch. A
        state begins without a key, so that runs of other seeds begin with the same discriminator.

    *Ours*: DomainBed alternates, and of its steps some move the discriminator alone, each on a
    batch of its own, so that its network takes `1 / (1 + discriminator_steps)` of the steps that it
    counts; its network's Adam has the same betas as the discriminator's, which here is for the
    optimizer to say. A batch of padding leaves the discriminator as it is; after mixing an example
    is of the domain of the first of its pair. Gradient steps of other transforms climb the loss
    without the discriminator's.

    Raises:
      ValueError: If an argument is outside its range. The first state raises `SiteError` (a
        ValueError) if the value is not `[B, D]`. The step raises it if the domains are not integers
        `[B]`; one outside of `[0, M)` makes the gradient and the state NaN.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> dann = lpa_jax.dann("features", strength=1.0, num_domains=3)
      >>> [kernel.shape for kernel, bias in dann.init(jnp.zeros((8, 64))).discriminator]
      [(64, 256), (256, 256), (256, 3)]

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016, arXiv:1505.07818;
      Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021, arXiv:2007.01434.
    """
    _domains.check_layer("dann", site)
    check_number("strength", strength)
    check_count("num_domains", num_domains, low=2)
    check_number("learning_rate", learning_rate)
    check_count("discriminator_steps", discriminator_steps)
    check_number("grad_penalty", grad_penalty)
    check_number("weight_decay", weight_decay)
    check_rate("beta1", beta1)
    check_count("width", width)
    check_count("depth", depth, low=2)
    check_rate("dropout", dropout)
    check_count("seed", seed, low=0)
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.scale_by_adam(b1=beta1, b2=0.9)
    )

    def init(value):
        _domains.check_features("dann", site, value)
        layers, inputs = [], value.shape[1]
        for number in range(depth):
            outputs = num_domains if number == depth - 1 else width
            key = jax.random.fold_in(jax.random.key(seed), number)
            # The last row is the bias.
            drawn = jax.random.uniform(key, (inputs + 1, outputs), jnp.float32, -1.0, 1.0)
            drawn /= inputs**0.5
            layers.append((drawn[:-1], drawn[-1]))
            inputs = outputs
        return DANNState(layers, optimizer.init(layers))

    def logits_of(layers, x, key):
        for number, (kernel, bias) in enumerate(layers):
            if number:
                x = jax.nn.relu(x)
            if number and dropout:
                drawn = jax.random.fold_in(key, number)
                kept = jax.random.bernoulli(drawn, 1.0 - dropout, x.shape)
                x = jnp.where(kept, x / (1.0 - dropout), 0.0)
            x = x @ kernel + bias[None]
        return x

    def update(value, state, params=None, *, key, weights, domains=None, step=0, axis_name=(), **_):
        del params
        _, features = _domains.real_features(value, weights)
        members = _domains.by_domain("dann", domains, weights, num_domains, axis_name)
        targets = jax.nn.one_hot(members.classes[members.rows], num_domains)
        # NaN where a domain is wrong.
        total = jnp.sum(members.counts)
        shares = jnp.where(weights > 0, weights, 0.0) / jnp.where(total == 0, 1.0, total)

        def losses(features, layers, key):
            found = optax.softmax_cross_entropy(logits_of(layers, features, key), targets)
            return jnp.sum(found), found

        def loss(features, layers, key):
            slopes, found = jax.grad(losses, has_aux=True)(features, layers, key)
            if grad_penalty:
                found += grad_penalty * jnp.sum(slopes**2, axis=1)
            return jnp.sum(shares * found)

        layers, moments = state
        pulls = []
        for number in range(discriminator_steps):
            # Each device has the gradient of its part of the batch.
            own = varying(layers, mapped_axes(value))
            drawn = jax.random.fold_in(key, number)
            pull, grads = jax.grad(loss, argnums=(0, 1))(features, own, drawn)
            pulls.append(pull)
            grads = jax.tree.map(members.summed, grads)
            # Adam takes a power of its integer count.
            with jax.numpy_dtype_promotion("standard"):
                moves, moments = optimizer.update(grads, moments, layers)
            layers = optax.tree.add_scale(layers, -at_step(learning_rate, step), moves)
        # Momentum and decay would go on without examples.
        state = optax.tree.where(total == 0, state, DANNState(layers, moments))
        gradient = -at_step(strength, step) * pulls[0]
        return _domains.pulled(value, gradient, weights, axis_name), state

    return Perturbation(site, init, update, needs_gradient=False)
