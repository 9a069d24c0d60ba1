"""The networks for real images compute what torchvision's and timm's do with the same weights."""

import functools

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import models
from lpa_jax.models.weights import load_pretrained

# The packages warn of what they use and of their own ends.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RNG = np.random.default_rng(0)
SIZE, CLASSES = 64, 10
IMAGES = np.float32(RNG.normal(size=(4, SIZE, SIZE, 3)))
LABELS = RNG.integers(CLASSES, size=4)


def torchvision(name, **options):
    package = pytest.importorskip("torchvision")
    return getattr(package.models, name)(num_classes=CLASSES, **options)


def timm(name, **options):
    package = pytest.importorskip("timm")
    return package.create_model(name, num_classes=CLASSES, **options)


SHALLOW = {"hidden_dim": 192, "num_heads": 3, "mlp_dim": 768, "num_layers": 2}
PAIRS = {
    "ResNet-18": ("imagenet_resnet_18", {}, torchvision, "resnet18", {}),
    "ResNet-50": ("imagenet_resnet_50", {}, torchvision, "resnet50", {}),
    "ResNet-50, timm": ("imagenet_resnet_50", {}, timm, "resnet50", {}),
    "EfficientNet-Lite0": ("efficientnet_lite_0", {}, timm, "tf_efficientnet_lite0", {}),
    "EfficientNet-Lite2": ("efficientnet_lite_2", {}, timm, "tf_efficientnet_lite2", {}),
    "ViT-Ti, timm": ("vit_ti_16", {}, timm, "vit_tiny_patch16_224", {"img_size": SIZE}),
    "ViT-Ti, scan": (
        "vit_ti_16",
        {"scan": True},
        timm,
        "vit_tiny_patch16_224",
        {"img_size": SIZE},
    ),
    "ViT": (
        "vit_ti_16",
        {"depth": 2},
        torchvision,
        "VisionTransformer",
        {"image_size": SIZE, "patch_size": 16, **SHALLOW},
    ),
    "ConvNeXt-T": ("convnext_t", {}, torchvision, "convnext_tiny", {"stochastic_depth_prob": 0.0}),
    "ConvNeXt-T, timm": ("convnext_t", {}, timm, "convnext_tiny", {}),
}


def theirs(torch, make, name, options):
    """Return a network in float64 whose numbers are of float32 and none of them as it starts."""
    torch.manual_seed(0)
    network = make(name, **options)
    with torch.no_grad():
        for key, array in network.state_dict().items():
            if key.endswith("running_var"):
                array.uniform_(0.5, 2.0)
            elif key.endswith(("gamma", "layer_scale")):
                # Of 1e-6 no residual would be seen.
                array.uniform_(0.1, 0.5)
            elif array.is_floating_point():
                array.add_(0.05 * torch.randn_like(array))
    for module in network.modules():
        if "lite" in name and isinstance(module, torch.nn.BatchNorm2d):
            # That of TensorFlow's original, which timm does not take over.
            module.momentum = 0.01
    return network.double()


def arrays(network, part=lambda tensor: tensor):
    return {name: part(tensor).numpy() for name, tensor in network.items()}


def apart(got, expected):
    """Return the largest relative error of a leaf; of leaves near 0, by all of them.

    The head computes in float32 in any network, which leaves its rounding in what is 0.
    """
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in expected.values()))
    errors = {
        path: np.linalg.norm(np.asarray(got[path], np.float64) - leaf)
        / (np.linalg.norm(leaf) + 0.1 * whole)
        for path, leaf in expected.items()
    }
    assert got.keys() == expected.keys()
    return max(errors.values())


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_gradients_and_statistics_are_theirs(pair, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file

    name, ours, make, other, options = PAIRS[pair]
    network = theirs(torch, make, other, options)
    start = arrays(network.state_dict())
    small = {key: np.asarray(array, np.float32) for key, array in start.items()}
    save_file(small, tmp_path / "weights.safetensors")
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()).double()

    network.eval()
    with torch.no_grad():
        expected = {"logits": network(images).numpy()}
    network.train()
    loss = torch.nn.functional.cross_entropy(network(images), torch.from_numpy(LABELS))
    loss.backward()
    by_name = arrays(dict(network.named_parameters()), lambda parameter: parameter.grad)
    statistics = {
        key: array
        for key, array in arrays(network.state_dict()).items()
        # The variance is unbiased there, and biased in Flax.
        if key.endswith("running_mean")
    }

    # PyTorch's own gradients of ResNet-50 differ by 0.013 between float32 and float64: rounding
    # decides the sign of what some relus take in, and few positions are left to normalize by.
    for dtype, tolerance, of_gradients in ((jnp.float64, 1e-6, 1e-6), (jnp.float32, 1e-3, 0.05)):
        with jax.enable_x64(True):
            model = models.create(
                name, num_classes=CLASSES, mean=(0.0,), std=(1.0,), dtype=dtype, **ours
            )
            init = functools.partial(model.init, train=False)
            shapes = jax.eval_shape(init, jax.random.key(0), IMAGES)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            by_path = {path: leaf.shape for path, leaf in flatten_dict(zeros, sep="/").items()}
            variables = load_pretrained(
                f"safetensors:{tmp_path / 'weights.safetensors'}", model, zeros
            )

            @jax.jit
            def run(variables, images, model=model):
                def loss(params):
                    logits, updates = model.apply(
                        variables | {"params": params}, images, train=True, mutable=["batch_stats"]
                    )
                    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], 1)
                    return -picked.mean(), updates

                grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
                return model.apply(variables, images, train=False), grads, updates

            logits, grads, updates = run(variables, IMAGES)
        got = {
            "logits": apart({"logits": logits}, expected),
            "gradients": apart(
                flatten_dict({"params": grads}, sep="/"),
                model.pretrained_variables(by_name, by_path),
            ),
        }
        if statistics:
            means = {
                path: leaf
                for path, leaf in flatten_dict(updates, sep="/").items()
                if path.endswith("/mean")
            }
            got["statistics"] = apart(means, model.pretrained_variables(statistics, by_path))
        print(pair, jnp.dtype(dtype).name, {key: f"{error:.1e}" for key, error in got.items()})
        assert got.pop("gradients") < of_gradients
        assert max(got.values()) < tolerance, got
