"""The networks: published sizes, sites, dtypes, normalization and names."""

import functools
import re

import chex
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import models
from lpa_jax.models import layers, resnet

# One network of each kind, as small as it can be, with the shapes of its groups on 16x16 images.
SMALL = {
    "wrn_10_2": [(16, 16, 32), (8, 8, 64), (4, 4, 128)],
    "resnet_8": [(16, 16, 16), (8, 8, 32), (4, 4, 64)],
    "se_resnet_8": [(16, 16, 16), (8, 8, 32), (4, 4, 64)],
    "preact_resnet_18": [(16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512)],
    "small_cnn": [(16, 16, 32), (8, 8, 64), (4, 4, 128)],
    "mnist_cnn": [(16, 16, 64), (8, 8, 128), (8, 8, 128), (8, 8, 128)],
}
WITH_STATISTICS = [name for name in SMALL if name != "mnist_cnn"]
IMAGES = np.float32(np.random.default_rng(0).uniform(size=(4, 16, 16, 3)))


def create(name, *, mean=(0.0,), std=(1.0,), **options):
    return models.create(name, num_classes=5, mean=mean, std=std, **options)


def create_to_compute(name, **options):
    if name == "preact_resnet_18":
        # Of the same parts, and compiled sooner.
        return models.PreActResNet((1, 1), num_classes=5, **options)
    return create(name, **options)


def fill(model, images=IMAGES):
    """Return variables of random numbers; to compile the true initialisation takes seconds."""
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    rng = np.random.default_rng(1)

    def numbers(path, leaf):
        if path[-1].key == "kernel":
            fan_in = max(1, leaf.size // leaf.shape[-1])
            return np.float32(rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in))
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    return jax.tree.map_with_path(numbers, shapes)


def apply(model, variables, images=IMAGES, **options):
    """Call the model, compiled as a whole: faster here than one operation after the other."""
    return jax.jit(functools.partial(model.apply, **{"train": False} | options))(variables, images)


