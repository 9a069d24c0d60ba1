"""Linen models as their users write them, in our own words; none knows of perturbations."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from families import BATCH, CLASSES, family, labels_like, linen, normal, tokens

WIDTH = 16
IMAGES = (BATCH, 8, 8, 3)


class Encoder(nn.Module):
    """A pre-norm transformer layer."""

    dropout: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y)
        y = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x)))
        y = nn.Dropout(self.dropout, deterministic=not self.train, name="drop")(y)
        return x + nn.Dense(WIDTH, name="down")(y)


def patches(x):
    x = nn.Conv(WIDTH, (4, 4), (4, 4), name="patches")(x)
    return x.reshape(x.shape[0], -1, WIDTH)


class TupleBlock(nn.Module):
    """A block that returns its value and what it wants to be logged."""

    @nn.compact
    def __call__(self, x):
        out, attended = {}, nn.LayerNorm(name="norm")(x)
        out["attention"] = nn.MultiHeadDotProductAttention(2, name="attention")(attended)
        x = out["after attention"] = x + out["attention"]
        x = x + nn.Dense(WIDTH, name="mlp")(nn.gelu(nn.LayerNorm(name="norm2")(x)))
        return x, out


class TupleViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        logged, x = {}, patches(x)
        x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
        for i in range(3):
            x, logged[i] = TupleBlock(name=f"block{i}")(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x).mean(1)), logged


@family("ViT, blocks return tuples", "Linen")
def tuple_vit():
    # The first array of a block's output is its value; the others are what it logs.
    return linen(
        TupleViT(),
        normal(*IMAGES),
        logits=lambda output: output[0],
        middle="block1:0",
        late="block2:0",
    )


class ScanLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Encoder(name="layer")(x), None


class ScanViT(nn.Module):
    """The layers are one scan over stacked parameters, each rematerialized."""

    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        layers = nn.scan(
            nn.remat(ScanLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


class LoopViT(nn.Module):
    """The same as a loop."""

    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        for i in range(self.depth):
            x = Encoder(name=f"layer{i}")(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


@family("ViT, scanned and rematerialized", "Linen")
def scanned_vit():
    depth = 4
    loop = linen(LoopViT(depth), normal(*IMAGES), middle="layer1", late="layer3")

    def forward(params, inputs, offsets):
        params = dict(params)
        layers = params.pop("layers")["layer"]
        for i in range(depth):
            params[f"layer{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        named = {f"layer{name[-2]}": offset for name, offset in offsets.items()}
        return loop.forward(params, inputs, named)

    return linen(
        ScanViT(depth),
        normal(*IMAGES),
        forward=forward,
        middle="layers/layer[1]",
        late="layers/layer[3]",
    )


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.swapaxes(nn.LayerNorm(name="norm1")(x), 1, 2)
        y = nn.Dense(y.shape[-1], name="out1")(nn.gelu(nn.Dense(8, name="tokens")(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.gelu(nn.Dense(2 * WIDTH, name="channels")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(WIDTH, name="out2")(y)


class MlpMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = patches(x)
        for i in range(3):
            x = Mixer(name=f"mixer{i}")(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


@family("MLP-Mixer", "Linen")
def mlp_mixer():
    return linen(MlpMixer(), normal(*IMAGES), middle="mixer1", late="mixer2")


class StandardizedConv(nn.Module):
    """A convolution whose weights have mean 0 and variance 1 in each output channel."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        return jax.lax.conv_general_dilated(
            x,
            (kernel - mean) / jnp.sqrt(var + 1e-5) / self.size,
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class PreActivation(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.GroupNorm(4, name="norm1")(x))
        if x.shape[-1] != self.features or self.stride != 1:
            x = StandardizedConv(self.features, 1, self.stride, name="project")(y)
        y = StandardizedConv(self.features, 3, self.stride, name="conv1")(y)
        y = nn.relu(nn.GroupNorm(4, name="norm2")(y))
        return x + StandardizedConv(self.features, name="conv2")(y)


class BiT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = StandardizedConv(8, name="root")(x)
        for i, (features, stride) in enumerate([(8, 1), (16, 2), (16, 1)]):
            x = PreActivation(features, stride, name=f"block{i}")(x)
        x = nn.relu(nn.GroupNorm(4, name="norm")(x)).mean((1, 2))
        return nn.Dense(CLASSES, name="head")(x)


@family("BiT: GroupNorm and weight standardization", "Linen")
def bit():
    return linen(BiT(), normal(*IMAGES), middle="block1", late="block2")


class Residual(nn.Module):
    features: int
    train: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(not self.train, name="norm1")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y)
        return nn.relu(x + nn.BatchNorm(not self.train, name="norm2")(y))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i in range(3):
            x = Residual(8, train, name=f"block{i}")(x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


@family("ResNet, batch statistics in training", "Linen")
def resnet():
    kwargs = {"train": True, "mutable": ["batch_stats"]}
    return linen(ResNet(), normal(*IMAGES), middle="block0", late="block2", kwargs=kwargs)


class JitBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.gelu(nn.Dense(WIDTH, name="dense")(nn.LayerNorm(name="norm")(x)))


Jitted = nn.remat(nn.jit(JitBlock))


class JitStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="stem")(x)
        for i in range(4):
            x = Jitted(name=f"block{i}")(x)
        return nn.Dense(CLASSES, name="head")(x)


class PlainStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="stem")(x)
        for i in range(4):
            x = JitBlock(name=f"block{i}")(x)
        return nn.Dense(CLASSES, name="head")(x)


