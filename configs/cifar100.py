r"""CIFAR-100 with WRN-28-10 and the papers' schedule.

    python -m lpa_jax.main --config=configs/cifar100.py:method=lpa --workdir=runs/cifar100 \
        --config.dataset=npz:cifar100.npz

The set is a prepared tensorflow-datasets one (the default; `--config.data_dir=DIR`) or an npz file
with `x_train, y_train, x_test, y_test`. Methods: erm, lpa, lpl, lpg, manifold_mixup, dropout, sam,
any other transform by name, and several joined by `+`, such as `lpa+lpl+lpg`; `smoke` for a run of
seconds. Any number can be set, for example `--config.perturbation.lpa.epsilon=0.1`; the LPA paper's
other network is `--config.model.name=resnet_110`.

Published test error %, WRN-28-10, 200 epochs:
cross-entropy 18.85, label smoothing 18.40, mixup 17.82, dropout 18.12, DropBlock 17.95, Manifold
Mixup 17.65, LPL 17.08, LPA 16.48 (varied bound) and 16.72 (fixed), LPA+LPL 16.05 in the LPA paper;
cross-entropy 18.53, LPL 17.61 in the LPL paper.

Measured: not yet; a run of 200 epochs needs a GPU.
"""

from lpa_jax.training import config as configuration

METHODS = {
    "lpa": {"site": "group3", "epsilon": 0.1, "radius": "relative"},
    "lpl": {"epsilon": 0.4},
    "lpg": {"epsilon": 0.1},
    "manifold_mixup": {"sites": ("inputs", "group1", "group2"), "alpha": 2.0},
    "mixup": {"alpha": 1.0},
    "dropout": {"site": "group3", "rate": 0.3},
    "dropblock": {"site": "group3", "rate": 0.1, "block_size": 3},
    "gaussian_noise": {"site": "inputs", "stddev": 0.05},
    "adversarial": {"site": "inputs", "epsilon": 8 / 255, "bounds": (0.0, 1.0)},
    "label_smoothing": {"alpha": 0.1},
    "disturb_label": {"rate": 0.1},
    "ldam": {"scale": 1.0},
    "sam": {"rho": 0.1},
    "asam": {"rho": 1.0},
}
SMOKE = {
    "model.name": "wrn_10_1",
    "limit": 1024,
    "epochs": 1,
    "batch_size": 64,
    "schedule.boundaries": (),
}


def get_config(argument=""):
    """Return the configuration that `argument`, `"method=NAME,smoke"`, asks for."""
    config = configuration.default()
    config.dataset = "cifar100"
    return configuration.choose(config, argument, METHODS, SMOKE)
