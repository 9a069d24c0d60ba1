"""Small Flax models as their users write them; none knows that it will be perturbed."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lpa_jax

NUM_CLASSES = 4
WIDTH = 6


def fill(model: nn.Module, inputs: jax.Array) -> Any:
    """Return variables of random numbers: no bias is 0 and no scale 1, so that errors show."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = 0.6 * rng.normal(size=leaf.shape)
        positive = path[-1].key in ("var", "scale")
        return jnp.asarray(1.0 + values**2 if positive else values, leaf.dtype)

    # An initialization by Flax would have to be compiled.
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, keys, inputs))


def shift(site: str, by: float = 1.0) -> lpa_jax.Perturbation:
    return lpa_jax.stateless(site, lambda value, **_: value + by)


def scale(site: str, by: float = 2.0) -> lpa_jax.Perturbation:
    return lpa_jax.stateless(site, lambda value, **_: by * value)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(WIDTH, name="dense")(x))


class Layer(nn.Module):
    """A block in the form `nn.scan` asks for."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(WIDTH, name="dense")(x)), None


# At module level, as in a user's file: Flax keeps one trace of each for the whole session.
BLOCKS = {
    "plain": Block,
    "remat": nn.remat(Block),
    "jit": nn.jit(Block),
    "remat of jit": nn.remat(nn.jit(Block)),
}
LAYERS = {"scan": Layer, "scan of remat": nn.remat(Layer)}
KINDS = (*BLOCKS, *LAYERS)
NUM_BLOCKS = 2


class Stack(nn.Module):
    """`[B, positions, features]` through two blocks, averaged over the positions, to logits."""

    kind: str = "plain"
    scanned: tuple[str, ...] = ("params", "perturbation")
    reverse: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(WIDTH, name="stem")(x))
        if self.kind in BLOCKS:
            for i in range(NUM_BLOCKS):
                x = BLOCKS[self.kind](name=f"block{i}")(x)
        else:
            layers = nn.scan(
                LAYERS[self.kind],
                variable_axes=dict.fromkeys(self.scanned, 0),
                split_rngs={"params": True},
                length=NUM_BLOCKS,
                reverse=self.reverse,
            )
            x, _ = layers(name="layers")(x, None)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


def as_stack(params: Any, kind: str) -> Any:
    """Put parameters named as those of the plain `Stack` into the form of this kind."""
    if kind in BLOCKS:
        return params
    blocks = [params[f"block{i}"] for i in range(NUM_BLOCKS)]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {"stem": params["stem"], "layers": layers, "fc": params["fc"]}


class Shared(nn.Module):
    """One module called twice: the same parameters, two values."""

    kind: str = "plain"

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(WIDTH, name="stem")(x))
        shared = BLOCKS[self.kind](name="shared")
        return nn.Dense(NUM_CLASSES, name="fc")(shared(shared(x)).mean(1))


class Doubled(Block):
    """A subclass whose call is not that of its parent, but contains it."""

    @nn.compact
    def __call__(self, x):
        return 2.0 * super().__call__(x)


class Inherited(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Doubled(name="doubled")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


class Setup(nn.Module):
    """Submodules made in `setup` and called from helper methods."""

    def setup(self):
        self.blocks = [Block(), Block()]
        self.fc = Head()

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        return self.fc(self.fc.pool(self.encode(x)))


class Head(nn.Module):
    """A module of which another method than its call is called from outside, too."""

    def setup(self):
        self.dense = nn.Dense(NUM_CLASSES)
        self.gate = nn.Dense(WIDTH)

    def pool(self, x):
        return jnp.tanh(self.gate(x)).mean(1)

    def __call__(self, x):
        return self.dense(x)


class BatchNorms(nn.Module):
    """Batch statistics ahead of the site `"block"`, inside it, and after it."""

    kind: str = "plain"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="ahead")(x)
        x = NORM_BLOCKS[self.kind](train, name="block")(x)
        x = nn.BatchNorm(use_running_average=not train, name="after")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(jnp.tanh(x).mean(1))


class NormBlock(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="dense")(x)
        return nn.BatchNorm(use_running_average=not self.train, name="norm")(x)


NORM_BLOCKS = {"plain": NormBlock, "remat of jit": nn.remat(nn.jit(NormBlock))}


class ScannedNorms(nn.Module):
    """Two layers in a stack, each with statistics of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        layers = nn.scan(
            NormLayer,
            variable_axes={"params": 0, "batch_stats": 0, "perturbation": 0},
            split_rngs={"params": True},
            length=NUM_BLOCKS,
        )
        x, _ = layers(train, name="layers")(x, None)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


