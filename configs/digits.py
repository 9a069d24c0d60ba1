"""Digits (1,797 real 8x8 images that come along) with a small convolutional network: seconds a run.

    lpa-jax main --config=digits:method=lpa --workdir=runs/digits

Methods: erm, lpa, lpl, lpg, manifold_mixup, dropout, sam, any other transform by name, and several
joined by `+`; `smoke` for a run of seconds. Any number can be set, for example
`--config.perturbation.lpa.epsilon=0.1`.

Published: nothing; the papers do not use this set.
Measured test error % and NLL of the last epoch, ten seeds, 359 images, default settings:

    erm             0.81 ± 0.28   0.026
    lpa             0.86 ± 0.28   0.023
    lpl             0.70 ± 0.15   0.024
    lpg             1.09 ± 0.46   0.048
    lpa+lpl         0.86 ± 0.33   0.023
    manifold_mixup  1.09 ± 0.24   0.121
    dropout         0.61 ± 0.29   0.026
    sam             0.75 ± 0.26   0.025
    label_smoothing 0.67 ± 0.19   0.140
    mixup           0.81 ± 0.28   0.120
"""

from lpa_jax.training import config as configuration
from lpa_jax.training import method_config

SMOKE = {
    "epochs": 2,
    "model.options": {"width": 4},
    "schedule.boundaries": (1.0,),
}


def get_config(argument=""):
    """Return the configuration that `argument`, `"method=NAME,smoke"`, asks for."""
    config = configuration.default()
    config.dataset = "digits"
    config.augment = "crop=1"
    config.model.name = "small_cnn"
    config.schedule.update({"name": "cosine", "learning_rate": 0.1})
    config.epochs = 30
    config.batch_size = 64
    return method_config.choose(config, argument, SMOKE, "digits")
