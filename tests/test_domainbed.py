"""The protocol of DomainBed: its splits, its draws of hyper-parameters, and its selection."""

import json
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from lpa_jax import data
from lpa_jax.data import DataError, digits, domainbed, Examples, folder, npz
from lpa_jax.data.source import joined
from lpa_jax.tables import domain_algorithms, selection
from lpa_jax.tables.selection import Checkpoint
from lpa_jax.training.config import ConfigError

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="real images are not beside the repository")


def numbered(number, classes=("cat", "dog"), first=0, **extra):
    """Images of 4 x 4 pixels whose first two tell their numbers."""
    numbers = np.arange(first, first + number)
    pixels = np.zeros((number, 4, 4, 1), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = numbers // 256, numbers % 256
    return Examples(pixels, numbers % len(classes), classes, extra)


def numbers_of(examples):
    return (examples.images[:, 0, 0, 0].astype(int) * 256 + examples.images[:, 0, 1, 0]).tolist()


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("trial", "domain", "expected"), [(0, 0, 894182419), (1, 0, 785910682), (2, 3, 1709828778)]
)
def test_seeds_of_splits(trial, domain, expected):
    assert domainbed.seed_hash(trial, domain) == expected


PACS = [
    ("art_painting", 2048, 409, [548, 677, 1997, 977, 1553], "elephant/pic_172.jpg"),
    ("cartoon", 2344, 468, [1488, 562, 461, 570, 2092], None),
    ("photo", 1670, 334, [1441, 1432, 282, 669, 637], "person/253_0204.jpg"),
    ("sketch", 3929, 785, [2743, 2083, 2744, 3449, 1159], "guitar/n03272010_7092-1.png"),
]


@pytest.mark.parametrize("domain", range(4))
def test_the_split_of_pacs(domain):
    _, number, size, first, _ = PACS[domain]
    inside, outside = domainbed.in_and_out(number, domain, trial_seed=0)
    assert len(outside) == size
    assert outside[:5].tolist() == first
    assert sorted([*inside, *outside]) == list(range(number))
    assert set(domainbed.in_and_out(number, domain, trial_seed=1)[1]) != set(outside)


@real
@pytest.mark.shared_data
def test_the_files_of_pacs(caplog):
    domains = folder.by_domain(str(SHARED / "PACS"), 8, "whole")
    domainbed.check_counts(domains)
    assert not caplog.text
    assert [(name, len(one)) for name, one in domains.items()] == [one[:2] for one in PACS]
    found = domainbed.splits(domains, ["sketch"], trial_seed=0)
    for name, number, out, _, file in PACS:
        outside = found[f"{name}/out"].images
        assert (len(outside), len(found[f"{name}/in"])) == (out, number - out)
        if file:
            index = int(outside.index[0])
            assert outside.store.name(index) == str(SHARED / "PACS" / name / file)
            assert outside[:1].shape == (1, 8, 8, 3)
    assert len(found["train"]) == 1639 + 1876 + 1336
    assert domainbed.letters([*domains]) == ("A", "C", "P", "S")


def test_splits_of_a_run():
    domains = {
        "Art": numbered(20), "Clip Art": numbered(40, first=100), "Photo": numbered(31, first=200)
    }  # fmt: skip
    found = domainbed.splits(domains, ["Clip Art"], trial_seed=3)
    assert [*found] == [
        "train", "validation", "Art/in", "Art/out", "Clip_Art/in", "Clip_Art/out", "Photo/in",
        "Photo/out",
    ]  # fmt: skip
    for split, own in (("train", "in"), ("validation", "out")):
        parts = [found[f"Art/{own}"], found[f"Photo/{own}"]]
        assert numbers_of(found[split]) == [number for one in parts for number in numbers_of(one)]
        assert found[split].extra["domains"].tolist() == [0] * len(parts[0]) + [1] * len(parts[1])
    for number, (name, examples) in enumerate(domains.items()):
        name = name.replace(" ", "_")
        both = domainbed.in_and_out(len(examples), number, 3)
        for own, index in zip(("in", "out"), both, strict=True):
            assert numbers_of(found[f"{name}/{own}"]) == numbers_of(examples.take(index))
    assert len(found["Photo/out"]) == 6

    # It is a data set, in which nothing more is held out.
    made = data.make_dataset("mine", found)
    assert len(made.train) == 16 + 25
    np.testing.assert_array_equal(made.train.extra["domains"], found["train"].extra["domains"])

    # Two test domains, for cross-validation.
    other = domainbed.splits(domains, ["Clip Art", "Photo"], trial_seed=3)
    assert numbers_of(other["train"]) == numbers_of(found["Art/in"])
    assert other["Photo/in"].fingerprint() == found["Photo/in"].fingerprint()


