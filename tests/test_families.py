"""Any site of any unmodified model: families of models, most of them of published packages."""

import importlib

import families
import pytest

for module in families.MODULES:
    importlib.import_module(f"families.{module}")

SMALL = ("MLP, nn.remat of nn.jit", "Siamese: a shared encoder, two inputs")
# Of float32: the order of sums differs between programs, and between loads of the machine.
TOLERANCE = {"empty": 2e-6, "zero": 2e-6, "lpa": 1e-5}


def check(figures):
    apart = {name: figures[name] for name in TOLERANCE}
    assert all(apart[name] <= bound for name, bound in TOLERANCE.items()), apart
    # LPA did raise the loss, so that its agreement tells something.
    assert figures["rise"] > 1e-3
    assert figures["sites"] >= 2


@pytest.mark.parametrize("name", SMALL)
def test_small_families(name):
    check(families.measure(families.FAMILIES[name].build()))


@pytest.mark.slow
# Packages warn of what they use and of their own ends.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family(name):
    family = families.FAMILIES[name]
    if family.package:
        pytest.importorskip(families.IMPORTED.get(family.package, family.package))
    check(families.measure(family.build()))


@pytest.mark.slow
def test_a_different_number_of_ascent_steps_is_detected():
    case = families.FAMILIES[SMALL[0]].build()
    assert families.measure(case, hand_steps=families.STEPS - 1)["lpa"] > 5 * TOLERANCE["lpa"]
