"""The methods again, as loops over examples, classes and steps in float64: slow and obvious.

Nothing here is vectorized, differentiated automatically or shared with the library. Vectors are
lists of floats; an activation `[positions, channels]` is one list, position after position.
"""

import math

import numpy as np

# ---------------------------------------------------------------- vectors


def add(a, b, factor=1.0):
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def times(factor, a):
    return [factor * x for x in a]


def length(a):
    return math.sqrt(sum(x * x for x in a))


def unit(a):
    return times(1 / length(a), a) if length(a) > 0 else list(a)


def project(a, radius):
    return list(a) if length(a) <= radius else times(radius / length(a), a)


# ---------------------------------------------------------------- the network


def softmax(u):
    exps = [math.exp(x - max(u)) for x in u]
    return [e / sum(exps) for e in exps]


def cross_entropy(u, target):
    return -sum(t * math.log(p) for t, p in zip(target, softmax(u), strict=True) if t)


def logit_gradient(u, target):
    return [sum(target) * p - t for p, t in zip(softmax(u), target, strict=True)]


class Network:
    """`x [P, D] -> a = x W1 + b1 [P, K] -> tanh or relu -> flat -> W2, b2 -> logits [C]`."""

    def __init__(self, params, bend):
        self.w1, self.b1 = (params["hidden"][name].tolist() for name in ("kernel", "bias"))
        self.w2, self.b2 = (params["head"][name].tolist() for name in ("kernel", "bias"))
        self.bend = bend

    def hidden(self, x):
        values = []
        for position in x:
            for k, bias in enumerate(self.b1):
                values.append(
                    bias + sum(p * row[k] for p, row in zip(position, self.w1, strict=True))
                )
        return values

    def bent(self, a):
        return [math.tanh(x) if self.bend == "tanh" else max(x, 0.0) for x in a]

    def slope(self, x):
        return 1 - math.tanh(x) ** 2 if self.bend == "tanh" else float(x > 0)

    def logits(self, a):
        h = self.bent(a)
        return [
            b + sum(x * row[c] for x, row in zip(h, self.w2, strict=True))
            for c, b in enumerate(self.b2)
        ]

    def pull(self, a, g):
        """Take a gradient at the logits back to the activation `a`."""
        return [
            self.slope(x) * sum(e * w for e, w in zip(g, row, strict=True))
            for x, row in zip(a, self.w2, strict=True)
        ]

    def zeros(self):
        return {
            "hidden": {"kernel": [times(0.0, row) for row in self.w1], "bias": times(0.0, self.b1)},
            "head": {"kernel": [times(0.0, row) for row in self.w2], "bias": times(0.0, self.b2)},
        }

    def add_head(self, grads, a, g):
        head = grads["head"]
        for j, h in enumerate(self.bent(a)):
            head["kernel"][j] = add(head["kernel"][j], g, h)
        head["bias"] = add(head["bias"], g)

    def add_body(self, grads, x, da):
        body, width = grads["hidden"], len(self.b1)
        for p, position in enumerate(x):
            part = da[p * width : (p + 1) * width]
            for d, value in enumerate(position):
                body["kernel"][d] = add(body["kernel"][d], part, value)
            body["bias"] = add(body["bias"], part)


def outcome(
    network,
    inputs,
    targets,
    weights,
    *,
    hidden=None,
    logits=None,
    gradient=None,
    scale=1.0,
    factors=None,
):
    """Return loss and parameter gradient, with something done to every example at each site.

    Args:
      hidden: What is added to the activation of each example.
      logits: What is added to its logits, before they are multiplied by `scale`.
      gradient: What is added to its gradient at the (shifted, scaled) logits.
      factors: How much of its own activation it keeps; the rest is of the example before it.
    """
    grads, loss, total = network.zeros(), 0.0, sum(weights)
    values = [network.hidden(x) for x in inputs]
    factors = [1.0] * len(values) if factors is None else factors
    values = mixed(values, factors)
    for i, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        if weight == 0:
            continue
        a = values[i] if hidden is None else add(values[i], hidden[i])
        u = network.logits(a)
        u = times(scale, u if logits is None else add(u, logits[i]))
        loss += weight / total * cross_entropy(u, target)
        g = logit_gradient(u, target)
        g = g if gradient is None else add(g, gradient[i])
        g = times(scale * weight / total, g)
        network.add_head(grads, a, g)
        da = network.pull(a, g)
        network.add_body(grads, inputs[i], times(factors[i], da))
        network.add_body(grads, inputs[i - 1], times(1 - factors[i], da))
    return loss, grads


