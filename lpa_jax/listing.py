"""All that has a name: what `--list` prints."""

from collections.abc import Iterable


def everything() -> str:
    """Return the names of methods, networks, data sets, tasks, tables, writers, configurations."""
    from lpa_jax import configs, models
    from lpa_jax.data import READERS
    from lpa_jax.methods import METHODS
    from lpa_jax.tables.catalogue import TABLES
    from lpa_jax.tables.domain_algorithms import ALGORITHMS
    from lpa_jax.tables.domain_catalogue import DOMAIN_TABLES, PRESETS
    from lpa_jax.tasks import TASKS
    from lpa_jax.training.writers import WRITERS

    kinds: dict[str, Iterable[str]] = {
        "methods (method=NAME, several joined by +)": ("erm", *METHODS),
        "networks (config.model.name)": (models.network_names(),),
        "data sets (config.dataset)": (*READERS, "names of tensorflow-datasets"),
        "tasks (config.task)": TASKS,
        "tables (--table)": TABLES,
        "tables of domains (--table)": DOMAIN_TABLES,
        "their protocols (--preset)": PRESETS,
        "their algorithms (--methods, several joined by +)": ALGORITHMS,
        "writers (config.writers)": WRITERS,
        "configurations (--config)": configs.FILES,
    }
    told = "package.module:NAME names one of your own, except for methods: register those."
    return "\n".join([*(f"{kind}: {', '.join(names)}" for kind, names in kinds.items()), told])
