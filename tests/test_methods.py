"""The rows of methods, what is derived of them, and a method of the user's own."""

import inspect
import pathlib

from probes import line_of
import pytest

from configs import digits
import lpa_jax
from lpa_jax import methods
from lpa_jax.methods import Method, METHODS, Range
from lpa_jax.papers import PAPERS
from lpa_jax.tables import catalogue, tuning
from lpa_jax.training import config as configuration
from lpa_jax.training import method_config

ROOT = pathlib.Path(__file__).parent.parent
FACTS = {
    "class_counts": [5, 3, 2],
    "mean": 0.5,
    "num_classes": 3,
    "num_domains": 2,
    "num_examples": 10,
    "num_steps": 50,
}
each_method = pytest.mark.parametrize("name", METHODS)


def test_the_page_is_generated_from_the_rows():
    assert (ROOT / "docs" / "methods.md").read_text() == methods.page()


@each_method
def test_a_row_fits_its_factory(name):
    row = METHODS[name]
    taken = inspect.signature(row.factory).parameters
    named = [*row.defaults, *row.ranges, *row.shares, *(row.strength,) * bool(row.strength)]
    for arguments in row.by_dataset.values():
        named += arguments
    assert set(named) <= set(taken)
    assert not set(named) & set(methods.FACTS)
    assert row.paper is None or row.paper in PAPERS
    assert getattr(lpa_jax, name) is row.factory
    # The defaults lie in what a search draws from, so that it can begin with them.
    for key, interval in row.ranges.items():
        default = row.defaults.get(key, taken[key].default)
        for value in (default, *(given.get(key, default) for given in row.by_dataset.values())):
            assert interval.low <= value <= interval.high


def double(site: str, factor: float, decay: int = 3) -> lpa_jax.Perturbation:
    """Multiply a value."""
    assert isinstance(decay, int)
    return lpa_jax.stateless(site, lambda value, **_: (1.0 + factor) * value)


@pytest.fixture
def own():
    """Register a method of the user's own, as long as the test takes."""
    row = Method(
        double,
        {"site": "group3", "factor": 1.0, "decay": 0.5},
        "factor",
        by_dataset={"digits": {"factor": 0.5}},
        ranges={"factor": Range(0.1, 2.0)},
        settings={"epochs": 7},
        corrects_frequencies=True,
        shares=("decay",),
    )
    METHODS.register("double", row)
    yield row
    del METHODS._entries["double"]


def test_a_method_of_the_users_own_is_used_like_these(own):
    config = digits.get_config("method=double+lpl")
    assert config.perturbation.double.to_dict() == {"site": "group3", "factor": 0.5, "decay": 0.5}
    assert config.epochs == 7
    first, _ = method_config.perturbation(config, [5, 3], (0.5,), 20, 8)
    assert first.update(3.0, first.init(None))[0] == 4.5
    table = catalogue.TABLES["digits"]
    found = tuning.ranges(table, catalogue.Row("double+lpl"), config)
    assert found["perturbation.double.factor"] == Range(0.1, 2.0)
    assert methods.corrections(["lpl", "double"]) == ["double"]
    assert "| `double` | `group3` |" in methods.page()
    assert line_of("double", FACTS).arguments == {"site": "first", "decay": 0}
    config.sampling = "class_balanced"
    with pytest.raises(configuration.ConfigError, match=r"double in config\.method would correct"):
        method_config.perturbation(config, [5, 3], (0.5,), 20, 8)


def test_an_existing_name_is_not_registered_again():
    with pytest.raises(ValueError, match="There is a method 'lpa' already"):
        METHODS.register("lpa", Method(double))
    assert METHODS["lpa"].factory is lpa_jax.lpa