# ---------------------------------------------------------------- classes


def one_hot(label, num_classes):
    return [float(c == label) for c in range(num_classes)]


def counts(shares, weights):
    """Count the members of each class; `shares[i][c]` is how much of example i belongs to c."""
    totals = [0.0] * len(shares[0])
    for share, weight in zip(shares, weights, strict=True):
        totals = add(totals, share, weight)
    return totals


def class_means(values, shares, weights):
    """Average the members of each class; 0 for a class without any."""
    means = []
    for c, count in enumerate(counts(shares, weights)):
        total = [0.0] * len(values[0])
        for value, share, weight in zip(values, shares, weights, strict=True):
            if weight * share[c] != 0:
                total = add(total, value, weight * share[c])
        means.append(times(1 / count, total) if count else total)
    return means


def spread(deltas, share):
    """Return what an example gets: the perturbation of its class, or its share of several."""
    total = [0.0] * len(deltas[0])
    for delta, part in zip(deltas, share, strict=True):
        total = add(total, delta, part)
    return total


# ---------------------------------------------------------------- the methods


def lpa(
    values,
    gradient,
    shares,
    weights,
    signs,
    radii,
    *,
    channels,
    shared=True,
    steps=3,
    normalized=True,
    relative=False,
    low_rank=None,
    objective="loss",
):
    """Return what LPA adds to each example.

    `gradient(i, value)` is that of example i's loss. A value is `[positions, channels]`; with
    `shared` a perturbation has one entry for each channel, added at all positions.
    """
    size = channels if shared else len(values[0])
    copies = len(values[0]) // size
    total = counts(shares, weights)
    norms = class_means([[length(value)] for value in values], shares, weights)
    radii = [
        (radius * norm[0] / math.sqrt(copies) if relative else radius) if count else 0.0
        for radius, norm, count in zip(radii, norms, total, strict=True)
    ]

    def summed(vector):
        return [sum(vector[p * size + k] for p in range(copies)) for k in range(size)]

    def everywhere(deltas, i):
        return spread(deltas, shares[i]) * copies

    deltas = [[0.0] * size for _ in total]
    if objective == "norm":
        means = class_means([summed(value) for value in values], shares, weights)
        for c, mean in enumerate(means):
            deltas[c] = stretch(times(1 / copies, mean), signs[c], radii[c])
    else:
        for _ in range(steps):
            gradients = [
                gradient(i, add(value, everywhere(deltas, i))) for i, value in enumerate(values)
            ]
            for c, mean in enumerate(class_means(gradients, shares, weights)):
                if low_rank is not None:
                    mean = top_directions(mean, low_rank, channels)
                direction = unit(summed(mean)) if normalized else summed(mean)
                moved = add(deltas[c], direction, signs[c] * 2 * radii[c] / steps)
                deltas[c] = project(moved, radii[c])
    return [everywhere(deltas, i) for i in range(len(values))]