def test_splits_of_a_folder(tmp_path):
    for domain in ("winter", "fall", "spring"):
        for kind in ("blue", "red"):
            (tmp_path / domain / kind).mkdir(parents=True)
            for i in range(5):
                color = {"blue": (0, 0, 255), "red": (255, 0, 0)}[kind]
                Image.new("RGB", (6, 4), color).save(tmp_path / domain / kind / f"{i}.png")
    domains = folder.by_domain(str(tmp_path), 8, "whole")
    assert [*domains] == ["fall", "spring", "winter"]
    assert all(not one.extra and len(one) == 10 for one in domains.values())
    found = domainbed.splits(domains, ["spring"], trial_seed=0)
    train = found["train"]
    assert len(train) == 16
    np.testing.assert_array_equal(train.images[:][:, 0, 0, 0] > 128, train.labels == 1)
    where = [train.images.store.name(int(i)).split("/")[-3] for i in train.images.index]
    assert where == ["fall"] * 8 + ["winter"] * 8


def wrong(kind):
    ten, eleven = numbered(10), numbered(11)
    match kind:
        case "unknown":
            return {"a": ten, "b": ten}, ["c"], "There is no domain 'c': give some of a, b."
        case "all":
            return {"a": ten, "b": ten}, ["b", "a"], r"All domains are test domains \(a, b\)"
        case "small":
            return {"a": ten, "b": numbered(4)}, ["a"], "The domain 'b' has 4 examples, of which"
        case "names":
            return {"a b": ten, "a_b": eleven}, ["a b"], "The domains a b, a_b differ in signs"
        case "classes":
            other = numbered(10, ("cat", "eel"))
            return {"a": ten, "b": other, "c": ten}, ["c"], "differ in their class names"
        case "extra":
            other = numbered(10, about=np.zeros(10))
            return {"a": ten, "b": other, "c": ten}, ["c"], "differ in their extra arrays"


@pytest.mark.parametrize("kind", ["unknown", "all", "small", "names", "classes", "extra"])
def test_what_cannot_be_split(kind):
    domains, test, told = wrong(kind)
    with pytest.raises(DataError, match=told):
        domainbed.splits(domains, test, trial_seed=0)


def test_joined_keeps_what_is_known_of_each():
    parts = [numbered(2, about=np.array([5, 6])), numbered(3, about=np.array([7, 8, 9]))]
    together = joined(parts)
    assert together.extra["about"].tolist() == [5, 6, 7, 8, 9]
    assert numbers_of(together) == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("name", domainbed.KNOWN)
def test_other_counts_than_the_known_ones_are_told(name, caplog):
    known = domainbed.KNOWN[name]
    classes = tuple(map(str, range(known.classes)))
    for images in known.images:
        # One image, many times over.
        pixels = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (images, 1, 1, 1))
        whole = Examples(pixels, np.zeros(images, np.int32), classes)
        none = whole.take(np.zeros(0, int))
        domains = dict.fromkeys(known.letters, none)
        domains[next(iter(domains))] = whole
        domainbed.check_counts(domains)
        assert not caplog.text
    domains[next(iter(domains))] = whole.take(np.arange(1, images))
    domainbed.check_counts(domains)
    assert f"{name} has {images - 1} images here, but " in caplog.text
    assert all(f"{number} in " in caplog.text for number in known.images)
    assert "classes" not in caplog.text
    fewer = Examples(whole.images, whole.labels, classes[1:])
    domainbed.check_counts(dict.fromkeys(known.letters, none) | {next(iter(domains)): fewer})
    caplog.clear()
    domainbed.check_counts(dict.fromkeys(known.letters, fewer))
    assert f"{name} has {known.classes - 1} classes here, but {known.classes} in" in caplog.text
    caplog.clear()
    domainbed.check_counts({"a": none, "b": none})
    assert not caplog.text


# ---------------------------------------------------------------- digits


