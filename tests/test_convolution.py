"""The convolution with a quick kernel gradient is XLA's, under every transformation."""

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import models

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Images have at least ENTRIES entries, but for the kernel of one, for which any number will do.
CASES = {
    "same": {},
    "valid": {"padding": "VALID"},
    "same, stride": {"window_strides": (2, 2), "size": (65, 64)},
    "lower": {"padding": "SAME_LOWER", "kernel": (4, 2)},
    "odd padding": {"padding": ((0, 3), (2, 1))},
    "cropped": {"padding": ((-1, 2), (0, -2)), "size": (66, 64)},
    "strides": {"window_strides": (1, 3), "padding": ((1, 1), (2, 0)), "size": (62, 67)},
    "dilation": {"rhs_dilation": (2, 3)},
    "one position": {"kernel": (1, 1), "size": (5, 4)},
    "one position, stride": {"kernel": (1, 1), "window_strides": (2, 2), "size": (5, 4)},
    "large": {"kernel": (5, 5)},
}


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), one, other)


def both(case, groups=1):
    """Return losses through our convolution and through XLA's, and what they are of."""
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": DIMENSIONS}
    options |= {"feature_group_count": groups} | CASES[case]
    height, width = options.pop("size", (64, 65))
    kernel = options.pop("kernel", (3, 3))
    images = jax.random.normal(jax.random.key(0), (2, height, width, 4))
    shape = (1, 4) if groups > 1 else (4, 5)
    kernel = jax.random.normal(jax.random.key(1), (*kernel, *shape)) / 4

    def loss(convolve):
        return lambda images, kernel: jnp.mean(jnp.sin(convolve(images, kernel, **options)))

    return loss(models.conv_general_dilated), loss(lax.conv_general_dilated), (images, kernel)


def products_in(function, *arguments):
    """Return how many products a CPU's program has."""
    return jax.jit(function).lower(*arguments).as_text().count("stablehlo.dot_general")


