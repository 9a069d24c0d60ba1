"""The networks for real images: published sizes, sites, dtypes, frozen statistics and scans."""

import functools
import re

import chex
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import models
from lpa_jax.models import convnext, efficientnet_lite, imagenet_resnet, layers

# Made of the same parts as the published ones, and compiled in seconds.
SMALL = {
    "resnet": functools.partial(models.ImageNetResNet, (1, 1)),
    "bottlenecks": functools.partial(models.ImageNetResNet, (1, 1), bottleneck=True),
    "vit": functools.partial(models.ViT, 16, width=24, depth=2, num_heads=3),
    "vit, scan": functools.partial(models.ViT, 16, width=24, depth=2, num_heads=3, scan=True),
    "convnext": functools.partial(models.ConvNeXt, (1, 1), (8, 16)),
}
WITH_NORM = ("resnet", "bottlenecks")
# Too many layers to compile; traced alone.
TRACED = SMALL | {"lite": functools.partial(models.EfficientNetLite, 0)}
IMAGES = jnp.float32(np.random.default_rng(0).uniform(size=(4, 32, 32, 3)))


def make(name, **options):
    return TRACED[name](num_classes=5, **options)


def fill(model, images=IMAGES):
    """Return variables of random numbers; to compile the true initialization takes seconds."""
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    rng = np.random.default_rng(1)

    def numbers(path, leaf):
        if path[-1].key == "var":
            return np.float32(rng.uniform(0.5, 2, leaf.shape))
        return np.float32(0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"))

    return jax.tree.map_with_path(numbers, shapes)


def apply(model, variables, images=IMAGES, **options):
    return jax.jit(functools.partial(model.apply, **{"train": False} | options))(variables, images)


def trace(model, shape=IMAGES.shape):
    """Return abstract variables, logits, and the output of every module by path."""
    images = jnp.zeros(shape)

    def run():
        variables = model.init(jax.random.key(0), images, train=False)
        logits, seen = model.apply(
            variables,
            images,
            train=True,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        return variables, logits, seen["intermediates"]

    variables, logits, seen = jax.eval_shape(run)
    outputs = {"/".join(path[:-1]): out for path, (out,) in flatten_dict(seen).items()}
    return variables, logits, outputs


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("imagenet_resnet_18", 11_689_512),
        ("imagenet_resnet_50", 25_557_032),
        ("efficientnet_lite_0", 4_652_008),
        ("efficientnet_lite_1", 5_416_680),
        ("efficientnet_lite_2", 6_092_072),
        ("vit_ti_16", 5_717_416),
        ("vit_s_16", 22_050_664),
        ("vit_b_16", 86_567_656),
        ("convnext_t", 28_589_128),
    ],
)
def test_parameter_counts_are_those_of_torchvision_and_timm(name, count):
    model = models.create(name, num_classes=1000, mean=(0.5,), std=(0.5,))
    images = jnp.zeros((1, 224, 224, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet", {"stem": (16, 16, 64), "group1": (8, 8, 64), "group2/block0": (4, 4, 128)}),
        ("bottlenecks", {"group1/block0": (8, 8, 256), "group2/block0/conv1": (8, 8, 128)}),
        (
            "lite",
            {
                "group1": (16, 16, 16),
                "group3/block1": (4, 4, 40),
                "group7": (1, 1, 320),
                "top": (1, 1, 1280),
                "features": (1280,),
            },
        ),
        ("vit", {"embedding": (2, 2, 24), "block1": (5, 24), "features": (24,)}),
        ("vit, scan", {"embedding": (2, 2, 24), "features": (24,)}),
        ("convnext", {"group1": (8, 8, 8), "downsample2": (4, 4, 16), "features": (16,)}),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_modules_are_named_sites_of_their_dtype(name, shapes, dtype):
    variables, logits, outputs = trace(make(name, dtype=dtype, remat="nothing_saveable"))
    chex.assert_shape(logits, (4, 5))
    assert {path: outputs[path].shape for path in shapes} == {
        path: (4, *shape) for path, shape in shapes.items()
    }
    paths = ["/".join(path) for path in flatten_dict(variables)] + list(outputs)
    assert not [path for path in paths if re.search(r"[A-Z]|_\d", path)]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == outputs["features"].dtype == jnp.float32
    inner = {p: out.dtype for p, out in outputs.items() if p not in ("", "features", "head")}
    assert set(inner.values()) == {jnp.dtype(dtype)}, inner


# Without the plain blocks: jaxlib 0.12.0 compiles these two for CPUs, in bfloat16 and for
# inference, to a fusion that returns NaN where each of its parts is right.
@pytest.mark.parametrize("name", [name for name in SMALL if name != "resnet"])
def test_bfloat16_computes_nearly_the_same_on_images_of_any_size(name):
    images = jnp.float32(np.random.default_rng(0).uniform(size=(2, 32, 48, 3)))
    variables = fill(make(name), images)
    full = apply(make(name), variables, images)
    half = apply(make(name, dtype=jnp.bfloat16), variables, images)
    chex.assert_tree_all_finite(full)
    assert np.linalg.norm(full - half) < 0.1 * np.linalg.norm(full)


@pytest.mark.parametrize("name", WITH_NORM)
def test_frozen_statistics_are_used_and_kept_while_scales_learn(name):
    model = make(name, freeze_norm=True)
    variables = fill(model)

    @jax.jit
    def learn(params, variables):
        def total(params):
            out, updates = model.apply(
                variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"]
            )
            return out.sum(), (out, updates)

        return jax.grad(total, has_aux=True)(params)

    grads, (logits, updates) = learn(variables["params"], variables)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    chex.assert_trees_all_close(logits, apply(model, variables), rtol=1e-5, atol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["stem_norm"]))
    free, updates = apply(make(name), variables, train=True, mutable=["batch_stats"])
    assert not np.allclose(free, logits, rtol=0.1)
    for old, new in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates), strict=True
    ):
        assert not np.array_equal(old, new)


