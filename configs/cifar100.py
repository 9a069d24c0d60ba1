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
Published test error %, CIFAR-100-LT at ratios 100 and 10, in the LPL paper: LDAM-DRW 57.11,
41.22; logit adjustment 56.11, 41.66; LPL 55.75, 39.03. That set (10,847 and 19,573 images) is
`--config.imbalance.kind=exponential --config.imbalance.ratio=100 --config.validation_fraction=0`;
its usual network `--config.model.name=resnet_32`; the 27 head classes of LPL's code
`--config.perturbation.lpl.split.name=tail --config.perturbation.lpl.split.num_head=27`.

Measured: not yet; a run of 200 epochs needs a GPU.
"""

from lpa_jax.training import config as configuration

METHODS = {
    "sam": {"rho": 0.1},
    "asam": {"rho": 1.0},
    "cutout": {"size": 8.0},
    "elr": {"strength": 7.0, "beta": 0.9},
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
    return configuration.choose(config, argument, SMOKE, METHODS)