class NormLayer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(x.shape[-1], name="dense")(x)
        return nn.BatchNorm(use_running_average=not self.train, name="norm")(x), None


class Dropouts(nn.Module):
    """Dropout ahead of and after the site `"block"`."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train, name="ahead")(x)
        x = Block(name="block")(x)
        x = nn.Dropout(0.5, deterministic=not train, name="after")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


class Identities(nn.Module):
    """Three modules in a row that compute one value; their names are not in order of calling."""

    @nn.compact
    def __call__(self, x):
        x = Wrapper(name="wrapper")(x)
        x = nn.Dropout(0.5, deterministic=True, name="alone")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(jnp.tanh(x).mean(1))


class Wrapper(nn.Module):
    """A parent that returns its last child's output."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="child")(x)


class Reserved(nn.Module):
    """Modules that bear the names of sites, or look like the library's own."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(WIDTH, name="inputs")(x))
        x = jnp.tanh(nn.Dense(WIDTH, name="out")(x))
        x = jnp.tanh(nn.Dense(WIDTH, name="perturbation")(x))
        return 3.0 * nn.Dense(NUM_CLASSES, name="logits")(x.mean(1))


class Transformer(nn.Module):
    """A pre-norm encoder of `[B, T]` tokens or `[B, T, features]` floats."""

    num_layers: int = 2

    @nn.compact
    def __call__(self, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = nn.Embed(11, 8, name="embed")(x)
        else:
            x = nn.Dense(8, name="embed")(x)
        for i in range(self.num_layers):
            x = EncoderLayer(name=f"layer{i}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.gelu(nn.Dense(16, name="up")(y))
        return x + nn.Dense(8, name="down")(y)


class Recurrent(nn.Module):
    """A scan whose turns are time steps."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.SimpleCell(WIDTH, name="cell"), name="rnn")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x[:, -1])


class Pair(nn.Module):
    """A network with a second output."""

    @nn.compact
    def __call__(self, x):
        x = Block(name="block")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1)), x


class Repeated(nn.Module):
    """A scanned layer that calls a module of its own twice."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Twice,
            variable_axes={"params": 0, "perturbation": 0},
            split_rngs={"params": True},
            length=NUM_BLOCKS,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        inner = nn.Dense(x.shape[-1], name="inner")
        return jnp.tanh(inner(jnp.tanh(inner(x)))), None


class Skip(nn.Module):
    """What comes after `"branch"` depends on more than its value."""

    @nn.compact
    def __call__(self, x):
        x = Block(name="trunk")(x)
        x = x + Block(name="branch")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(jnp.tanh(x).mean(1))


class Nested(nn.Module):
    """A group of blocks, so that sites lie inside a site."""

    @nn.compact
    def __call__(self, x):
        x = Group(name="group1")(x)
        x = Group(name="group2")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x.mean(1))


class Group(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name="block1")(Block(name="block0")(x))


class Mlp(nn.Module):
    """So wide that the operations of a step are those of its layers."""

    depth: int = 6
    width: int = 512
    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(self.depth):
            x = MlpBlock(self.width, self.norm, train, name=f"block{i}")(x)
        return nn.Dense(NUM_CLASSES, name="fc")(x)


class MlpBlock(nn.Module):
    width: int
    norm: bool
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, use_bias=False, name="dense")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.relu(x)
