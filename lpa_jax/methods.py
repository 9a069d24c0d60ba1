"""The methods by name: one row each, from which all that goes by name is derived.

Names on the command line and in a configuration, their defaults, what a search of their numbers may
draw, the table in docs/methods.md, and which methods the tests and benchmarks cover. A method of
your own, registered before a configuration names it, is used like these:

    METHODS.register("my_method", Method(my_method, {"site": "group3", "rate": 0.1}, "rate"))

`lpa_jax.adaptive` has no row: it wraps a perturbation, and has no numbers of its own to search.
"""

from collections.abc import Callable, Iterable, Mapping
import inspect
from typing import Any, NamedTuple

from lpa_jax.core.perturbation import Perturbation
from lpa_jax.papers import PAPERS
from lpa_jax.registry import Registry
from lpa_jax.transforms.additive_margin import additive_margin
from lpa_jax.transforms.adversarial import adversarial
from lpa_jax.transforms.asam import asam
from lpa_jax.transforms.coral import coral
from lpa_jax.transforms.cutmix import cutmix
from lpa_jax.transforms.cutout import cutout
from lpa_jax.transforms.dann import dann
from lpa_jax.transforms.disturb_label import disturb_label
from lpa_jax.transforms.domain_mixup import domain_mixup
from lpa_jax.transforms.drop_path import drop_path
from lpa_jax.transforms.dropblock import dropblock
from lpa_jax.transforms.dropout import dropout
from lpa_jax.transforms.drw import drw
from lpa_jax.transforms.elr import elr
from lpa_jax.transforms.gaussian_noise import gaussian_noise
from lpa_jax.transforms.gradient_clipping import gradient_clipping
from lpa_jax.transforms.gradient_noise import gradient_noise
from lpa_jax.transforms.group_dro import group_dro
from lpa_jax.transforms.irm import irm
from lpa_jax.transforms.isda import isda
from lpa_jax.transforms.label_smoothing import label_smoothing
from lpa_jax.transforms.ldam import ldam
from lpa_jax.transforms.logit_adjustment import logit_adjustment
from lpa_jax.transforms.lpa import lpa
from lpa_jax.transforms.lpg import lpg
from lpa_jax.transforms.lpl import lpl
from lpa_jax.transforms.manifold_mixup import manifold_mixup
from lpa_jax.transforms.mixstyle import mixstyle
from lpa_jax.transforms.mixup import mixup
from lpa_jax.transforms.mixup_cutmix import mixup_cutmix
from lpa_jax.transforms.mmd import mmd
from lpa_jax.transforms.reweight import reweight
from lpa_jax.transforms.rsc import rsc
from lpa_jax.transforms.sam import sam
from lpa_jax.transforms.shake import shake
from lpa_jax.transforms.vrex import vrex

COMMAND = "python -c \"from lpa_jax import methods; print(methods.page(), end='')\""
FACTS = ("class_counts", "mean", "num_classes", "num_domains", "num_examples", "num_steps")
"""Arguments of methods that follow from the training set and the length of the run."""