def test_rotated_images():
    whole = numbered(25)
    domains = domainbed.rotated(whole, seed=0)
    assert [*domains] == ["0", "15", "30", "45", "60", "75"]
    assert [len(one) for one in domains.values()] == [5, 4, 4, 4, 4, 4]
    # Shuffled, then every sixth.
    order = data.streams.stream("domains", 0).permutation(25)
    assert numbers_of(domains["0"]) == order[::6].tolist()
    for i, (name, examples) in enumerate(domains.items()):
        chosen = order[i::6]
        np.testing.assert_array_equal(examples.labels, whole.labels[chosen])
        for image, number in zip(examples.images, chosen, strict=True):
            one = Image.fromarray(whole.images[number, ..., 0])
            turned = one.rotate(int(name), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(image[..., 0], np.asarray(turned))
    other = domainbed.rotated(whole, seed=1)
    assert numbers_of(other["0"]) != numbers_of(domains["0"])
    color = Examples(np.repeat(whole.images, 3, axis=-1), whole.labels, whole.class_names)
    np.testing.assert_array_equal(
        domainbed.rotated(color, seed=0)["45"].images[..., :1], domains["45"].images
    )
    with pytest.raises(DataError, match=r"float32 of shape \(25, 4, 4, 1\): give pixels"):
        domainbed.rotated(
            Examples(whole.images.astype(np.float32), whole.labels, whole.class_names), seed=0
        )


def test_rotated_digits():
    domains = domainbed.rotated_digits(seed=2)
    assert [len(one) for one in domains.values()] == [300, 300, 300, 299, 299, 299]
    whole = joined([*digits.read().values()])
    order = data.streams.stream("domains", 2).permutation(1797)
    for i, one in enumerate(domains.values()):
        assert one.images.shape[1:] == (12, 12, 1)
        assert len(np.unique(one.labels)) == 10
        # Nothing is cut off, but of what is between pixels.
        before, after = (
            images.sum(axis=(1, 2, 3), dtype=int)
            for images in (whole.images[order[i::6]], one.images)
        )
        np.testing.assert_allclose(after, before, rtol=0.03)
    found = domainbed.splits(domains, ["0"], trial_seed=2)
    assert len(found["train"]) == 2 * 240 + 3 * 240


def test_colored_digits():
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (9001, 2, 2, 1)).astype(np.uint8)
    whole = Examples(pixels, rng.integers(0, 10, 9001), tuple(map(str, range(10))))
    domains = domainbed.colored(whole, seed=0)
    assert [len(one) for one in domains.values()] == [3001, 3000, 3000]
    order = data.streams.stream("domains", 0).permutation(9001)
    for i, (flipped, one) in enumerate(zip((0.1, 0.2, 0.9), domains.values(), strict=True)):
        chosen = order[i::3]
        # One channel has the image, the other nothing.
        np.testing.assert_array_equal(one.images.max(axis=-1), pixels[chosen, ..., 0])
        assert (one.images.min(axis=-1) == 0).all()
        color = one.images[:, 0, 0].argmax(axis=-1)
        assert (color != one.labels).mean() == pytest.approx(flipped, abs=0.03)
        wrong = one.labels != (whole.labels[chosen] < 5)
        assert wrong.mean() == pytest.approx(0.25, abs=0.03)
        # Labels and colors are flipped independently.
        both = (color != one.labels) & wrong
        assert both.mean() == pytest.approx(0.25 * flipped, abs=0.03)
        assert one.class_names == ("5 to 9", "0 to 4")
    with pytest.raises(DataError, match="with C = 1"):
        domainbed.colored(domains["90"], seed=0)


@real
@pytest.mark.slow
@pytest.mark.shared_data
def test_mnist():
    whole = joined([*npz.read(str(SHARED / "mnist" / "mnist.npz")).values()])
    assert len(whole) == 70000
    rotated = domainbed.rotated(whole, seed=0)
    assert [len(one) for one in rotated.values()] == [11667] * 4 + [11666] * 2
    assert {one.images.shape[1:] for one in rotated.values()} == {(28, 28, 1)}
    colored = domainbed.colored(whole, seed=0)
    assert [len(one) for one in colored.values()] == [23334, 23333, 23333]
    found = domainbed.splits(rotated, ["75"], trial_seed=0)
    assert len(found["train"]) == 4 * 9334 + 9333
    assert found["train"].images.dtype == np.uint8


