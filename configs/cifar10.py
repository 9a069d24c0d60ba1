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
Published test error %, CIFAR-10-LT at ratios 100 and 10, in the LPL paper: LDAM-DRW 21.88, 11.63;
logit adjustment 22.33, 11.07; LPL 22.05, 10.59. That set (12,406 and 20,431 images) is
`--config.imbalance.kind=exponential --config.imbalance.ratio=100 --config.validation_fraction=0`;
its usual network `--config.model.name=resnet_32`; the four head classes of LPL's code
`--config.perturbation.lpl.split.name=tail --config.perturbation.lpl.split.num_head=4`;
LDAM-DRW is `method=ldam+drw`, class-balanced CE `method=reweight`, which with
`--config.loss.name=softmax_focal_loss` is class-balanced focal loss.
Asymmetric label noise knows CIFAR-10 by its names: an npz file needs `class_names` for that.

Measured: not yet; a run of 200 epochs needs a GPU.
"""

from lpa_jax.training import config as configuration

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
    return configuration.choose(config, argument, SMOKE, {})
