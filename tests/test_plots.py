"""What the plots show: everything that is drawn can be seen, and is explained."""

import numpy as np
import pytest

from lpa_jax import plots
from lpa_jax.tables.comparison import RowSummary


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that are drawn."""
    figures, figure = [], plots.figure

    def kept(*arguments, **options):
        made = figure(*arguments, **options)
        figures.append(made[0])
        return made

    monkeypatch.setattr(plots, "figure", kept)
    return figures


def row(epoch, **more):
    train = {"loss": 2.0 / epoch, "accuracy": 0.5}
    return {"epoch": epoch, "metrics": {"train": train, **more}}


VALIDATION = {"nll": 1.5, "accuracy": 0.6}


def legend(canvas):
    """Return the color of each name in the legend of a figure."""
    (found,) = canvas.legends
    names = [text.get_text() for text in found.get_texts()]
    return dict(zip(names, found.legend_handles, strict=True))


def lines(axes):
    """Return the lines of data, without those that are made for a legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


def test_curves_of_one_epoch_can_be_seen_and_told_apart(drawn):
    rows = [row(1, validation=VALIDATION)]
    plots.curves("title", {0: rows})
    for axes in drawn[0].axes:
        train, validation = lines(axes)
        assert train.get_marker() not in ("", "None", None)
        assert train.get_marker() != validation.get_marker()
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_curves_have_a_color_a_seed_and_a_style_a_part(drawn):
    rows = [row(e, validation=VALIDATION) for e in (1, 2)]
    plots.curves("title", {3: rows, 4: rows})
    for axes in drawn[0].axes:
        found = [(line.get_color(), line.get_linestyle()) for line in lines(axes)]
        assert found == [("C0", "-"), ("C0", "--"), ("C1", "-"), ("C1", "--")]
    told = {name: (h.get_color(), h.get_linestyle()) for name, h in legend(drawn[0]).items()}
    assert told == {
        "train": ("black", "-"), "validation": ("black", "--"),
        "seed 3": ("C0", "-"), "seed 4": ("C1", "-"),
    }  # fmt: skip


def test_no_validation_is_in_the_legend_of_a_run_without(drawn):
    plots.curves("title", {0: [row(1)]})
    assert list(legend(drawn[0])) == ["train", "seed 0"]


def test_the_colors_of_classes_are_explained(drawn):
    # The last class is not perturbed in any step.
    signed = {"norm": [1.0, 2.0, 3.0, 0.0], "relative": [0.1, 0.2, 0.3, 0.0]}
    sites = {"a": {**signed, "sign": [1.0, -0.8, 0.2, 0.0]}, "b": {**signed}}
    plots.perturbation("title", sites)
    told = {handle.get_facecolor(): name for name, handle in legend(drawn[0]).items()}
    for axes in drawn[0].axes:
        bars = sorted((round(bar.get_x() + 0.4), told[bar.get_facecolor()]) for bar in axes.patches)
        if axes.get_title() == "a":
            assert [(at, name.partition(" (")[0]) for at, name in bars] == [
                (0, "pushed out"), (1, "pulled in"), (2, "sign varies from step to step"),
            ]  # fmt: skip
        else:
            assert bars == [(at, "without a sign") for at in range(3)]
        # A class without a bar has its place all the same.
        assert axes.get_xlim()[1] > 3
    assert len(told) == 4


def evaluated(seed, accuracy):
    bins = {"examples": [10, 30], "accuracy": [0.5, 0.9], "confidence": [0.4, 0.8]}
    clean = {"error": 0.2, "ece": 0.1, "class_accuracy": [accuracy, None]}
    return {"seed": seed, "metrics": {"clean": clean}, "details": {"reliability": bins}}


def test_an_evaluation_plot_has_a_legend_and_shows_whole_deviations(drawn):
    plots.reliability("title", [evaluated(0, 1.0), evaluated(1, 0.5)])
    left, right = drawn[0].axes
    names = {text.get_text() for text in left.get_legend().get_texts()}
    assert names == {"at mean confidence", "perfect calibration", "accuracy"}
    assert left.get_title() == "ECE 10.00 %, mean of 2 seeds; their bins pooled"
    assert right.get_title() == "accuracy of each class, mean ± sd of 2 seeds"
    assert right.get_ylim()[1] > 0.75 + np.std([1.0, 0.5], ddof=1)
    plots.reliability("title", [evaluated(0, 1.0)])
    assert [axes.get_title() for axes in drawn[1].axes] == ["ECE 10.00 %", "accuracy of each class"]


def test_a_table_plot_has_a_legend_and_names_failed_rows(drawn):
    empty = RowSummary("", None, None, 2, {}, {}, {}, None, None, None, None, None, {}, "", "")
    rows = [
        empty._replace(name="erm", value=5.0, std=0.5, published={"some paper": 4.0}),
        empty._replace(name="lpa", value=4.5, std=0.5),
        empty._replace(name="lpl", failure="The loss is not finite."),
    ]
    plots.table("name", "test error %", rows)
    assert set(legend(drawn[0])) == {
        "mean ± standard deviation of the seeds", "published", "mean of erm",
    }  # fmt: skip
    (axes,) = drawn[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["lpl (failed)", "lpa", "erm"]


def test_numbers_that_are_not_by_class_have_no_plot():
    assert plots.perturbation("run", {"param_grads": {"norm": 1.5}}) is None
