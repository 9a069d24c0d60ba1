"""Whether LPA's perturbation should be a constant when the parameters' gradient is taken.

    python benchmarks/stop_gradient.py --dataset=npz:cifar10.npz [--epochs=15] [--width=16]

LPA at the features, ahead of a linear head, is trained on CIFAR-10-LT both ways: as the library has
it, and with the gradient flowing through every step of its ascent, which there can be written down.
The radius is a constant in both. The long tail, the split, the bound and the optimizer are those of
the table `cifar10_lt_ablation`; nothing was tuned for either.
"""

import argparse
import inspect
import pathlib
import statistics
from unittest import mock

import jax
import jax.numpy as jnp
import record
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax.core import class_plan, membership, pgd
from lpa_jax.methods import METHODS
from lpa_jax.tables import catalogue, runs
from lpa_jax.training import fit, loop

STEPS = 3


def _length(rows, otherwise):
    """Return the norm of each row, `otherwise` for zeros, where its derivative would be NaN."""
    squares = jnp.sum(rows**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), otherwise)


def through(site, epsilon, *, radius, split, **_):
    """Return `lpa("features", epsilon, radius="relative")` with a perturbation that is no constant.

    Its other arguments are the defaults.
    """
    assert (site, radius) == ("features", "relative")
    planner = class_plan.planner(epsilon, 0.0, split)

    def update(value, *, params, labels, targets, weights, class_stats, step=0, **_):
        members = membership.by_class(labels, weights, targets.shape[1])
        signs, radii = planner.of(members, class_stats, step)
        radii *= members.mean(_length(jax.lax.stop_gradient(value), 0.0))
        kernel, bias = params["head"]["kernel"], params["head"]["bias"]
        delta = jnp.zeros((len(signs), value.shape[1]))
        for _ in range(STEPS):
            logits = (value + members.to_examples(delta)) @ kernel + bias
            uphill = members.total((jax.nn.softmax(logits) - targets) @ kernel.T)
            pace = signs * 2 * radii / STEPS / _length(uphill, 1.0)
            delta += pgd.column(pace, uphill) * uphill
            shrink = jnp.minimum(radii / _length(delta, 1.0), 1.0)
            delta *= pgd.column(shrink, delta)
        return value + members.to_examples(delta)

    return lpa_jax.stateless(site, update, class_level=True, needs_gradient=False)


# The trainer refuses arguments that a method's signature does not name.
through.__signature__ = inspect.signature(lpa_jax.lpa)


def _spread(values):
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 100), metavar="N")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--width", type=int, default=16, help="Of the small network.")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/stop_gradient")
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()
    changes = {
        "dataset": args.dataset,
        "model.name": "small_cnn",
        "model.options": {"width": args.width},
        "evaluate_every": args.epochs,
    }
    ablation = catalogue.TABLES["cifar10_lt_ablation"]
    row = ablation.rows["lpa"]
    row = row._replace(changes={**row.changes, "perturbation.lpa.site": "features"})
    protocol = runs.Protocol(args.seeds, args.epochs, changes)
    config, _ = runs.configure(ablation, row, protocol)
    rows, errors = [], {}
    shown = Table("perturbation", "test error, %")
    for name, factory in (("a constant", lpa_jax.lpa), ("differentiated", through)):
        try:
            row = METHODS["lpa"]._replace(factory=factory)
            with mock.patch.dict(METHODS._entries, lpa=row):
                summary = loop.train_and_evaluate(config, args.workdir / name.replace(" ", "_"))
        except fit.NonFiniteLossError as error:
            rows.append({"perturbation": name, "failure": str(error)})
            shown.add_row(name, "diverged")
            continue
        errors[name] = [100.0 * result["metrics"]["test"]["error"] for result in summary["seeds"]]
        rows.append({"perturbation": name, "test_errors": errors[name]} | _spread(errors[name]))
        shown.add_row(name, "{mean:.2f} ± {std:.2f}".format_map(rows[-1]))
    if len(errors) == 2:
        one, other = errors.values()
        difference = _spread([b - a for a, b in zip(one, other, strict=True)])
        rows[-1]["difference"] = difference
        shown.caption = "paired difference {mean:+.2f} ± {std:.2f}".format_map(difference)
    Console().print(shown)
    record.write(args.out, rows, epochs=args.epochs)


if __name__ == "__main__":
    main()
