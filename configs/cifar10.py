r"""CIFAR-10 with WRN-28-10 and the papers' schedule.

    python -m lpa_jax.main --config=configs/cifar10.py:method=lpa --workdir=runs/cifar10 \
        --config.dataset=npz:cifar10.npz

The set is a prepared tensorflow-datasets one (the default; `--config.data_dir=DIR`) or an npz file
with `x_train, y_train, x_test, y_test`. Methods: erm, lpa, lpl, lpg, manifold_mixup, dropout, sam,
any other transform by name, and several joined by `+`, such as `lpa+lpl+lpg`; `smoke` for a run of
seconds. Any number can be set, for example `--config.perturbation.lpa.epsilon=0.1`; the LPA paper's
other network is `--config.model.name=resnet_110`.

Published test error %, WRN-28-10, 200 epochs:
cross-entropy 3.89, label smoothing 3.82, mixup 3.56, dropout 3.52, DropBlock 3.48, Manifold Mixup
3.38, LPL 3.28, LPA 3.06 (varied bound) and 3.18 (fixed) in the LPA paper; cross-entropy 3.82, LPL
3.37 in the LPL paper; cross-entropy 3.99, mixup 2.92, Manifold Mixup 2.55 in Manifold Mixup's.

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
    "sam": {"rho": 0.05},
    "asam": {"rho": 0.5},
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
    config.dataset = "cifar10"
    return configuration.choose(config, argument, METHODS, SMOKE)