TRANSFORMED = {
    "value": lambda loss: loss,
    "gradient": lambda loss: jax.grad(loss, (0, 1)),
    "forward": lambda loss: lambda *given: jax.jvp(loss, given, given),
    "forward over reverse": lambda loss: (
        lambda *given: jax.jvp(jax.grad(loss, (0, 1)), given, given)
    ),
    "reverse over reverse": lambda loss: jax.grad(
        lambda *given: sum(jnp.sum(leaf**2) for leaf in jax.grad(loss, (0, 1))(*given)), (0, 1)
    ),
    "remat": lambda loss: jax.grad(jax.checkpoint(loss), (0, 1)),
    "vmap of images": lambda loss: (
        lambda images, kernel: jax.vmap(jax.grad(loss, (0, 1)), (0, None))(
            jnp.stack([images, 2 * images]), kernel
        )
    ),
    "vmap of kernels": lambda loss: (
        lambda images, kernel: jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(
            images, jnp.stack([kernel, 2 * kernel])
        )
    ),
    "vmap of both": lambda loss: (
        lambda *given: jax.vmap(jax.grad(loss, (0, 1)))(
            *(jnp.stack([value, 2 * value]) for value in given)
        )
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_xla_and_made_of_products(case):
    ours, plain, given = both(case)
    close(jax.grad(ours, (0, 1))(*given), jax.grad(plain, (0, 1))(*given))
    # One for each row of the kernel.
    assert products_in(jax.grad(ours, 1), *given) == given[1].shape[0]


FEW = ("same, stride", "lower", "cropped", "dilation")
"""Cases of each kind, of which the others are slow tests where a kernel is of a channel."""


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in CASES]
)
def test_a_kernel_for_each_channel_is_a_sum_of_shifted_images(case):
    ours, plain, given = both(case, groups=4)
    np.testing.assert_allclose(ours(*given), plain(*given), rtol=1e-5)
    gradient = jax.grad(ours, (0, 1))
    close(gradient(*given), jax.grad(plain, (0, 1))(*given))
    text = jax.jit(gradient).lower(*given).as_text()
    assert "stablehlo.convolution" not in text


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize(
    ("case", "groups"),
    [("same", 1), pytest.param("strides", 1, marks=pytest.mark.slow), ("strides", 4)],
)
def test_every_transformation_works(case, groups, name):
    ours, plain, given = both(case, groups)
    found, expected = (jax.jit(TRANSFORMED[name](loss))(*given) for loss in (ours, plain))
    close(found, expected)


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((2, 63, 65, 4), (3, 3, 4, 4), {}),
        ((2, 64, 64, 4), (3, 3, 2, 4), {"feature_group_count": 2}),
        ((2, 64, 64, 4), (3, 3, 4, 4), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
        ((2, 4, 64, 64), (4, 4, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
        (
            (2, 4096, 4), (3, 4, 4),
            {"window_strides": (1,), "dimension_numbers": ("NHC", "HIO", "NHC")},
        ),
    ],
    ids=["small images", "groups", "dilated images", "channels first", "one axis"],
)  # fmt: skip
def test_what_is_not_quicker_is_left_to_xla(images, kernel, options):
    options = {
        "window_strides": (1, 1), "padding": "SAME", "dimension_numbers": DIMENSIONS, **options
    }  # fmt: skip

    def loss(convolve):
        return lambda *given: jnp.sum(convolve(*given, **options) ** 2)

    given = jnp.ones(images), jnp.ones(kernel)
    ours, plain = (
        jax.make_jaxpr(jax.grad(loss(convolve), (0, 1)))(*given)
        for convolve in (models.conv_general_dilated, lax.conv_general_dilated)
    )
    assert str(ours) == str(plain)


@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_comes_of_nothing(batch):
    images, kernel = jnp.ones((batch, 3, 3, 4)), jnp.ones((5, 5, 1, 4))

    def loss(images):
        options = {"dimension_numbers": DIMENSIONS, "feature_group_count": 4}
        return jnp.sum(models.conv_general_dilated(images, kernel, (1, 1), "VALID", **options))

    assert jax.grad(loss)(images).shape == images.shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_left_to_xla(dtype):
    given = jnp.ones((2, 64, 64, 4), dtype), jnp.ones((3, 3, 4, 4), dtype)
    text = str(jax.make_jaxpr(lambda *given: models.conv_general_dilated(
        *given, (1, 1), "SAME", dimension_numbers=DIMENSIONS))(*given))  # fmt: skip
    assert "custom_jvp" not in text


@pytest.mark.parametrize("groups", [1, 4])
def test_other_platforms_convolve_as_before(groups):
    ours, plain, given = both("same", groups)
    texts = []
    for loss in (ours, plain):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(*given)
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    for operation in ("convolution", "dot_general", "reduce"):
        found = [text.count(f"stablehlo.{operation}") for text in texts]
        assert found[0] == found[1], operation


def test_a_gradient_of_the_images_alone_costs_no_kernel_gradient():
    ours, _, given = both("same")
    assert products_in(jax.grad(ours), *given) == 0


def test_one_argument_gives_it_to_a_layer_of_flax():
    class Network(nn.Module):
        convolve: object = None

        @nn.compact
        def __call__(self, images):
            layer = nn.Conv(5, (3, 3), padding="CIRCULAR", conv_general_dilated=self.convolve)
            return nn.Dense(3)(jax.nn.relu(layer(images)).mean((1, 2)))

    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 4))
    variables = Network().init(jax.random.key(1), images)

    def grads(made):
        return jax.grad(lambda v: made.apply(v, images).sum())(variables)

    close(grads(Network(models.conv_general_dilated)), grads(Network()))


def test_networks_take_it():
    model = models.create("resnet_8", num_classes=3, mean=(0.5,), std=(0.5,))
    images = jnp.ones((2, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)
    # Three convolutions take activations of the first group; the head has two gradients.
    assert products_in(jax.grad(lambda v: model.apply(v, images).sum()), variables) == 3 * 3 + 2