class Range(NamedTuple):
    """The numbers from which a search draws.

    Attributes:
      low: The smallest.
      high: The largest.
      log: Whether to draw uniformly on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


class Method(NamedTuple):
    """What is known of a method besides its code.

    Attributes:
      factory: Makes the perturbation.
      defaults: Arguments that have no default of their own, or another one here: those for CIFAR.
      strength: The argument that makes the method do nothing where it is 0; None if none does.
      by_dataset: What differs from these on a data set, by its name.
      ranges: What a search draws from, by argument.
      paper: Key of its paper in `lpa_jax.papers.PAPERS`.
      settings: What it sets in the rest of a configuration, by dotted key.
      corrects_frequencies: Whether it corrects for the frequencies of the classes in training.
      shares: Arguments that count steps, given here as a share of the run.
    """

    factory: Callable[..., Perturbation]
    defaults: Mapping[str, Any] = {}
    strength: str | None = None
    by_dataset: Mapping[str, Mapping[str, Any]] = {}
    ranges: Mapping[str, Range] = {}
    paper: str | None = None
    settings: Mapping[str, Any] = {}
    corrects_frequencies: bool = False
    shares: tuple[str, ...] = ()

    def make(self, facts: Mapping[str, Any], **arguments: Any) -> Perturbation:
        """Make the perturbation with its defaults, other arguments given, and facts filled in.

        Args:
          facts: Values of `FACTS`.
          **arguments: What differs from the defaults; a share of the run where `shares` has them.

        Raises:
          ValueError: If an argument is outside its range.

        Example:
          >>> METHODS["drw"].make({"class_counts": [30, 10], "num_steps": 1000}, start=0.5)
          Perturbation(sites=('logit_grads',))
        """
        taken = inspect.signature(self.factory).parameters
        known = {key: facts[key] for key in FACTS if key in taken and key in facts}
        known |= {**self.defaults, **arguments}
        for key in self.shares:
            known[key] = round(known[key] * facts["num_steps"])
        return self.factory(**known)


ANNEALED = {
    "penalty_weight": Range(0.1, 1e5, log=True),
    "anneal_steps": Range(2e-4, 1.0, log=True),
}
"""What DomainBed draws of a penalty that begins with the weight 1."""

METHODS: Registry[Method] = Registry(
    "method",
    {
        "additive_margin": Method(
            additive_margin,
            {"margin": 0.35, "scale": 30.0},
            "margin",
            # Margins are of cosines.
            ranges={"margin": Range(0.05, 0.8, log=True)},
            paper="additive_margin",
            settings={"model.head": "normalized"},
        ),
        "adversarial": Method(
            adversarial,
            {"site": "inputs", "epsilon": 8 / 255, "bounds": (0.0, 1.0)},
            "epsilon",
            by_dataset={"digits": {"epsilon": 0.03}},
            ranges={"epsilon": Range(1 / 255, 16 / 255, log=True)},
            paper="pgd",
        ),
        "asam": Method(
            asam,
            {"rho": 0.5},
            "rho",
            by_dataset={"cifar100": {"rho": 1.0}},
            ranges={"rho": Range(0.1, 4.0, log=True)},
            paper="asam",
        ),
        "coral": Method(
            coral,
            {"site": "features", "gamma": 1.0},
            "gamma",
            ranges={"gamma": Range(0.1, 10.0, log=True)},
            paper="coral",
        ),
        "cutmix": Method(
            cutmix,
            {"alpha": 1.0, "probability": 0.5},
            "alpha",
            ranges={"alpha": Range(0.1, 4.0, log=True), "probability": Range(0.1, 1.0)},
            paper="cutmix",
        ),
        "cutout": Method(
            cutout,
            {"size": 16.0},
            "size",
            by_dataset={"cifar100": {"size": 8.0}, "digits": {"size": 4.0}},
            ranges={"size": Range(2.0, 20.0)},
            paper="cutout",
        ),
        "dann": Method(
            dann,
            {"site": "features", "strength": 1.0},
            "strength",
            by_dataset={"digits": {"learning_rate": 1e-3}},
            ranges={
                "strength": Range(0.01, 100.0, log=True),
                "learning_rate": Range(1e-5, 3e-3, log=True),
            },
            paper="dann",
        ),
        "disturb_label": Method(
            disturb_label,
            {"rate": 0.1},
            "rate",
            ranges={"rate": Range(0.02, 0.4, log=True)},
            paper="disturb_label",
        ),
        "domain_mixup": Method(
            domain_mixup,
            {"alpha": 0.2},
            "alpha",
            ranges={"alpha": Range(0.1, 10.0, log=True)},
            paper="domain_mixup",
        ),
        "drop_path": Method(
            drop_path,
            # The last layer of the residual branches of a Wide ResNet.
            {"site": "group*/block*/conv2", "rate": 0.2},
            "rate",
            # The small network has none.
            by_dataset={"digits": {"site": "group2"}},
            ranges={"rate": Range(0.05, 0.5)},
            paper="drop_path",
        ),
        "dropblock": Method(
            dropblock,
            {"site": "group3", "rate": 0.1, "block_size": 3},
            "rate",
            by_dataset={"digits": {"site": "group2", "block_size": 2}},
            ranges={"rate": Range(0.02, 0.4, log=True)},
            paper="dropblock",
        ),
        "dropout": Method(
            dropout,
            {"site": "group3", "rate": 0.3},
            "rate",
            ranges={"rate": Range(0.05, 0.7)},
            paper="dropout",
        ),
        "drw": Method(
            drw,
            # Epoch 160 of 200.
            {"start": 0.8},
            "beta",
            ranges={"start": Range(0.5, 0.95)},
            paper="ldam",
            corrects_frequencies=True,
            shares=("start",),
        ),
        "elr": Method(
            elr,
            {"strength": 3.0, "beta": 0.7},
            "strength",
            by_dataset={"cifar100": {"strength": 7.0, "beta": 0.9}},
            ranges={"strength": Range(0.5, 10.0, log=True), "beta": Range(0.3, 0.95)},
            paper="elr",
        ),
        "gaussian_noise": Method(
            gaussian_noise,
            {"site": "inputs", "stddev": 0.05},
            "stddev",
            ranges={"stddev": Range(0.01, 0.3, log=True)},
        ),
        "gradient_clipping": Method(
            gradient_clipping,
            {"max_norm": 5.0},
            ranges={"max_norm": Range(0.1, 10.0, log=True)},
            paper="gradient_clipping",
        ),
        "gradient_noise": Method(
            gradient_noise,
            # Ours; the variance of the paper is 0.01 and more.
            {"eta": 1e-6},
            "eta",
            ranges={"eta": Range(1e-8, 1e-3, log=True)},
            paper="gradient_noise",
        ),
        # Without strength the domains weigh the same, and not the examples.
        "group_dro": Method(
            group_dro,
            {"eta": 0.01},
            ranges={"eta": Range(1e-3, 0.1, log=True)},
            paper="group_dro",
        ),
        "irm": Method(
            irm,
            # Of DomainBed's 5,001 steps.
            {"penalty_weight": 100.0, "anneal_steps": 0.1},
            "penalty_weight",
            ranges=ANNEALED,
            paper="irm",
            shares=("anneal_steps",),
        ),
        "isda": Method(
            isda,
            {"site": "features", "strength": 0.5},
            "strength",
            ranges={"strength": Range(0.05, 5.0, log=True)},
            paper="isda",
        ),
        "label_smoothing": Method(
            label_smoothing,
            {"alpha": 0.1},
            "alpha",
            ranges={"alpha": Range(0.02, 0.4, log=True)},
            paper="label_smoothing",
        ),
        # LDAM's margins do not correct for frequencies: they follow from how many different
        # examples a class has, however often these are drawn.
        "ldam": Method(
            ldam,
            {},
            "max_margin",
            ranges={"max_margin": Range(0.1, 1.0, log=True)},
            paper="ldam",
            settings={"model.head": "normalized"},
        ),
        "logit_adjustment": Method(
            logit_adjustment,
            {},
            "tau",
            ranges={"tau": Range(0.25, 2.5)},
            paper="logit_adjustment",
            corrects_frequencies=True,
        ),
        "lpa": Method(
            lpa,
            {"site": "group3", "epsilon": 0.1},
            "epsilon",
            by_dataset={"digits": {"epsilon": 0.05}},
            ranges={"epsilon": Range(0.02, 1.0, log=True)},
            paper="lpa",
        ),
        "lpg": Method(
            lpg,
            {"epsilon": 0.1},
            "epsilon",
            ranges={"epsilon": Range(0.01, 1.0, log=True)},
            paper="lpg",
        ),
        "lpl": Method(
            lpl,
            {"epsilon": 0.4},
            "epsilon",
            by_dataset={"digits": {"epsilon": 0.5}},
            ranges={"epsilon": Range(0.05, 4.0, log=True)},
            paper="lpl",
        ),
        "manifold_mixup": Method(
            manifold_mixup,
            {"sites": ("inputs", "group1", "group2"), "alpha": 2.0},
            "alpha",
            ranges={"alpha": Range(0.1, 4.0, log=True)},
            paper="manifold_mixup",
        ),
        "mixstyle": Method(
            mixstyle,
            {"site": "group1", "alpha": 0.1},
            "alpha",
            ranges={"alpha": Range(0.05, 1.0, log=True)},
            paper="mixstyle",
        ),
        "mixup": Method(
            mixup,
            {"alpha": 1.0},
            "alpha",
            ranges={"alpha": Range(0.1, 4.0, log=True)},
            paper="mixup",
        ),
        "mixup_cutmix": Method(
            mixup_cutmix,
            {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
            ranges={
                "mixup_alpha": Range(0.1, 4.0, log=True),
                "cutmix_alpha": Range(0.1, 4.0, log=True),
                "switch": Range(0.1, 0.9),
            },
            paper="mixup_cutmix",
        ),
        "mmd": Method(
            mmd,
            {"site": "features", "gamma": 1.0},
            "gamma",
            ranges={"gamma": Range(0.1, 10.0, log=True)},
            paper="mmd",
        ),
        "reweight": Method(reweight, {}, "beta", paper="reweight", corrects_frequencies=True),
        "rsc": Method(
            rsc,
            {"site": "features"},
            "features",
            ranges={"features": Range(0.0, 0.5), "batch": Range(0.0, 0.5)},
            paper="rsc",
        ),
        "sam": Method(
            sam,
            {"rho": 0.05},
            "rho",
            by_dataset={"cifar100": {"rho": 0.1}},
            ranges={"rho": Range(0.01, 0.5, log=True)},
            paper="sam",
        ),
        "shake": Method(
            shake,
            {"site": "group3", "strength": 0.5},
            "strength",
            ranges={"strength": Range(0.1, 1.0)},
            paper="shake",
        ),
        "vrex": Method(
            vrex,
            # Of DomainBed's 5,001 steps.
            {"penalty_weight": 10.0, "anneal_steps": 0.1},
            "penalty_weight",
            ranges=ANNEALED,
            paper="vrex",
            shares=("anneal_steps",),
        ),
    },
    Method,
)


def by_dataset(name: str) -> dict[str, Mapping[str, Any]]:
    """Return what differs on a data set from the defaults of the methods, by method.

    Example:
      >>> by_dataset("cifar100")["sam"]
      {'rho': 0.1}
    """
    return {key: row.by_dataset[name] for key, row in METHODS.items() if name in row.by_dataset}


def corrections(names: Iterable[str]) -> list[str]:
    """Return which of the methods named correct for the frequencies of the classes.

    Example:
      >>> corrections(["ldam", "drw", "erm"])
      ['drw']
    """
    return [name for name in names if name in METHODS and METHODS[name].corrects_frequencies]


def page() -> str:
    """Return docs/methods.md: a table of all methods, in Markdown."""
    facts = {
        "class_counts": [2, 1],
        "mean": 0.0,
        "num_classes": 2,
        "num_domains": 2,
        "num_examples": 3,
        "num_steps": 100,
    }
    lines = [
        "# Methods",
        "",
        "Generated from the rows of `lpa_jax/methods.py`. To write it again:",
        "",
        "```sh",
        f"{COMMAND} > docs/methods.md",
        "```",
        "",
        "Sites are those of the trainer's defaults; a layer stands for any. Defaults are the",
        "trainer's for CIFAR where the call has none. `*` marks what the trainer fills in from the",
        "training set and the length of the run, `%` a count of steps that it takes as a share of",
        "the run. A range is what `--trials` draws from.",
        "",
        "| method | sites | call | defaults of the trainer | range of a search | paper |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in METHODS.items():
        sites = ", ".join(f"`{site}`" for site in row.make(facts).sites)
        cells = [f"`{name}`", sites, f"`{_call(name, row)}`", _defaults(row), _ranges(row)]
        lines.append(f"| {' | '.join([*cells, _paper(row)])} |")
    return "\n".join(lines) + "\n"


def _call(name: str, row: Method) -> str:
    shown = []
    for parameter in inspect.signature(row.factory).parameters.values():
        mark = "*" if parameter.name in FACTS else "%" if parameter.name in row.shares else ""
        default = parameter.default
        value = "" if default is inspect.Parameter.empty else f"={default!r}"
        shown.append(f"{parameter.name}{mark}{value}")
    return f"{name}({', '.join(shown)})"


def _defaults(row: Method) -> str:
    differing = [f"{key}={_short(value)}" for key, value in row.defaults.items()]
    return ", ".join(f"`{entry}`" for entry in differing)


def _ranges(row: Method) -> str:
    found = []
    for key, (low, high, log) in row.ranges.items():
        found.append(f"`{key}` {_short(low)} to {_short(high)}{', log' if log else ''}")
    return "; ".join(found)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else repr(value)


def _paper(row: Method) -> str:
    if row.paper is None:
        return ""
    paper = PAPERS[row.paper]
    link = f", [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    return f"{paper.citation}{link}"
