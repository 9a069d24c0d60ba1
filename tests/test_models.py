"""The networks: published sizes, sites, dtypes, normalisation and names."""

import re

import chex
from flax import linen as nn
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
}
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 16, 16, 3)), jnp.float32)


def create(name, *, mean=(0.0,), std=(1.0,), **options):
    if name == "preact_resnet_18" and options.pop("tiny", True):
        # Numbers are computed with this one; its parts are those of the network of 18 layers.
        return models.PreActResNet((1, 1), num_classes=5, mean=mean, std=std, **options)
    return models.create(name, num_classes=5, mean=mean, std=std, **options)


@pytest.fixture(scope="module", params=SMALL)
def computed(request):
    """Return a name, its network and the network's variables."""
    model = create(request.param)
    init = jax.jit(lambda key: model.init(key, IMAGES, train=False))
    return request.param, model, init(jax.random.key(0))


def trace(model, images=IMAGES, train=True):
    """Return abstract variables, logits, and the output of every module by path."""

    def run():
        variables = model.init(jax.random.key(0), images, train=False)
        logits, seen = model.apply(
            variables,
            images,
            train=train,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        return {**variables, "batch_stats": seen["batch_stats"]}, logits, seen["intermediates"]

    variables, logits, seen = jax.eval_shape(run)
    outputs = {"/".join(path[:-1]): out for path, (out,) in flatten_dict(seen).items()}
    return variables, logits, outputs


# Derived by hand: 9ab weights of a 3x3 convolution from a to b channels, ab of a 1x1 shortcut, 2c of
# a normalisation, and 10(c + 1) of the head.
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
        # convolutions 288 + 18_432 + 73_728; norms 64 + 128 + 256; head 1_290
        ("small_cnn", 94_186, 0.094),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count, published):
    model = models.create(name, num_classes=10, mean=(0.0,), std=(1.0,))
    images = jnp.zeros((1, 8, 8, 1 if name == "small_cnn" else 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    digits = len(str(published).split(".")[1])
    assert round(count / 1e6, digits) == published


@pytest.mark.parametrize("name", SMALL)
def test_groups_and_blocks_are_sites(name):
    _, logits, outputs = trace(create(name, tiny=False) if "preact" in name else create(name))
    chex.assert_shape(logits, (4, 5))
    for i, shape in enumerate(SMALL[name], start=1):
        assert outputs[f"group{i}"].shape == (4, *shape)
        if name != "small_cnn":
            assert outputs[f"group{i}/block0"].shape == (4, *shape)


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
    inner = {path: out.dtype for path, out in outputs.items() if path not in ("", "head")}
    assert set(inner.values()) == {jnp.dtype(dtype)}, inner


def test_bfloat16_computes_nearly_the_same():
    model, half = create("small_cnn"), create("small_cnn", dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), IMAGES, train=False)
    logits = model.apply(variables, IMAGES, train=False)
    chex.assert_trees_all_close(half.apply(variables, IMAGES, train=False), logits, atol=0.05)


@pytest.mark.parametrize("name", SMALL)
def test_every_module_is_named(name):
    variables, _, outputs = trace(create(name))
    paths = ["/".join(path) for path in flatten_dict(variables)] + list(outputs)
    assert "params/head/bias" in paths
    # Flax's own names are those of the class and a number, such as Conv_0.
    assert not [path for path in paths if re.search(r"[A-Z]|_\d", path)]


def test_normalisation_is_inside(computed):
    name, model, variables = computed
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    inside = create(name, mean=mean, std=std).apply(variables, IMAGES, train=False)
    outside = model.apply(variables, (IMAGES - jnp.array(mean)) / jnp.array(std), train=False)
    chex.assert_trees_all_close(inside, outside, rtol=1e-4, atol=1e-4)
    plain = model.apply(variables, IMAGES, train=False)
    assert not np.allclose(inside, plain, atol=1e-2)


def test_training_updates_batch_stats_and_evaluation_does_not(computed):
    _, model, variables = computed
    logits, updates = jax.jit(
        lambda: model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    )()
    chex.assert_tree_all_finite(logits)
    before, after = variables["batch_stats"], updates["batch_stats"]
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)
    # Without `mutable`, so a write would raise.
    assert model.apply(variables, IMAGES, train=False).shape == (4, 5)