@family("MLP, nn.remat of nn.jit", "Linen")
def jitted():
    inputs, places = normal(BATCH, 12), {"middle": "block1", "late": "block3"}
    alike = linen(PlainStack(), inputs, **places)
    return linen(JitStack(), inputs, forward=alike.forward, **places)


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(11, WIDTH, name="embed")(x)
        x = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name="rnn1")(x)
        x = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name="rnn2")(x)
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(WIDTH, name="neck")(x[:, -1])))


@family("LSTM, two layers of nn.RNN", "Linen")
def lstm():
    return linen(Lstm(), tokens(BATCH, 5), middle="rnn1", late="neck")


class Down(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.GroupNorm(4)(nn.Conv(self.features, (3, 3))(x)))


class UNet(nn.Module):
    """Logits at each pixel."""

    @nn.compact
    def __call__(self, x):
        high = Down(8, name="down1")(x)
        low = Down(16, name="down2")(nn.max_pool(high, (2, 2), (2, 2)))
        low = Down(16, name="bottom")(low)
        up = nn.ConvTranspose(8, (2, 2), (2, 2), name="up")(low)
        x = Down(8, name="merge")(jnp.concatenate([high, up], -1))
        return nn.Conv(CLASSES, (1, 1), name="head")(x)


@family("U-Net, labels at each pixel", "Linen")
def unet():
    labels = labels_like(BATCH, 8, 8)
    return linen(UNet(), normal(*IMAGES), labels=labels, middle="down1", late="merge")


class Tagger(nn.Module):
    """Logits at each token."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(11, WIDTH, name="embed")(x)
        for i in range(2):
            x = Encoder(name=f"layer{i}")(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="norm")(x))


@family("Token tagger, labels at each token", "Linen")
def tagger():
    labels = labels_like(BATCH, 5)
    return linen(Tagger(), tokens(BATCH, 5), labels=labels, middle="layer0", late="layer1")


class Switched(nn.Module):
    """One of three heads, chosen at run time."""

    def setup(self):
        self.stem = nn.Dense(WIDTH)
        self.trunk = nn.Dense(WIDTH)
        self.heads = [nn.Dense(CLASSES) for _ in range(3)]

    def __call__(self, x, head):
        x = nn.gelu(self.trunk(nn.gelu(self.stem(x))))
        branches = [lambda model, x, i=i: model.heads[i](x) for i in range(3)]
        if self.is_initializing():
            for branch in branches:
                branch(self, x)
        return nn.switch(head, branches, self, x)


@family("Several heads by nn.switch", "Linen")
def switched():
    head = {"head": jnp.array(1)}
    inputs = normal(BATCH, 12)
    return linen(Switched(), inputs, head, kwargs=head, middle="stem", late="trunk")


class Member(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(WIDTH, name="first")(x))
        x = nn.gelu(nn.Dense(WIDTH, name="second")(x))
        return nn.Dense(CLASSES, name="head")(x)


class Ensemble(nn.Module):
    """Three networks side by side, whose logits are averaged."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Member,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return members(name="members")(x).mean(0)


@family("Ensemble by nn.vmap", "Linen")
def ensemble():
    inputs = normal(BATCH, 12)
    alone = linen(Member(), inputs, middle="first", late="second")

    def forward(params, inputs, offsets):
        logits = []
        for i in range(3):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], params["members"])
            added = {n.removeprefix("members/"): offset[i] for n, offset in offsets.items()}
            logits.append(alone.forward(own, inputs, added))
        return jnp.stack(logits).mean(0)

    return linen(
        Ensemble(),
        inputs,
        forward=forward,
        middle="members/first",
        late="members/second",
        axes={"members/first": 1, "members/second": 1},
    )


class Siamese(nn.Module):
    """One encoder for both of two inputs."""

    @nn.compact
    def __call__(self, pair: dict[str, Any]):
        encoder = Member(name="encoder")
        left, right = encoder(pair["left"]), encoder(pair["right"])
        x = nn.gelu(nn.Dense(WIDTH, name="compare")(jnp.concatenate([left, right], -1)))
        return nn.Dense(CLASSES, name="head")(x)


@family("Siamese: a shared encoder, two inputs", "Linen")
def siamese():
    inputs = {"left": normal(BATCH, 12), "right": normal(BATCH, 12, seed=2)}
    return linen(Siamese(), inputs, middle="encoder[1]", late="compare")


class Routed(nn.Module):
    """A mixture of experts: each token goes to the best of four, by a table of one-hot rows."""

    @nn.compact
    def __call__(self, x):
        shape = (4, x.shape[-1], 2 * WIDTH)
        gates = nn.softmax(nn.Dense(4, name="router")(x))
        best = jax.nn.one_hot(gates.argmax(-1), 4)
        up = self.param("up", nn.initializers.lecun_normal(), shape)
        down = self.param("down", nn.initializers.lecun_normal(), (4, 2 * WIDTH, WIDTH))
        hidden = nn.gelu(jnp.einsum("btd,edh,bte->bteh", x, up, best))
        return jnp.einsum("bteh,ehd,bte->btd", hidden, down, gates * best)


class Experts(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(11, WIDTH, name="embed")(x)
        for i in range(2):
            x = Encoder(0.2, self.train, name=f"layer{i}")(x)
            x = x + Routed(name=f"experts{i}")(nn.LayerNorm(name=f"norm{i}")(x))
        return nn.Dense(CLASSES, name="head")(x.mean(1))


@family("Transformer with experts and dropout", "Linen")
def experts():
    kwargs = {"rngs": {"dropout": jax.random.key(4)}}
    return linen(Experts(), tokens(BATCH, 5), kwargs=kwargs, middle="experts0", late="experts1")