def test_batches_of_equal_parts_of_each_domain():
    domains = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [60, 30, 6]))
    labels = np.zeros(96, np.int32)
    batches = data.train_batches(0, 2, labels, 12, "domains", domains)
    assert batches.shape == (8, 12)
    assert batches.dtype == np.int32
    for row in domains[batches]:
        assert np.bincount(row).tolist() == [4, 4, 0, 0, 4]
    # With replacement, each example of a domain equally often, and in no order within a batch.
    many = np.concatenate([data.train_batches(0, i, labels, 12, "domains", domains).ravel()
                           for i in range(300)])  # fmt: skip
    counts = np.bincount(many, minlength=96)
    for domain, size in ((0, 60), (1, 30), (4, 6)):
        expected = 300 * 8 * 4 / size
        np.testing.assert_allclose(counts[domains == domain], expected, atol=5 * expected**0.5)
    first = domains[many.reshape(-1, 12)[:, 0]]
    assert [(first == domain).mean() for domain in (0, 1, 4)] == pytest.approx(
        [1 / 3] * 3, abs=0.05
    )
    for row in batches:
        if len(set(row)) < 12:
            break
    else:
        raise AssertionError("nothing came twice")
    again = data.train_batches(0, 2, labels, 12, "domains", domains)
    np.testing.assert_array_equal(batches, again)
    assert (data.train_batches(0, 3, labels, 12, "domains", domains) != batches).any()
    with pytest.raises(ValueError, match="3 domains to train on: choose a multiple of 3"):
        data.train_batches(0, 0, labels, 16, "domains", domains)
    with pytest.raises(ValueError, match="needs the domain of each example"):
        data.train_batches(0, 0, labels, 12, "domains")


# ---------------------------------------------------------------- draws