def test_efficientnet_lite_freezes_its_statistics_and_drops_features_too():
    model = make("lite", freeze_norm=True, head_dropout=0.5, head="normalized")
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
    assert list(variables["params"]["head"]) == ["kernel"]
    rngs = {"dropout": jax.random.key(0)}
    # Without `mutable`, so an update would raise.
    jax.eval_shape(functools.partial(model.apply, train=True, rngs=rngs), variables, IMAGES)


def test_a_scan_computes_what_the_blocks_do():
    loop, scan = make("vit"), make("vit, scan", remat="nothing_saveable")
    variables = fill(loop)
    params = dict(variables["params"])
    blocks = [params.pop(f"block{i}") for i in range(2)]
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    chex.assert_trees_all_equal_shapes(params, fill(scan)["params"])

    def grads(model, params):
        return jax.jit(
            jax.value_and_grad(lambda params: model.apply({"params": params}, IMAGES)[:, 0].sum())
        )(params)

    value, by_loop = grads(loop, variables["params"])
    scanned, by_scan = grads(scan, params)
    np.testing.assert_allclose(value, scanned, rtol=1e-5)
    for i in range(2):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], by_scan["blocks"]),
            by_loop[f"block{i}"],
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("name", SMALL)
def test_head_dropout_drops_features_in_training_alone(name):
    _, _, outputs = trace(make(name))
    assert "head_dropout" not in outputs
    model = make(name, head_dropout=0.5)

    run = functools.partial(model.apply, mutable=["batch_stats"])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
    jax.eval_shape(functools.partial(run, train=False), variables, IMAGES)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(functools.partial(run, train=True), variables, IMAGES)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(functools.partial(run, train=True, rngs=rngs), variables, IMAGES)


def test_head_dropout_scales_what_it_keeps():
    class Head(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, features, train):
            return layers.classify_features(features, 3, dropout=0.5, train=train)

    features = jnp.ones((1, 8))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    _, seen = Head().init_with_output(rngs, features, True, capture_intermediates=True)
    (dropped,) = seen["intermediates"]["head_dropout"]["__call__"]
    assert set(np.unique(dropped)) == {0.0, 2.0}


def test_heads_are_linear_or_normalized():
    for name in SMALL:
        variables, _, _ = trace(make(name, head="normalized"))
        assert list(variables["params"]["head"]) == ["kernel"]
        with pytest.raises(ValueError, match="head must be one of linear, normalized"):
            trace(make(name, head="cosine"))


