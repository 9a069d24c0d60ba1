"""What each perturbation computes itself, beside its passes through the network.

    python benchmarks/own_work.py [--batch=128] [--classes 10 1000] [--out=FILE.json]

Counts of the compiled update alone, with the way back through what it makes of its value, which
repeat exactly: nothing is run. "formula" is what docs/scaling.md says; a method of which it says
nothing is counted as its row in `lpa_jax.methods` has it, at the first of its sites. XLA counts
exponentials and their like apart, an SVD not at all, and the body of a loop once: of LPL's default
solver one step.
"""

import argparse
import math
import pathlib

import jax
import jax.numpy as jnp
import optax
import record
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax.core import class_stats
from lpa_jax.core.pgd import UNROLL
from lpa_jax.methods import METHODS

P, K, T = 64, 128, 3
EXAMPLES = 50_000
DOMAINS = 4


def cost(
    perturbation,
    shape,
    *,
    classes,
    site="site",
    calls=0,
    back=False,
    soft=False,
    begins=None,
    params=None,
):
    """Return FLOPs, bytes and temporary bytes of a perturbation's update at a value.

    Args:
      perturbation: What to count.
      shape: Of the value, `[batch, ...]`.
      classes: Number of classes.
      site: Which of its sites it stands at.
      calls: How many gradients it asks for. They are given, being the work of the network's tail;
        at the logits, where none is left, they are counted.
      back: Whether to count the way back to value and parameters.
      soft: Whether the labels are soft, `[batch, classes]`.
      begins: Shape of the value that its state begins with, if it is another one.
      params: Shapes of the parameters, if it uses them.
    """

    def update(value, state, params, gradients, cotangent, labels, stats, key):
        given, asked = iter(gradients), []
        targets = labels if soft else jax.nn.one_hot(labels, classes)

        def ask(moved):
            if site == "logits":
                losses = optax.softmax_cross_entropy
                return None, jax.grad(lambda logits: jnp.sum(losses(logits, targets)))(moved)
            # To make what is moved is the transform's work; what follows from it is the tail's.
            asked.append(moved)
            return jnp.ones(batch), next(given)

        def perturb(value, params):
            return perturbation.update(
                value,
                state,
                params,
                site=site,
                key=key,
                labels=labels,
                targets=targets,
                weights=jnp.ones(batch),
                examples=jnp.arange(batch),
                domains=jnp.arange(batch) % DOMAINS,
                class_stats=stats,
                gradient_fn=ask,
                logits=value,
                losses=jnp.ones(batch),
            )

        if not back:
            return *perturb(value, params), asked
        new, pullback, state = jax.vjp(perturb, value, params, has_aux=True)
        return new, state, pullback(cotangent)

    batch = shape[0]
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(perturbation.init, begins or value)
    hard = jax.ShapeDtypeStruct((batch,), jnp.int32)
    labels = jax.ShapeDtypeStruct((batch, classes), jnp.float32) if soft else hard
    stats = jax.eval_shape(lambda: class_stats.init(classes))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (value, state, params, [value] * calls, value, labels, stats, key)
    # The state is donated, as in a training loop.
    compiled = jax.jit(update, donate_argnums=1).lower(*arguments).compile()
    counted = compiled.cost_analysis()
    return {
        "flops": counted["flops"],
        "bytes": counted["bytes accessed"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def counted_methods(batch, classes):
    """Return `{method: (perturbation, shape of the value, formula, arguments of cost)}`."""
    known = described(batch, classes)
    covered = {name.split(",")[0] for name in known}
    others = {name: row for name, row in METHODS.items() if name not in covered}
    return known | {name: of_row(row, batch, classes) for name, row in others.items()}


def of_row(row, batch, classes):
    """Return what is counted of a method of which only the row is known; it has no formula."""
    facts = {
        "class_counts": range(1, classes + 1),
        "mean": 0.5,
        "num_classes": classes,
        "num_domains": DOMAINS,
        "num_examples": EXAMPLES,
        "num_steps": 1000,
    }
    # From the first step on.
    perturbation = row.make(facts, **dict.fromkeys(row.shares, 0.0))
    site = perturbation.sites[0]
    parameters = jax.ShapeDtypeStruct((batch * P * K,), jnp.float32)
    shapes = dict.fromkeys(("labels", "logits", "logit_grads"), (batch, classes))
    shapes["param_grads"] = parameters.shape
    shapes["features"] = (batch, K)
    head = {"head": {"kernel": jax.ShapeDtypeStruct((K, classes), jnp.float32)}}
    more = {"params": {"param_grads": parameters, "features": head}.get(site, ())}
    # More gradients than any of our loops of steps is unrolled for.
    calls = UNROLL + 1 if perturbation.needs_gradient else 0
    more |= {"site": site, "calls": calls, "back": site not in ("inputs", "labels")}
    return perturbation, shapes.get(site, (batch, 8, 8, K)), None, more


def described(batch, classes):
    """Return the entries of the methods that docs/scaling.md has formulas for, and their forms."""
    entries, numbers = batch * P * K, batch * classes
    rows = min(batch, classes)
    counts = range(1, classes + 1)
    features = jax.ShapeDtypeStruct((batch, K), jnp.float32)
    kernel = jax.ShapeDtypeStruct((K, classes), jnp.float32)
    parameters = jax.ShapeDtypeStruct((entries,), jnp.float32)

    def at_value(perturbation, formula, **more):
        return perturbation, (batch, 8, 8, K), formula, more

    def at_logits(perturbation, formula, site="logits", **more):
        return perturbation, (batch, classes), formula, {"site": site, **more}

    def of_parameters(perturbation, each, **more):
        more |= {"site": "param_grads", "params": parameters}
        return perturbation, parameters.shape, each * entries, more

    def lpa(formula, calls=T, soft=False, **arguments):
        perturbation = lpa_jax.lpa("site", 0.2, **arguments)
        return at_value(perturbation, formula + classes, calls=calls, soft=soft)

    def adversarial(norm, each, steps=T):
        perturbation = lpa_jax.adversarial("site", 0.1, steps=steps, norm=norm)
        return at_value(perturbation, each * steps * entries, calls=steps)

    # Of the default radius, and of telling rounding noise from a direction (8 positions a row).
    radius, noise = 5 * entries, entries // 4
    sums = 2 * T * entries + radius + noise
    lpl = lpa_jax.lpl(0.4)
    projected = lpa_jax.lpl(0.4, solver="projected", steps=T)
    isda = lpa_jax.isda("site", 0.5, classes)
    diagonal = lpa_jax.isda("site", 0.5, classes, diagonal=True)
    head = {"begins": features, "params": {"head": {"kernel": kernel}}}
    activation = lpa_jax.manifold_mixup(("site", "another"), 2.0)
    return {
        "lpa": lpa(sums + 11 * T * rows * K),
        "lpa, absolute": lpa(sums - radius + 11 * T * rows * K, radius="absolute"),
        "lpa, full": lpa(sums + 7 * noise + 10 * T * rows * P * K, sharing="full"),
        "lpa, low rank 1, but its SVD": lpa(sums + entries + 4 * T * rows * P * K, low_rank=1),
        "lpa, by example": lpa(sums + 11 * T * batch * K, granularity="sample"),
        "lpa, norm": lpa(radius + 2 * entries + 15 * rows * K, calls=0, objective="norm"),
        "lpa, soft labels": lpa(sums + (4 * batch + 11) * T * classes * K, soft=True),
        "adversarial, linf": adversarial("linf", 12),
        "adversarial, linf, one step": adversarial("linf", 6, steps=1),
        "adversarial, l2": adversarial("l2", 26),
        "manifold_mixup, an activation": at_value(activation, 15 * entries, back=True),
        "mixup, the inputs": at_value(lpa_jax.mixup(1.0), 4 * entries, site="inputs"),
        "mixup, the targets": at_logits(lpa_jax.mixup(1.0), 4 * numbers, "labels"),
        "cutmix": at_value(lpa_jax.cutmix(1.0), entries, site="inputs"),
        "cutout": at_value(lpa_jax.cutout(4), entries, site="inputs"),
        "dropout": at_value(lpa_jax.dropout("site", 0.3), 68 * entries, back=True),
        "gaussian_noise": at_value(lpa_jax.gaussian_noise("site", 0.1), 98 * entries),
        "dropblock": at_value(lpa_jax.dropblock("site", 0.1, 3), 49 * entries, back=True),
        "shake": at_value(lpa_jax.shake("site", 0.5), 4 * entries, back=True),
        "drop_path": at_value(lpa_jax.drop_path("site", 0.2), 4 * entries, back=True),
        "mixstyle": at_value(lpa_jax.mixstyle("site", 0.1), 14.5 * entries, back=True),
        "lpl, a step": at_logits(lpl, 14 * numbers),
        "lpl, a step, soft labels": at_logits(lpl, (6 * classes + 14) * numbers, soft=True),
        "lpl, projected": at_logits(projected, T * (11 * numbers + 12 * rows * classes)),
        "lpg": at_logits(lpa_jax.lpg(0.1), 3 * numbers + 10 * rows * classes, "logit_grads"),
        "logit_adjustment": at_logits(lpa_jax.logit_adjustment(counts), numbers),
        "ldam": at_logits(lpa_jax.ldam(counts), 3 * numbers, back=True),
        "additive_margin": at_logits(lpa_jax.additive_margin(0.3), 3 * numbers, back=True),
        "reweight": at_logits(lpa_jax.reweight(counts), numbers, "logit_grads"),
        "label_smoothing": at_logits(lpa_jax.label_smoothing(0.1), 2 * numbers, "labels"),
        "disturb_label": at_logits(lpa_jax.disturb_label(0.1), 3 * numbers + 150 * batch, "labels"),
        "elr": at_logits(
            lpa_jax.elr(EXAMPLES, 3.0), (2 * batch + 18) * numbers + 3 * batch**2, "logit_grads"
        ),
        "isda, the features": (isda, features.shape, 2 * batch * rows * K**2, {}),
        "isda, the logits": at_logits(isda, 4 * rows * classes * K**2, back=True, **head),
        "isda, diagonal, the features": (diagonal, features.shape, 4 * batch * rows * K, {}),
        "isda, diagonal, the logits": at_logits(
            diagonal, 13 * rows * classes * K, back=True, **head
        ),
        "sam": of_parameters(lpa_jax.sam(0.05), 7, calls=1),
        "asam": of_parameters(lpa_jax.asam(0.5), 13, calls=1),
        "gradient_clipping": of_parameters(lpa_jax.gradient_clipping(1.0), 6),
        "gradient_noise": of_parameters(lpa_jax.gradient_noise(0.01), 92),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 1000])
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()
    rows = []
    table = Table(title=f"batch {args.batch}, value 8 x 8 x {K}, T = {T}")
    columns = ("method", "classes", "MFLOPs", "formula", "measured / formula", "MB moved",
               "x value", "temporary MB")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for classes in args.classes:
        entries = counted_methods(args.batch, classes)
        for name, (perturbation, shape, formula, more) in entries.items():
            counted = cost(perturbation, shape, classes=classes, **more)
            ratio = counted["flops"] / formula if formula else None
            passes = counted["bytes"] / (4 * math.prod(shape))
            rows.append(
                {"method": name, "classes": classes, "value": shape, **counted}
                | {"formula_flops": formula, "ratio": ratio, "values_moved": passes}
            )
            table.add_row(
                name,
                str(classes),
                f"{counted['flops'] / 1e6:.3f}",
                f"{formula / 1e6:.3f}" if formula else "",
                f"{ratio:.2f}" if formula else "",
                f"{counted['bytes'] / 1e6:.2f}",
                f"{passes:.1f}",
                f"{counted['temporary_bytes'] / 1e6:.2f}",
            )
        table.add_section()
    Console(width=130).print(table)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
