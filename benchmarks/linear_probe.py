"""What a linear classifier makes of the features of a pretrained network, by domain.

    python benchmarks/linear_probe.py domains:PATH [--draws=10] [--out=FILE.json]

For each domain, 40 images of each class are drawn and divided in halves; a logistic regression on
the features of EfficientNet-Lite0 (224 pixels, weights of ImageNet) is fitted to one half and
tested on the other. Mean and standard deviation over draws.
"""

import argparse
import pathlib

import jax
import numpy as np
import record
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lpa_jax import data, models
from lpa_jax.models.weights import load_pretrained
from lpa_jax.training.network import Network
from lpa_jax.training.prefix import activations

OF_A_CLASS = 40


def chosen(rng, domains, labels):
    """Return the numbers of the images of a draw, by domain, class by class."""
    return {
        domain: np.concatenate(
            [
                rng.permutation(np.flatnonzero((domains == domain) & (labels == label)))[
                    :OF_A_CLASS
                ]
                for label in np.unique(labels)
            ]
        )
        for domain in np.unique(domains).tolist()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="domains:PATH")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()

    model = models.EfficientNetLite(variant=0, num_classes=1000)
    inputs = model.pretrained_inputs()
    model = model.clone(mean=inputs.mean, std=inputs.std)
    loaded = data.load(args.dataset, image_size=inputs.image_size, image_part="whole",
                       validation_fraction=0.0)  # fmt: skip
    parts = [loaded.splits[split] for split in ("train", "test")]
    labels, domains = (
        np.concatenate([get(part) for part in parts])
        for get in (lambda part: part.labels, lambda part: part.extra["domains"])
    )
    draws = [chosen(np.random.default_rng(i), domains, labels) for i in range(args.draws)]
    wanted = np.unique(np.concatenate([rows for draw in draws for rows in draw.values()]))

    size = inputs.image_size
    variables = model.init(jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    variables = load_pretrained("pypi:efficientnet-lite0", model, variables)
    run = jax.jit(activations(Network(model), "features"))
    features, first = {}, len(parts[0])
    for begin in track(range(0, len(wanted), args.batch), "features"):
        rows = wanted[begin : begin + args.batch]
        images = np.stack(
            [parts[0].images[i] if i < first else parts[1].images[i - first] for i in rows]
        )
        images = np.pad(images, [(0, args.batch - len(rows)), *[(0, 0)] * 3])
        found = np.asarray(run(variables, data.to_float(jax.numpy.asarray(images))))
        features |= dict(zip(rows.tolist(), found, strict=False))

    rows = []
    folders = pathlib.Path(args.dataset.partition(":")[2]).iterdir()
    names = sorted(path.name for path in folders if path.is_dir() and path.name[0] != ".")
    for domain in np.unique(domains).tolist():
        accuracies = []
        for draw in draws:
            x = np.stack([features[i] for i in draw[domain].tolist()])
            y = labels[draw[domain]]
            fitted, tested = np.arange(len(y)) % 2 == 0, np.arange(len(y)) % 2 == 1
            scale = StandardScaler().fit(x[fitted])
            probe = LogisticRegression(max_iter=2000).fit(scale.transform(x[fitted]), y[fitted])
            accuracies.append(probe.score(scale.transform(x[tested]), y[tested]))
        rows.append({"domain": names[domain], "accuracies": accuracies})
    table = Table(title="linear probe, test accuracy %")
    for column in ("domain", "mean", "sd"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for row in rows:
        percent = 100 * np.array(row["accuracies"])
        table.add_row(row["domain"], f"{percent.mean():.1f}", f"{percent.std(ddof=1):.1f}")
    Console().print(table)
    record.write(args.out, rows, images=len(wanted))


if __name__ == "__main__":
    main()