# What blocks compute


def block_outputs(block, inputs, **zeroed):
    """Return the block's output, and its parameters, with the parameters at `zeroed` at 0."""
    variables = fill(block, inputs)
    for module, parameter in zeroed.items():
        variables["params"][module][parameter] *= 0
    return apply(block, variables, inputs), variables["params"]


def test_residual_shortcuts_are_projected_and_normalized():
    block = imagenet_resnet.ImageNetBlock(width=8, stride=2, bottleneck=True)
    inputs = IMAGES - 0.5
    variables = fill(block, inputs)
    variables["params"]["norm3"]["scale"] *= 0
    out, params = apply(block, variables, inputs), variables["params"]
    stats = variables["batch_stats"]["shortcut_norm"]
    x = inputs[:, ::2, ::2] @ params["shortcut"]["kernel"][0, 0]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    x = x * params["shortcut_norm"]["scale"] + params["shortcut_norm"]["bias"]
    x = np.maximum(x + params["norm3"]["bias"], 0)
    chex.assert_trees_all_close(out, x, rtol=1e-4, atol=1e-4)
    # The stride is that of the 3x3 convolution.
    _, seen = apply(block, variables, inputs, mutable=["intermediates"], capture_intermediates=True)
    assert seen["intermediates"]["conv1"]["__call__"][0].shape == (4, 32, 32, 8)
    assert seen["intermediates"]["conv2"]["__call__"][0].shape == (4, 16, 16, 8)


def test_inverted_blocks_add_their_inputs_where_the_shape_stays():
    block = efficientnet_lite.InvertedBlock(width=3, expand=2, kernel=5)
    out, params = block_outputs(block, IMAGES, project_norm="scale")
    # With one kernel of one channel for each of the channels.
    assert params["depthwise"]["kernel"].shape == (5, 5, 1, 6)
    chex.assert_trees_all_close(out, IMAGES + params["project_norm"]["bias"], atol=1e-5)
    block = efficientnet_lite.InvertedBlock(width=4, expand=1)
    out, params = block_outputs(block, IMAGES, project_norm="scale")
    assert "expand" not in params
    chex.assert_trees_all_close(out, 0 * out + params["project_norm"]["bias"], atol=1e-5)


def test_strides_of_efficientnet_lite_start_where_same_padding_does():
    conv = layers.conv(3, stride=2, padding="SAME", dtype=jnp.float32, name="conv")
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[0, 0] = np.eye(3)
    out = conv.apply({"params": {"kernel": kernel}}, IMAGES)
    chex.assert_trees_all_close(out, IMAGES[:, ::2, ::2])


def test_convnext_blocks_add_a_scaled_residual():
    block = convnext.ConvNeXtBlock(width=3)
    variables = fill(block, IMAGES)
    scale = variables["params"]["layer_scale"].copy()
    once = apply(block, variables, IMAGES) - IMAGES
    variables["params"]["layer_scale"] = 2 * scale
    twice = apply(block, variables, IMAGES) - IMAGES
    assert np.abs(once).max() > 0.01
    chex.assert_trees_all_close(twice, 2 * once, rtol=1e-3, atol=1e-5)


def test_initialization_is_he_normal_by_fan_out_of_one_channel():
    conv = layers.conv(256, kernel=5, depthwise=True, dtype=jnp.float32, name="conv")
    kernel = conv.kernel_init(jax.random.key(0), (5, 5, 1, 256))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 25), rtol=0.05)


# Names


@pytest.mark.parametrize(
    "name",
    [
        "imagenet_resnet_20",
        "imagenet_resnet_0",
        "efficientnet_lite_3",
        "vit_b",
        "vit_b_0",
        "vit_16",
    ],
)
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match=r"imagenet_resnet_50.*efficientnet_lite_0.*vit_b_16"):
        models.create(name, num_classes=5, mean=(0.5,), std=(0.5,))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="variant must be one of 0, 1, 2, not 7"):
        models.EfficientNetLite(7, num_classes=5)
    with pytest.raises(ValueError, match=r"30x32 pixels .* give multiples of 16"):
        trace(make("vit"), (1, 30, 32, 3))
