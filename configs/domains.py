"""Domain generalization: learn from some domains, and be judged on another, as in DomainBed.

    lpa-jax main --config=domains:method=coral --workdir=runs/domains

The digits, rotated by 0 to 75 degrees, with a small convolutional network: seconds a run. The test
domain is 75; another by `--config.test_domains="('0',)"`. Image files of yours, as
`PATH/DOMAIN/CLASS/IMAGE`, by `--config.dataset=domains:PATH`. Each batch has equally many images of
each domain that is learned from, and the accuracies on the *in* and *out* splits of every domain
are in `metrics.jsonl`. `lpa-jax table --table=rotated_digits` compares the methods
over all test domains; docs/domains.md has the protocol.

Methods: erm, lpa, lpl, coral, mmd, dann, irm, vrex, group_dro, rsc, mixstyle, domain_mixup,
manifold_mixup, any other transform by name, and several joined by `+`; `smoke` for a run of
seconds.

Published: nothing on this set. Measured: see docs/domains.md.
"""

from lpa_jax.training import config as configuration
from lpa_jax.training import method_config

SMOKE = {
    "epochs": 2,
    "steps_per_epoch": 2,
    "model.options": {"width": 4},
}


def get_config(argument=""):
    """Return the configuration that `argument`, `"method=NAME,smoke"`, asks for."""
    config = configuration.default()
    config.dataset, config.test_domains = "rotated:digits", ("75",)
    config.augment = "none"
    config.model.name = "small_cnn"
    config.sampling = "domains"
    config.optimizer.name, config.optimizer.weight_decay = "adam", 0.0
    config.schedule.update({"name": "constant", "learning_rate": 1e-3})
    config.batch_size = 160
    config.epochs, config.steps_per_epoch = 10, 30
    return method_config.choose(config, argument, SMOKE, "digits")
