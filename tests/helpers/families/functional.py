"""Models of Haiku and Equinox, whose packages hold networks, and functions of plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from families import Adder, BATCH, Case, CLASSES, family, filled, labels_like, normal, tokens
import lpa_jax

WIDTH = 16

# ---------------------------------------------------------------- Haiku


def haiku(network: Any, inputs: Any, stateful: bool = False, **fields: Any) -> Case:
    """Return the case of a function that calls Haiku modules."""
    import haiku as hk

    model = (hk.transform_with_state if stateful else hk.transform)(network)
    key = jax.random.key(0)
    variables = filled(jax.eval_shape(lambda: model.init(key, inputs)))
    params, state = variables if stateful else (variables, None)
    rng = fields.setdefault("kwargs", {"rng": jax.random.key(4)})["rng"]

    def alone(params, inputs):
        if stateful:
            return model.apply(params, state, rng, inputs)[0]
        return model.apply(params, rng, inputs)

    def forward(params, inputs, offsets):
        adder = Adder(offsets)
        with hk.intercept_methods(adder.interceptor(lambda module: module.module_name)):
            logits = alone(params, inputs)
        adder.finish()
        return logits

    return Case(model, variables, params, inputs, alone, forward, **fields)


@family("hk.nets.MLP with dropout", "Haiku", "dm-haiku")
def haiku_mlp():
    import haiku as hk

    def network(x):
        return hk.nets.MLP([WIDTH, WIDTH, CLASSES])(x, dropout_rate=0.2, rng=hk.next_rng_key())

    places = {"middle": "mlp/~/linear_0", "late": "mlp/~/linear_1"}
    return haiku(network, normal(BATCH, 12), **places)


@family("hk.nets.ResNet (v2), batch statistics in training", "Haiku", "dm-haiku")
def haiku_resnet():
    import haiku as hk

    def network(x):
        norm = {"decay_rate": 0.9, "create_scale": True, "create_offset": True}
        kind = hk.nets.ResNet(
            [1, 1, 1, 1],
            CLASSES,
            norm,
            resnet_v2=True,
            channels_per_group=(16, 16, 32, 32),
            strides=(1, 1, 2, 1),
        )
        return kind(x, is_training=True)

    return haiku(
        network,
        normal(BATCH, 16, 16, 3),
        stateful=True,
        middle="res_net/~/block_group_1",
        late="res_net/~/block_group_3",
    )


@family("hk.nets.MobileNetV1", "Haiku", "dm-haiku")
def haiku_mobilenet():
    import haiku as hk

    def network(x):
        net = hk.nets.MobileNetV1((1, 2, 1), (8, 16, 16), CLASSES)
        return net(x, is_training=True)

    return haiku(
        network,
        normal(BATCH, 8, 8, 3),
        stateful=True,
        middle="mobile_net_v1/mobile_net_v1_block",
        late="mobile_net_v1/mobile_net_v1_block_2",
    )


@family("GRU by hk.dynamic_unroll, hk.MultiHeadAttention", "Haiku", "dm-haiku")
def haiku_recurrent():
    import haiku as hk

    def network(x):
        x = hk.Embed(11, WIDTH, name="embed")(x)
        core = hk.GRU(WIDTH, name="core")
        hidden, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        attention = hk.MultiHeadAttention(
            2, 8, w_init=hk.initializers.VarianceScaling(), model_size=WIDTH, name="attention"
        )
        x = hidden + attention(hidden, hidden, hidden)
        return hk.Linear(CLASSES, name="head")(hk.Linear(WIDTH, name="neck")(x.mean(1)))

    return haiku(network, tokens(BATCH, 5), middle="attention", late="neck")


# ---------------------------------------------------------------- functions, and Equinox


def function(network: Any, params: Any, inputs: Any, **fields: Any) -> Case:
    """Return the case of `network(params, inputs, mark)`, which marks values by `mark`."""

    def model(params, inputs):
        return network(params, inputs, lpa_jax.tap)

    def forward(params, inputs, offsets):
        adder = Adder(offsets)
        logits = network(params, inputs, adder)
        adder.finish()
        return logits

    return Case(model, params, params, inputs, model, forward, **fields)


def equinox(build: Any, layers: Any, inputs: Any, call: Any = None, **fields: Any) -> Case:
    """Return the case of an Equinox model of one example, with layers replaced by marked ones.

    Args:
      build: Maps a key to the model.
      layers: Maps the model to its layers that are to be sites, by names.
      inputs: A batch.
      call: Maps the model and an example to logits; None if that is its call.
      **fields: Of the case.
    """
    import equinox as eqx

    class Marked(eqx.Module):
        inner: Any
        mark: Any = eqx.field(static=True)

        def __call__(self, *args, **kwargs):
            return self.mark(self.inner(*args, **kwargs))

    shapes = eqx.filter_eval_shape(build, jax.random.key(0))
    arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    params = filled(arrays)

    def one(params, example, mark):
        model = eqx.combine(params, static)
        names = list(layers(model))
        marked = [
            Marked(layer, lambda output, name=name: mark(name, output))
            for name, layer in layers(model).items()
        ]
        model = eqx.tree_at(lambda model: list(layers(model).values()), model, marked)
        assert list(layers(model)) == names
        return (call or type(model).__call__)(model, example)

    def model(params, inputs):
        return jax.vmap(lambda example: one(params, example, lpa_jax.tap))(inputs)

    def forward(params, inputs, offsets):
        def run(example, offsets):
            adder = Adder(offsets)
            logits = one(params, example, adder)
            adder.finish()
            return logits

        return jax.vmap(run)(inputs, offsets)

    return Case(model, params, params, inputs, model, forward, **fields)


@family("eqx.nn.MLP", "Equinox", "equinox")
def equinox_mlp():
    import equinox as eqx

    def layers(model):
        return {f"layer{i}": layer for i, layer in enumerate(model.layers)}

    return equinox(
        lambda key: eqx.nn.MLP(12, CLASSES, WIDTH, 3, key=key),
        layers,
        normal(BATCH, 12),
        middle="layer1",
        late="layer2",
    )


@family("CNN of eqx.nn layers", "Equinox", "equinox")
def equinox_cnn():
    import equinox as eqx

    def build(key):
        keys = jax.random.split(key, 4)
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.MaxPool2d(2, 2),
                eqx.nn.Conv2d(8, 8, 3, padding=1, key=keys[1]),
                eqx.nn.GroupNorm(4, 8),
                eqx.nn.Lambda(lambda x: jax.nn.relu(x).reshape(-1)),
                eqx.nn.Linear(128, WIDTH, key=keys[2]),
                eqx.nn.Lambda(jax.nn.gelu),
                eqx.nn.Linear(WIDTH, CLASSES, key=keys[3]),
            ]
        )

    def layers(model):
        return {f"layer{i}": layer for i, layer in enumerate(model.layers)}

    inputs = normal(BATCH, 3, 8, 8)
    return equinox(build, layers, inputs, middle="layer3", late="layer6")


@family("VisionTransformer", "Equinox", "equimo")
def equimo_vit():
    from equimo.vision.models import VisionTransformer

    def build(key):
        return VisionTransformer(
            img_size=8,
            in_channels=3,
            dim=WIDTH,
            patch_size=4,
            num_heads=2,
            depths=[3],
            num_classes=CLASSES,
            key=key,
        )

    def layers(model):
        (chunk,) = model.blocks
        named = {f"block{i}": block for i, block in enumerate(chunk.blocks)}
        return named | {"norm": model.norm}

    return equinox(
        build,
        layers,
        normal(BATCH, 3, 8, 8),
        call=lambda model, x: model(x, key=jax.random.key(4), inference=True),
        middle="block1",
        late="block2",
    )


@family("Convolutions, lax only", "plain JAX")
def plain_cnn():
    shapes = {
        "conv1": (3, 3, 3, 8),
        "conv2": (3, 3, 8, WIDTH),
        "neck": (WIDTH, WIDTH),
        "head": (WIDTH, CLASSES),
    }

    def conv(x, kernel, stride):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions
        )

    def network(params, x, mark):
        x = jax.nn.relu(mark("conv1", conv(x, params["conv1"], 1)))
        x = jax.nn.relu(mark("conv2", conv(x, params["conv2"], 2)))
        x = mark("neck", jax.nn.gelu(x.mean((1, 2)) @ params["neck"]))
        return x @ params["head"]

    params = filled({n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()})
    return function(network, params, normal(BATCH, 8, 8, 3), middle="conv2", late="neck")


@family("Language model, scan over layers, lax only", "plain JAX")
def plain_transformer():
    depth, heads, vocabulary = 3, 2, 11
    shapes = {
        "table": (vocabulary, WIDTH),
        "layers": {
            "qkv": (depth, WIDTH, 3 * WIDTH),
            "out": (depth, WIDTH, WIDTH),
            "up": (depth, WIDTH, 2 * WIDTH),
            "down": (depth, 2 * WIDTH, WIDTH),
        },
    }

    def norm(x):
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def layer(x, weights):
        q, k, v = jnp.split(norm(x) @ weights["qkv"], 3, -1)
        q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + y @ weights["out"]
        return x + jax.nn.gelu(norm(x) @ weights["up"]) @ weights["down"]

    def model(params, x):
        @jax.checkpoint
        def turn(x, weights):
            return lpa_jax.tap("layer", layer(x, weights)), None

        x, _ = jax.lax.scan(turn, params["table"][x], params["layers"])
        return norm(x) @ params["table"].T

    def forward(params, x, offsets):
        x = params["table"][x]
        for i in range(depth):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            x = layer(x, weights) + offsets.get(f"layer[{i}]", 0.0)
        return norm(x) @ params["table"].T

    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in leaves]
    params = filled(tree.unflatten(leaves))
    return Case(
        model,
        params,
        params,
        tokens(BATCH, 5),
        model,
        forward,
        labels=labels_like(BATCH, 5, num_classes=vocabulary),
        num_classes=vocabulary,
        middle="layer[1]",
        late="layer[2]",
    )