def test_draws_of_other_algorithms_and_sets():
    drawn = domain_algorithms.draw("DANN", "RotatedMNIST", 1, 2)
    assert drawn == pytest.approx({
        "resnet_dropout": 0.5, "lambda": 3.921673436374977,
        "weight_decay_d": 1.9521633464456046e-05, "d_steps_per_g_step": 1,
        "grad_penalty": 0.6739278671633654, "beta1": 0.5, "mlp_width": 304, "mlp_depth": 3,
        "mlp_dropout": 0.1, "lr": 0.00034434240384395007, "weight_decay": 0.0, "batch_size": 10,
        "lr_g": 0.0002872072384786232, "lr_d": 0.0003105663182310478, "weight_decay_g": 0.0,
    }, rel=1e-12)  # fmt: skip
    assert domain_algorithms.draw("IRM", "DomainNet", 3, 1) == pytest.approx({
        "resnet_dropout": 0.1, "irm_lambda": 2.04779455554515, "irm_penalty_anneal_iters": 6533,
        "lr": 0.0002383446436179699, "weight_decay": 6.431270010222042e-05, "batch_size": 9,
    }, rel=1e-12)  # fmt: skip
    assert domain_algorithms.draw("DANN", "ColoredMNIST", 0, 7) == {
        "resnet_dropout": 0.0, "lambda": 1.0, "weight_decay_d": 0.0, "d_steps_per_g_step": 1,
        "grad_penalty": 0.0, "beta1": 0.5, "mlp_width": 256, "mlp_depth": 3, "mlp_dropout": 0.0,
        "lr": 1e-3, "weight_decay": 0.0, "batch_size": 64, "lr_g": 1e-3, "lr_d": 1e-3,
        "weight_decay_g": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no algorithm 'ERMs'; did you mean ERM"):
        domain_algorithms.draw("ERMs", "PACS", 1, 0)


RANGES = {
    "Mixup": {"mixup_alpha": (0.2, 0.1, 10)},
    "CORAL": {"mmd_gamma": (1, 0.1, 10)},
    "MMD": {"mmd_gamma": (1, 0.1, 10)},
    "RSC": {"rsc_f_drop_factor": (1 / 3, 0, 0.5), "rsc_b_drop_factor": (1 / 3, 0, 0.5)},
    "GroupDRO": {"groupdro_eta": (0.01, 0.001, 0.1)},
    "IRM": {"irm_lambda": (100, 0.1, 1e5), "irm_penalty_anneal_iters": (500, 1, 9999)},
    "VREx": {"vrex_lambda": (10, 0.1, 1e5), "vrex_penalty_anneal_iters": (500, 1, 9999)},
    "SAM": {"rho": (0.05, 0.01, 0.1)},
}


@pytest.mark.parametrize("algorithm", RANGES)
def test_ranges_of_draws(algorithm):
    draws = [domain_algorithms.draw(algorithm, "PACS", number, 0) for number in range(60)]
    common = {"lr": (5e-5, 1e-5, 10**-3.5), "weight_decay": (0, 1e-6, 1e-2),
              "batch_size": (32, 8, 45), "resnet_dropout": (0, 0, 0.5)}  # fmt: skip
    assert draws[0].keys() == {**common, **RANGES[algorithm]}.keys()
    for name, (default, low, high) in {**common, **RANGES[algorithm]}.items():
        drawn = [one[name] for one in draws]
        assert drawn[0] == default
        assert low <= min(drawn[1:]) <= max(drawn[1:]) <= high
        assert len(set(drawn[1:])) > 2
        assert isinstance(drawn[1], int) == (name == "batch_size" or name.endswith("iters"))


# ---------------------------------------------------------------- selection


@pytest.fixture(scope="module")
def sweep():
    """The records of forty runs that come with DomainBed, and the tables that it prints."""
    root = SHARED / "domainbed_sweep"
    if not root.exists():
        pytest.skip("DomainBed's records are not beside the repository")
    records = [
        json.loads(line)
        for path in sorted(root.glob("*/results.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return records, (root / "expected_tables.txt").read_text()


@pytest.mark.shared_data
@pytest.mark.parametrize("rule", ["training_domains", "cross_validation", "oracle"])
def test_the_tables_of_domainbed(sweep, rule):
    records, printed = sweep
    assert f"Total records: {len(records)}" in printed
    label = re.escape(selection.RULES[rule].label)
    domains, sets = re.findall(rf"model selection method: {label}\n.*\nERM +(.*)", printed)
    (row,) = selection.rows(selection.choose(selection.checkpoints(records), rule))
    assert [*map(str, row.cells), str(row.average)] == re.split(r"\s{2,}", domains.strip())
    average = selection.average([row.trials])
    assert [str(row.trials), str(average)] == re.split(r"\s{2,}", sets.strip())
    assert (row.dataset, row.algorithm) == ("VLCS", "ERM")
    assert all(choice.draws == 2 and not choice.missing for choice in row.choices)


@pytest.mark.shared_data
def test_the_draws_and_seeds_of_domainbed(sweep):
    drawn = set()
    for record in sweep[0]:
        args, found = record["args"], record["hparams"]
        numbers = args["hparams_seed"], args["trial_seed"]
        ours = domain_algorithms.draw("ERM", "VLCS", *numbers)
        assert ours == {name: found[name] for name in ours}
        seed = domainbed.seed_hash("VLCS", "ERM", args["test_envs"], *numbers)
        assert seed == args["seed"]
        drawn.add(ours["lr"])
    assert len(drawn) == 3


def run(tests, *accuracies, draw=0, trial=0, algorithm="ERM"):
    """A checkpoint each hundred steps, from accuracies by domain, *in* and *out*."""
    return [
        Checkpoint("PACS", algorithm, tests, trial, draw, 100 * i, inside, outside)
        for i, (inside, outside) in enumerate(accuracies)
    ]


def test_each_rule_by_hand():
    found = [
        *run((0,), ((0.1, 0, 0), (0.9, 0.5, 0.1)), ((0.2, 0, 0), (0.4, 0.4, 0.5)),
             ((0.3, 0, 0), (0.6, 0.0, 0.2))),
        *run((0, 1), ((0, 0.2, 0), (0, 0, 0)), ((0, 0.3, 0), (1, 1, 1)), ((0, 0.9, 0), (0, 0, 0))),
        *run((0, 2), ((0, 0, 0.2), (0, 0, 0)), ((0, 0, 0.3), (1, 1, 1)), ((0, 0, 0.5), (0, 0, 0))),
    ]  # fmt: skip
    expected = {
        "training_domains": (100, 0.45, 0.2),
        "cross_validation": (200, 0.7, 0.3),
        "oracle": (200, 0.6, 0.3),
        "oracle_checkpoint": (0, 0.9, 0.1),
    }
    assert expected.keys() == selection.RULES.keys()
    for rule, (step, validation, accuracy) in expected.items():
        for records in (found, found[::-1]):
            first = selection.choose(records, rule)[0]
            assert (first.test_domain, first.draw, first.step) == (0, 0, step)
            assert first.validation == pytest.approx(validation)
            assert first.accuracy == accuracy


def test_ties():
    found = [
        *run((0,), ((0.1, 1), (0, 0.5)), ((0.2, 1), (0, 0.5))),
        *run((0,), ((0.3, 1), (0, 0.5)), ((0.4, 1), (0, 0.5)), draw=2),
        *run((0,), ((0.5, 1), (0, 0.4)), draw=7),
    ]
    for records in (found, found[::-1]):
        first = selection.choose(records, "training_domains")[0]
        assert (first.draw, first.step, first.accuracy) == (2, 0, 0.3)


def test_what_lacks_is_told():
    one = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    found = [
        *run((0,), one), *run((0,), one, draw=1), *run((1, 0), one), *run((0, 2), one),
        *run((1,), one, trial=1),
    ]  # fmt: skip
    found = [found[0]._replace(test_domains=(0,)), *found[1:]]
    found = [one._replace(test_domains=tuple(sorted(one.test_domains))) for one in found]
    chosen = {
        (choice.test_domain, choice.trial): choice
        for choice in selection.choose(found, "cross_validation")
    }
    assert chosen[0, 0].draws == 1
    assert chosen[0, 0].accuracy == 0.5
    assert chosen[0, 0].missing == "runs with the test domains 0 and 1, 0 and 2 (draw 1)"
    assert chosen[1, 1][4:] == (
        None, None, None, None, 0,
        "runs with the test domains 0 and 1, 1 and 2 (draw 0); "
        "a run with the test domain 1 alone (draw 1)",
    )  # fmt: skip
    assert len(chosen) == 6
    other = [*run((0,), one), *(it._replace(step=50) for it in run((0, 1), one) + run((0, 2), one))]
    assert "a step at which" in selection.choose(other, "cross_validation")[0].missing

    (row,) = selection.rows(selection.choose(found, "training_domains"))
    assert [str(cell) for cell in row.cells] == ["50.0 +/- 0.0", "50.0 +/- 0.0", "X"]
    assert [cell.n for cell in row.cells] == [1, 1, 0]
    lacks = "a run with the test domain 0 alone (draws 0, 1)"
    assert row.cells[0].missing == f"domain 0, trial 1: {lacks}"
    assert str(row.average) == str(row.trials) == "X"
    assert "domain 2, trial 0" in row.average.missing


def test_trials_without_a_domain_are_in_no_average_of_trials():
    one = ((0.5, 0.5), (0.5, 0.5))
    better = ((0.7, 0.9), (0.5, 0.5))
    found = [*run((0,), one), *run((1,), one), *run((0,), better, trial=1)]
    (row,) = selection.rows(selection.choose(found, "oracle"))
    assert [*map(str, row.cells)] == ["60.0 +/- 7.1", "50.0 +/- 0.0"]
    assert (str(row.average), str(row.trials), row.trials.n) == ("55.0", "50.0 +/- 0.0", 1)


def test_records_that_cannot_be_taken():
    one = ((0.5, 0.5), (0.5, 0.5))
    (first,) = run((0,), one)
    assert selection.choose([first, first], "oracle")[0].accuracy == 0.5
    with pytest.raises(ConfigError, match=r"two records of step 0 .* draw 0, which differ"):
        selection.choose([first, first._replace(inside=(0.6, 0.5))], "oracle")
    with pytest.raises(ConfigError, match="did you mean oracle"):
        selection.choose([first], "oracel")
    three = first._replace(draw=1, inside=(0.5,) * 3, outside=(0.5,) * 3)
    with pytest.raises(ConfigError, match="PACS have 2 and 3 domains"):
        selection.choose([first, three], "oracle")
    with pytest.raises(
        ConfigError, match="tests on domain 2, but has accuracies of domains 0 to 1"
    ):
        selection.choose([first._replace(test_domains=(2,))], "oracle")
    assert selection.choose([], "oracle") == []

    args = {"dataset": "PACS", "algorithm": "ERM", "test_envs": [1, 0], "trial_seed": 0,
            "hparams_seed": 0}  # fmt: skip
    record = {"args": args, "step": 0, **{f"env{i}_{own}_acc": 0.5 for i in (0, 1)
                                         for own in ("in", "out")}}  # fmt: skip
    assert selection.checkpoints([record])[0].test_domains == (0, 1)
    with pytest.raises(ConfigError, match="Record 2 lacks 'trial_seed': give records as"):
        selection.checkpoints(
            [record, {**record, "args": {k: args[k] for k in args if k != "trial_seed"}}]
        )
    for value in (float("nan"), 55.0):
        with pytest.raises(ConfigError, match=f"has the accuracy {value}"):
            selection.checkpoints([{**record, "env1_in_acc": value}])
