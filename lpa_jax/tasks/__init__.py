"""What labels mean: targets, losses, class statistics, metrics, and which metric selects."""

from lpa_jax.registry import Registry
from lpa_jax.tasks.classification import Classification as Classification
from lpa_jax.tasks.classification import classification as classification
from lpa_jax.tasks.task import Metric as Metric
from lpa_jax.tasks.task import Task as Task

TASKS: Registry[Task] = Registry("task", {"classification": classification}, Task)
"""Tasks by name. A task is one object; `"package.module:OBJECT"` names one of your own."""
