"""The command line that decodes images once: `python -m lpa_jax.pack --config.dataset=folder:x`."""

import pathlib
from typing import Any

# First: it says what is not installed.
from lpa_jax import commands

# isort: split
from absl import flags

from lpa_jax.commands import PRINT_CONFIG, sentences, UsageError

flags.adopt_module_key_flags(commands)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory to make; packed:DIRECTORY is then a data set.", allow_override=True
)
KEYS = ("dataset", "data_dir", "image_size", "image_part", "data_seed")
"""Keys of a configuration that say what is packed."""
_changes: dict[str, Any] = {}


def _check() -> None:
    if PRINT_CONFIG.value:
        return
    if not _OUTPUT.value or "dataset" not in _changes:
        raise UsageError(
            "Say what to pack, and where to, for example --config.dataset=folder:photos "
            "--config.image_size=224 --output=photos_224."
        )
    if unknown := sorted({*_changes} - {*KEYS}):
        raise UsageError(
            f"config.{unknown[0]} does not change what is packed: leave it out; the keys are "
            f"{', '.join(KEYS)}."
        )


def _parse(argv: list[str]) -> list[str]:
    return commands.parse_with_changes(argv, _changes, _check)


def _main(_: list[str]) -> None:
    with sentences("stopped; nothing is kept."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from rich.console import Console
        from rich.progress import track

        from lpa_jax import data
        from lpa_jax.data import packed
        from lpa_jax.training import config as configuration

        config = configuration.default()
        config.update_from_flattened_dict(_changes)
        if PRINT_CONFIG.value:
            print(configuration.describe(config))
            return
        configuration.check(config)
        dataset = data.load(
            config.dataset,
            data_dir=config.data_dir,
            validation_fraction=0.0,
            seed=config.data_seed,
            image_size=config.image_size,
            image_part=config.image_part,
        )
        directory = pathlib.Path(str(_OUTPUT.value))
        count = sum(map(len, dataset.splits.values()))
        shown = iter(track(range(count), "packing", console=Console(stderr=True)))

        def finished(number: int) -> None:
            for _ in range(number):
                next(shown)

        packed.write(dataset, directory, finished)
        sizes = ", ".join(f"{name} {len(split)}" for name, split in dataset.splits.items())
        print(f"{count} images ({sizes}) are in {directory}: --config.dataset=packed:{directory}")


if __name__ == "__main__":
    commands.run(_main, _parse)
