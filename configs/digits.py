"""Digits (1,797 real 8x8 images that come along) with a small convolutional network: seconds a run.

    lpa-jax main --config=digits:method=lpa --workdir=runs/digits

Methods: erm, lpa, lpl, lpg, manifold_mixup, dropout, sam, any other transform by name, and several
joined by `+`; `smoke` for a run of seconds. Any number can be set, for example
`--config.perturbation.lpa.epsilon=0.1`.

Published: nothing; the papers do not use this set.
Measured test accuracy % and NLL of the last epoch, 5 seeds, 359 images, with former code (see
docs/results.md):

    erm             99.39 ± 0.36   0.024 ± 0.005
    lpa             99.39 ± 0.23   0.023 ± 0.006
    lpl             99.22 ± 0.23   0.024 ± 0.005
    lpg             98.94 ± 0.36   0.051 ± 0.021
    lpa+lpl         99.50 ± 0.23   0.021 ± 0.003
    lpa+lpl+lpg     99.11 ± 0.36   0.061 ± 0.017
    manifold_mixup  99.11 ± 0.23   0.123 ± 0.007
    dropout         99.22 ± 0.41   0.024 ± 0.003
    sam             99.44 ± 0.20   0.024 ± 0.003
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
