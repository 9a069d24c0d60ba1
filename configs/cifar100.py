r"""CIFAR-100 with WRN-28-10 and the papers' schedule.

    lpa-jax main --config=cifar100:method=lpa --workdir=runs/cifar100 \
        --config.dataset=npz:cifar100.npz

The set is a prepared tensorflow-datasets one (the default; `--config.data_dir=DIR`) or an npz file
with `x_train, y_train, x_test, y_test`. Methods: erm, lpa, lpl, lpg, manifold_mixup, dropout, sam,
any other transform by name, and several joined by `+`, such as `lpa+lpl+lpg`; `smoke` for a run of
seconds. Any number can be set, for example `--config.perturbation.lpa.epsilon=0.1`; the LPA paper's
other network is `--config.model.name=resnet_110`.

Published test errors are beside measured ones in the tables of
`python -m lpa_jax.table --table=cifar100` and, for long tails of ratio 100 and 10, of
`--table=cifar100_lt` and `--table=cifar100_lt10`, with the paper, the form of the method and the
protocol.
The long tails (10,847 and 19,573 images) are `--config.imbalance.kind=exponential
--config.imbalance.ratio=100 --config.validation_fraction=0`; their usual network is
`--config.model.name=resnet_32`. The 27 head classes and the numbers of steps of LPL's code are
`--config.perturbation.lpl.split.name=tail --config.perturbation.lpl.split.num_head=27
--config.perturbation.lpl.split.head_scale=0.2 --config.perturbation.lpl.solver=rounded_steps
--config.perturbation.lpl.step_size=0.15 --config.perturbation.lpl.epsilon=0
--config.perturbation.lpl.delta_epsilon=1.5`.
LDAM-DRW is `method=ldam+drw`.

Measured: not yet; a run of 200 epochs needs a GPU.
"""

from lpa_jax.training import config as configuration
from lpa_jax.training import method_config

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
    return method_config.choose(config, argument, SMOKE, "cifar100")
