"""Examples to learn from: where they come from, their batches and their augmentation."""

from lpa_jax.data.augmentation import augment as augment
from lpa_jax.data.augmentation import random_crop as random_crop
from lpa_jax.data.augmentation import random_flip as random_flip
from lpa_jax.data.augmentation import to_float as to_float
from lpa_jax.data.batching import class_aware_order as class_aware_order
from lpa_jax.data.batching import class_balanced_order as class_balanced_order
from lpa_jax.data.batching import epoch_order as epoch_order
from lpa_jax.data.batching import eval_batches as eval_batches
from lpa_jax.data.batching import train_batches as train_batches
from lpa_jax.data.examples import DataError as DataError
from lpa_jax.data.examples import Examples as Examples
from lpa_jax.data.examples import missing_classes as missing_classes
from lpa_jax.data.long_tail import class_groups as class_groups
from lpa_jax.data.long_tail import long_tail_counts as long_tail_counts
from lpa_jax.data.long_tail import long_tail_subset as long_tail_subset
from lpa_jax.data.sources import Dataset as Dataset
from lpa_jax.data.sources import load as load
from lpa_jax.data.tasks import groups_of as groups_of
from lpa_jax.data.tasks import limited as limited
from lpa_jax.data.tasks import make_task as make_task
from lpa_jax.data.tasks import noise_rates as noise_rates
from lpa_jax.data.tasks import task_labels as task_labels