@functools.cache
def trace(model, shape=IMAGES.shape, dtype=jnp.float32):
    """Return abstract variables, logits, and the output of every module by path."""
    images = jnp.zeros(shape, dtype)

    def run():
        variables = model.init(jax.random.key(0), images, train=False)
        logits, seen = model.apply(
            variables,
            images,
            train=True,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        variables |= {"batch_stats": seen.get("batch_stats", {})}
        return variables, logits, seen["intermediates"]

    variables, logits, seen = jax.eval_shape(run)
    outputs = {"/".join(path[:-1]): out for path, (out,) in flatten_dict(seen).items()}
    return variables, logits, outputs


# Derived by hand: 9ab weights of a 3x3 convolution from a to b channels, ab of a 1x1 shortcut, 2c
# of a normalization, and 10(c + 1) of the head.
@pytest.mark.parametrize(
    ("name", "count", "published"),
    [
        # stem 432; groups 256_352 + 3 * 461_440, 1_434_560 + 3 * 1_844_480 and
        # 5_736_320 + 3 * 7_375_360; norm 1_280; head 6_410
        ("wrn_28_10", 36_479_194, 36.5),
        # stem 432; groups 168_224 + 295_424, 918_272 + 1_180_672 and 3_671_552 + 4_720_640;
        # norm 1_024; head 5_130
        ("wrn_16_8", 10_961_370, 11.0),
        # stem 432 + 32; groups 4_672n, 13_952 + 18_560(n-1) and 55_552 + 73_984(n-1); head 650
        ("resnet_20", 269_722, 0.27),
        ("resnet_32", 464_154, 0.46),
        ("resnet_110", 1_727_962, 1.7),
        # 18 blocks of each width c add gates of 2cc/16: 18 * (32 + 128 + 512)
        ("se_resnet_110", 1_727_962 + 12_096, 1.7),
        # stem 1_728; groups 2 * 73_984, 229_760 + 295_424, 918_272 + 1_180_672 and
        # 3_671_552 + 4_720_640; head 5_130
        ("preact_resnet_18", 11_171_146, 11.17),
        # the same, with 1, 2, 4 and 1 more of the equal blocks
        ("preact_resnet_34", 21_279_306, 21.28),
        # ours: convolutions 288 + 18_432 + 73_728; norms 64 + 128 + 256; head 1_290
        ("small_cnn", 94_186, 0.094),
        # DomainBed's: convolutions with biases 640 + 73_856 + 2 * 147_584; norms 128 + 3 * 256;
        # head 1_290
        ("mnist_cnn", 371_850, 0.372),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count, published):
    model = models.create(name, num_classes=10, mean=(0.0,), std=(1.0,))
    images = jnp.zeros((1, 8, 8, 1 if name.endswith("_cnn") else 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    digits = len(str(published).split(".")[1])
    assert round(count / 1e6, digits) == published


@pytest.mark.parametrize("name", SMALL)
def test_groups_and_blocks_are_sites(name):
    _, logits, outputs = trace(create(name))
    chex.assert_shape(logits, (4, 5))
    for i, shape in enumerate(SMALL[name], start=1):
        assert outputs[f"group{i}"].shape == (4, *shape)
        if not name.endswith("_cnn"):
            assert outputs[f"group{i}/block0"].shape == (4, *shape)
    assert outputs["features"].shape == (4, shape[-1])


def test_depth_counts_the_blocks():
    _, _, outputs = trace(create("wrn_22_1"))
    blocks = {path for path in outputs if re.fullmatch(r"group\d/block\d", path)}
    assert blocks == {f"group{i}/block{j}" for i in (1, 2, 3) for j in range(3)}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(name, dtype):
    variables, logits, outputs = trace(create(name, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    # From the mean over positions on, all is float32.
    inner = {p: out.dtype for p, out in outputs.items() if p not in ("", "features", "head")}
    assert set(inner.values()) == {jnp.dtype(dtype)}, inner


@pytest.mark.parametrize("name", SMALL)
def test_every_module_is_named(name):
    variables, _, outputs = trace(create(name))
    paths = ["/".join(path) for path in flatten_dict(variables)] + list(outputs)
    assert "params/head/bias" in paths
    # Flax's own names are those of the class and a number, such as Conv_0.
    assert not [path for path in paths if re.search(r"[A-Z]|_\d", path)]


@pytest.mark.parametrize("name", SMALL)
def test_a_normalized_head_makes_logits_of_thirty_times_the_cosine(name):
    model = create_to_compute(name, head="normalized", dtype=jnp.bfloat16)
    variables = fill(model)
    assert list(variables["params"]["head"]) == ["kernel"]
    logits, seen = apply(model, variables, capture_intermediates=True)
    features = np.asarray(seen["intermediates"]["features"]["__call__"][0], np.float64)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    assert kernel.shape == (features.shape[1], 5)
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, 30 * (features @ kernel) / lengths, rtol=1e-4, atol=1e-4)


def test_a_normalized_head_is_safe_at_zero_and_blind_to_lengths():
    head = layers.NormalizedHead(5)
    kernel = jax.random.normal(jax.random.key(0), (3, 5))
    features = jax.random.normal(jax.random.key(1), (4, 3))

    def logits(features, kernel):
        return head.apply({"params": {"kernel": kernel}}, features)

    scaled = logits(1e4 * features, kernel * jnp.array([1e-6, 1e6, 1.0, 2.0, 3.0]))
    np.testing.assert_allclose(scaled, logits(features, kernel), rtol=1e-4, atol=1e-5)
    for zeros in ((0 * features, kernel), (features, 0 * kernel), (0 * features, 0 * kernel)):
        value, grads = jax.value_and_grad(lambda a, w: logits(a, w).sum(), (0, 1))(*zeros)
        assert value == 0
        chex.assert_tree_all_finite(grads)


def test_unknown_heads_are_refused():
    for name in SMALL:
        with pytest.raises(
            ValueError, match="head must be one of linear, normalized, not 'cosine'"
        ):
            create(name, head="cosine")
    with pytest.raises(ValueError, match="head must be one of linear, normalized"):
        trace(models.SmallCNN(num_classes=5, head="cosine"))


@pytest.mark.parametrize("name", SMALL)
def test_normalization_is_inside(name):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    plain = create_to_compute(name)
    variables = fill(plain)
    inside = apply(create_to_compute(name, mean=mean, std=std), variables)
    normalized = (IMAGES - np.float32(mean)) / np.float32(std)
    both = apply(plain, variables, np.concatenate([normalized, IMAGES]))
    outside, without = np.split(both, 2)
    chex.assert_trees_all_close(inside, outside, rtol=1e-3, atol=1e-3)
    assert not np.allclose(inside, without, atol=0.1)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_training_updates_batch_stats_and_evaluation_does_not(name):
    model = create_to_compute(name)
    variables = fill(model)
    logits, updates = apply(model, variables, train=True, mutable=["batch_stats"])
    chex.assert_tree_all_finite(logits)
    before, after = variables["batch_stats"], updates["batch_stats"]
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)
    # Without `mutable`, so a write would raise.
    logits = jax.eval_shape(functools.partial(model.apply, train=False), variables, IMAGES)
    chex.assert_shape(logits, (4, 5))


def test_training_normalizes_by_the_batch_and_averages_with_momentum():
    model = create("small_cnn")
    variables = fill(model)
    _, updates = apply(model, variables, train=True, mutable=["batch_stats"])
    conv = layers.conv(32, dtype=jnp.float32, name="conv1")
    out = conv.apply({"params": variables["params"]["group1"]["conv1"]}, IMAGES)
    stats = updates["batch_stats"]["group1"]["norm1"]
    chex.assert_trees_all_close(stats["mean"], 0.1 * out.mean((0, 1, 2)), atol=1e-5)
    chex.assert_trees_all_close(stats["var"], 0.9 + 0.1 * out.var((0, 1, 2)), atol=1e-4)


def test_the_network_for_mnist_is_domainbeds():
    """The numbers of one image of two channels, as loops over positions and groups in float64."""
    rng = np.random.default_rng(3)
    image = rng.uniform(size=(7, 6, 2))
    with jax.enable_x64(True):
        model = models.create(
            "mnist_cnn", num_classes=2, mean=(0.0,), std=(1.0,), dtype=jnp.float64
        )
        variables = fill(model, image[None])
        variables = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), variables)
        got = apply(model, variables, image[None])
        # It has no statistics of a batch.
        trained, updates = apply(model, variables, image[None], train=True, mutable=True)
    assert list(updates) == list(variables) == ["params"]
    params, x = variables["params"], image
    for number, stride in enumerate((1, 2, 1, 1), start=1):
        group = params[f"group{number}"]
        kernel, bias = group["conv1"]["kernel"], group["conv1"]["bias"]
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        height, width = (-(-size // stride) for size in x.shape[:2])
        x = np.zeros((height, width, len(bias)))
        for i, j in np.ndindex(height, width):
            part = padded[i * stride : i * stride + 3, j * stride : j * stride + 3]
            x[i, j] = np.maximum((part[..., None] * kernel).sum((0, 1, 2)) + bias, 0)
        for part in np.split(x, 8, axis=2):
            part[:] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
        x = x * group["norm1"]["scale"] + group["norm1"]["bias"]
    exact = x.mean((0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(got[0], exact, rtol=1e-5)
    np.testing.assert_array_equal(trained, got)


def block_outputs(block, images, **zeroed):
    """Return the block's output, and its parameters, with the parameters at `zeroed` at 0."""
    variables = fill(block, images)
    for module, parameter in zeroed.items():
        variables["params"][module][parameter] *= 0
    return apply(block, variables, images), variables["params"]


def test_option_a_shortcut_skips_pixels_and_appends_zeros():
    images = IMAGES - 0.5
    out, params = block_outputs(resnet.BasicBlock(width=8, stride=2), images, norm2="scale")
    assert "shortcut" not in params
    chex.assert_trees_all_close(out[..., :3], np.maximum(images[:, ::2, ::2], 0))
    assert not out[..., 3:].any()


def test_preact_shortcut_is_taken_after_the_activation_where_the_shape_changes():
    images = IMAGES - 0.5
    out, params = block_outputs(layers.PreActBlock(width=8, stride=2), images, conv2="kernel")
    kernel = params["shortcut"]["kernel"][0, 0]
    active = np.maximum(images / np.float32(np.sqrt(1 + 1e-5)), 0)
    chex.assert_trees_all_close(out, active[:, ::2, ::2] @ kernel, atol=1e-5)
    out, params = block_outputs(layers.PreActBlock(width=3), images, conv2="kernel")
    assert "shortcut" not in params
    chex.assert_trees_all_close(out, images)


def test_strided_convolution_is_centered_on_the_pixels_the_shortcut_keeps():
    conv = layers.conv(3, stride=2, dtype=jnp.float32, name="conv")
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[1, 1] = np.eye(3)
    out = conv.apply({"params": {"kernel": kernel}}, IMAGES)
    chex.assert_trees_all_close(out, IMAGES[:, ::2, ::2])


def test_gates_scale_whole_channels():
    images = np.tile(IMAGES, (1, 1, 1, 16))
    rng = np.random.default_rng(2)
    squeeze, excite = (np.float32(rng.normal(size=shape)) for shape in [(48, 3), (3, 48)])
    params = {"squeeze": {"kernel": squeeze}, "excite": {"kernel": excite}}
    out = jax.jit(resnet.SqueezeExcite().apply)({"params": params}, images)
    hidden = np.maximum(images.mean((1, 2)) @ squeeze, 0)
    gate = 1 / (1 + np.exp(-hidden @ excite))
    assert gate.std() > 0.1
    chex.assert_trees_all_close(out, images * gate[:, None, None], atol=1e-5)


def test_initialisation_is_he_normal_by_fan_out():
    conv = layers.conv(64, dtype=jnp.float32, name="conv")
    kernel = conv.kernel_init(jax.random.key(0), (3, 3, 16, 64))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.05)


@pytest.mark.parametrize(
    "name",
    ["vgg_16", "resnet", "resnet_x", "resnet_020", "wrn_16", "wrn_16_0", "preact_resnet_50", ""],
)
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match=r"wrn_16_8.*resnet_20.*se_resnet_110.*small_cnn, and"):
        create(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("wrn_27_10", "nearest: 22 and 28"),
        ("wrn_4_1", "nearest: 10"),
        ("resnet_18", "nearest: 14 and 20"),
        ("se_resnet_3", "nearest: 8"),
    ],
)
def test_impossible_depths_name_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"{nearest}\.$"):
        create(name)


def test_unknown_options_are_refused():
    assert create("small_cnn", width=8).width == 8
    with pytest.raises(TypeError, match="width"):
        create("resnet_20", width=8)


def test_images_must_fit():
    model = create("small_cnn", mean=(0.4, 0.5, 0.6), std=(0.2,))
    with pytest.raises(ValueError, match="1 channels"):
        trace(model, (1, 8, 8, 1))
    # With shapes and dtypes checked at run time, jaxtyping is the first to refuse these.
    with pytest.raises(TypeError):
        trace(model, (1, 8, 8, 3), jnp.uint8)
    with pytest.raises((TypeError, ValueError)):
        trace(model, (8, 8, 3))


def test_images_with_their_channels_first_are_refused():
    for means in ((0.5,), (0.4, 0.5, 0.6)):
        model = create("small_cnn", mean=means, std=means)
        trace(model, (2, 8, 9, 3))
        with pytest.raises(
            ValueError, match=r"\(2, 3, 8, 9\) look like .*: give jnp.transpose\(im"
        ):
            trace(model, (2, 3, 8, 9))
    grey = create("small_cnn", mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"look like \[B, C, H, W\]"):
        trace(grey, (2, 1, 8, 9))
    # One of them need not be what it looks like.
    trace(grey, (2, 3, 8, 1))
    two = create("small_cnn", mean=(0.5, 0.5), std=(0.5, 0.5))
    trace(two, (2, 4, 4, 2))


def test_networks_made_from_lists_are_hashable():
    made = [create("wrn_10_1", mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]) for _ in range(2)]
    assert made[0] == made[1]
    assert hash(made[0]) == hash(made[1])


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_evaluates_like_float32(name):
    images = np.float32(np.random.default_rng(2).uniform(size=(4, 32, 32, 3)))
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = create_to_compute(name, dtype=dtype)
        logits[dtype] = apply(model, fill(model, images), images)
    scale = np.abs(logits[jnp.float32]).max()
    np.testing.assert_allclose(*(each / scale for each in logits.values()), atol=0.1)
    assert (logits[jnp.float32] != logits[jnp.bfloat16]).any()