def top_directions(vector, rank, channels):
    left, singular, right = np.linalg.svd(np.reshape(vector, (-1, channels)), full_matrices=False)
    kept = np.zeros((len(vector) // channels, channels))
    for r in range(rank):
        kept += singular[r] * np.outer(left[:, r], right[r])
    return kept.reshape(-1).tolist()


def stretch(mean, sign, radius):
    if sign == 0:
        return times(0.0, mean)
    return times(sign * (radius if sign > 0 else min(radius, length(mean))), unit(mean))


def lpl_steps(logits, targets, shares, weights, signs, radii, *, alpha, most=None, rounded=False):
    """Return what LPL adds to each example: class c takes `floor(radius / alpha)` raw steps.

    With `rounded` it takes `round(radius / alpha)`, at least one but where the radius is 0.
    """
    total, numbers = counts(shares, weights), []
    for radius, count in zip(radii, total, strict=True):
        if not count or radius == 0:
            numbers.append(0)
        elif rounded:
            numbers.append(max(1, round(radius / alpha)))
        else:
            numbers.append(math.floor(radius / alpha + 1e-9))
    numbers = [number if most is None else min(number, most) for number in numbers]
    deltas = [[0.0] * len(logits[0]) for _ in total]
    for t in range(max(numbers)):
        gradients = [
            logit_gradient(add(u, spread(deltas, share)), target)
            for u, target, share in zip(logits, targets, shares, strict=True)
        ]
        for c, mean in enumerate(class_means(gradients, shares, weights)):
            if t < numbers[c]:
                deltas[c] = add(deltas[c], mean, signs[c] * alpha)
    return [spread(deltas, share) for share in shares]


def lpg(gradients, shares, weights, signs, radii):
    """Return what LPG adds to the logit gradient of each example."""
    means = class_means(gradients, shares, weights)
    deltas = [stretch(*args) for args in zip(means, signs, radii, strict=True)]
    return [spread(deltas, share) for share in shares]


def mixed(values, factors):
    """Mix each example with the one before it, the first with the last."""
    return [
        add(times(factor, value), values[i - 1], 1 - factor)
        for i, (value, factor) in enumerate(zip(values, factors, strict=True))
    ]


# ---------------------------------------------------------------- statistics, splits and bounds


class Statistics:
    """Sums by class: `windows[name][c]` is `[sum of confidence, number correct, number]`."""

    DECAY = 0.98

    def __init__(self, num_classes):
        self.frequency = [0.0] * num_classes
        self.windows = {
            name: [[0.0, 0.0, 0.0] for _ in range(num_classes)]
            for name in ("batch", "ema", "running", "epoch")
        }

    def observe(self, logits, shares, weights):
        batch = [[0.0, 0.0, 0.0] for _ in self.frequency]
        for u, share, weight in zip(logits, shares, weights, strict=True):
            best = u.index(max(u))
            for c, part in enumerate(share):
                if weight * part:
                    seen = [softmax(u)[c], float(best == c), 1.0]
                    batch[c] = add(batch[c], seen, weight * part)
        self.windows["batch"] = batch

    def end_batch(self):
        for c, sums in enumerate(self.windows["batch"]):
            if sums[2] == 0:
                continue
            self.frequency[c] += sums[2]
            self.windows["running"][c] = add(self.windows["running"][c], sums)
            self.windows["ema"][c] = add(sums, self.windows["ema"][c], self.DECAY)

    def end_epoch(self):
        self.windows["epoch"] = self.windows["running"]
        self.windows["running"] = [[0.0, 0.0, 0.0] for _ in self.frequency]

    def means(self, statistic, window):
        """Return the mean of each class, None for one not seen."""
        index = ("confidence", "accuracy").index(statistic)
        return [s[index] / s[2] if s[2] else None for s in self.windows[window]]


def sign(x):
    return 1.0 if x > 0 else -1.0 if x < 0 else 0.0


def threshold(stats, statistic, window, tau=None):
    """Return the sign of each class and how far its statistic is from the threshold."""
    means = stats.means(statistic, window)
    known = [mean for mean in means if mean is not None]
    if tau is None:
        tau = sum(known) / len(known) if known else 0.0
    offsets = [0.0 if mean is None else tau - mean for mean in means]
    return [sign(offset) for offset in offsets], [abs(offset) for offset in offsets]


def tail(frequency, num_head, head_scale=1.0):
    """Return the sign of each class and its share of the varied bound, by frequency."""
    order = sorted(range(len(frequency)), key=lambda c: -frequency[c])
    known = [f for f in frequency if f > 0]
    signs, shares = [], []
    for c, f in enumerate(frequency):
        if f == 0:
            signs.append(0.0)
            shares.append(0.0)
        elif order.index(c) < num_head:
            signs.append(-1.0)
            shares.append(head_scale * f / max(known))
        else:
            signs.append(1.0)
            shares.append(min(known) / f)
    return signs, shares