def test_training_normalises_by_the_batch_and_averages_with_momentum():
    model = create("small_cnn")
    variables = model.init(jax.random.key(0), IMAGES, train=False)
    _, updates = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["group1"]["conv1"]["kernel"]
    out = jax.lax.conv_general_dilated(
        IMAGES, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = updates["batch_stats"]["group1"]["norm1"]
    chex.assert_trees_all_close(stats["mean"], 0.1 * out.mean((0, 1, 2)), atol=1e-5)
    chex.assert_trees_all_close(stats["var"], 0.9 + 0.1 * out.var((0, 1, 2)), atol=1e-4)


def block_outputs(block, images, **zeroed):
    """Return the block's output, and its variables, with the parameters at `zeroed` at 0."""
    variables = block.init(jax.random.key(1), images, train=False)
    params = variables["params"]
    for module, parameter in zeroed.items():
        params[module] = {**params[module], parameter: 0 * params[module][parameter]}
    return block.apply(variables, images, train=False), variables


def test_option_a_shortcut_skips_pixels_and_appends_zeros():
    images = IMAGES - 0.5
    out, variables = block_outputs(resnet.BasicBlock(width=8, stride=2), images, norm2="scale")
    assert "shortcut" not in variables["params"]
    chex.assert_trees_all_close(out[..., :3], nn.relu(images[:, ::2, ::2]))
    assert not out[..., 3:].any()


def test_preact_shortcut_is_taken_after_the_activation_where_the_shape_changes():
    images = IMAGES - 0.5
    out, variables = block_outputs(layers.PreActBlock(width=8, stride=2), images, conv2="kernel")
    kernel = variables["params"]["shortcut"]["kernel"][0, 0]
    active = nn.relu(images / jnp.sqrt(1 + 1e-5))
    chex.assert_trees_all_close(out, active[:, ::2, ::2] @ kernel, atol=1e-5)
    out, variables = block_outputs(layers.PreActBlock(width=3), images, conv2="kernel")
    assert "shortcut" not in variables["params"]
    chex.assert_trees_all_close(out, images)


def test_strided_convolution_is_centred_on_the_pixels_the_shortcut_keeps():
    conv = layers.conv(3, stride=2, dtype=jnp.float32, name="conv")
    kernel = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    out = conv.apply({"params": {"kernel": kernel}}, IMAGES)
    chex.assert_trees_all_close(out, IMAGES[:, ::2, ::2])


def test_gates_scale_whole_channels():
    images = jnp.tile(IMAGES, (1, 1, 1, 16))
    gate = resnet.SqueezeExcite()
    variables = gate.init(jax.random.key(0), images)
    assert {path: leaf.shape for path, leaf in flatten_dict(variables["params"]).items()} == {
        ("squeeze", "kernel"): (48, 3),
        ("excite", "kernel"): (3, 48),
    }
    ratio = gate.apply(variables, images) / images
    chex.assert_trees_all_close(ratio, jnp.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-4)
    assert ((ratio > 0) & (ratio < 1)).all()
    assert ratio.std() > 1e-3


def test_initialisation_is_he_normal_by_fan_out():
    conv = layers.conv(64, dtype=jnp.float32, name="conv")
    kernel = conv.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.05)


@pytest.mark.parametrize(
    "name",
    ["vgg_16", "resnet", "resnet_x", "resnet_020", "wrn_16", "wrn_16_0", "preact_resnet_50", ""],
)
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match=r"wrn_16_8.*resnet_20.*se_resnet_110.*small_cnn\.$"):
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
        trace(model, jnp.zeros((1, 8, 8, 1)))
    # With shapes and dtypes checked at run time, jaxtyping is the first to refuse these.
    with pytest.raises(TypeError):
        trace(model, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises((TypeError, ValueError)):
        trace(model, jnp.zeros((8, 8, 3)))


def test_networks_made_from_lists_are_hashable():
    made = [create("wrn_10_1", mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]) for _ in range(2)]
    assert made[0] == made[1]
    assert hash(made[0]) == hash(made[1])
