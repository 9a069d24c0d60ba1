"""NNX models as their users write them, in our own words; none knows of perturbations."""

import functools

from flax import nnx
import jax

from families import BATCH, CLASSES, family, normal, of_nnx, tokens

WIDTH = 16


class CNN(nnx.Module):
    """Convolutions, batch statistics in training, and dropout."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, WIDTH, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.neck = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.gelu(self.neck(self.drop(x.mean((1, 2)))))
        return self.head(x)


@family("CNN, BatchNorm and Dropout in training", "NNX")
def cnn():
    return of_nnx(CNN(nnx.Rngs(0)), normal(BATCH, 8, 8, 3), middle="conv2", late="neck")


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs, depth=3, remat=False):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x) if self.remat else block(x)
        return self.head(self.norm(x).mean(1))


@family("Transformer", "NNX")
def transformer():
    model = Transformer(nnx.Rngs(0))
    return of_nnx(model, tokens(BATCH, 5), middle="blocks/1", late="blocks/2")


@family("Transformer, nnx.remat", "NNX")
def rematerialized():
    places = {"middle": "blocks/1", "late": "blocks/2"}
    alike = of_nnx(Transformer(nnx.Rngs(0)), tokens(BATCH, 5), **places)
    model = Transformer(nnx.Rngs(0), remat=True)
    return of_nnx(model, tokens(BATCH, 5), forward=alike.forward, **places)


class Scanned(nnx.Module):
    """Layers made by `nnx.vmap`, run by `nnx.scan`."""

    def __init__(self, rngs, depth=4):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        make = nnx.vmap(lambda rngs: Block(rngs), in_axes=0, out_axes=0)
        self.blocks = make(rngs.fork(split=depth))
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.head(run(self.embed(x), self.blocks).mean(1))


class Looped(nnx.Module):
    """The same as a loop."""

    def __init__(self, rngs, depth=4):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(depth)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@family("Transformer, nnx.scan over nnx.vmap", "NNX")
def scanned():
    depth, inputs = 4, tokens(BATCH, 5)
    loop = of_nnx(Looped(nnx.Rngs(0), depth), inputs, middle="blocks/1", late="blocks/3")
    unrolled = loop.params

    def forward(params, inputs, offsets):
        own = nnx.to_pure_dict(params)
        layers = own.pop("blocks")
        own["blocks"] = {i: jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(depth)}
        state = jax.tree.map(lambda leaf: leaf, unrolled)
        nnx.replace_by_pure_dict(state, own)
        named = {f"blocks/{name[-2]}": offset for name, offset in offsets.items()}
        return loop.forward(state, inputs, named)

    model = Scanned(nnx.Rngs(0), depth)
    return of_nnx(model, inputs, forward=forward, middle="blocks[1]", late="blocks[3]")


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs))
        self.neck = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.neck(self.rnn(self.embed(x))[:, -1])))


@family("LSTM, nnx.RNN", "NNX")
def recurrent():
    return of_nnx(Recurrent(nnx.Rngs(0)), tokens(BATCH, 5), middle="rnn", late="neck")


class Tied(nnx.Module):
    """One layer called three times, and logits by the embedding's own table."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(CLASSES + 7, WIDTH, rngs=rngs)
        self.shared = Block(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for _ in range(3):
            x = self.shared(x)
        return self.embed.attend(self.norm(x).mean(1))


@family("Shared layer and tied embedding", "NNX")
def tied():
    return of_nnx(
        Tied(nnx.Rngs(0)),
        tokens(BATCH, 5),
        num_classes=CLASSES + 7,
        middle="shared[1]",
        late="shared[2]",
    )
