"""A trained network as one file that needs no code of this package."""

from collections.abc import Sequence
import pathlib

import jax
from jax import export as jax_export
import jax.numpy as jnp

from lpa_jax.training import files
from lpa_jax.training.run import Run

PLATFORMS = ("cpu", "cuda", "tpu")


def export(run: Run, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Return the function from inputs to logits, with its parameters, as `jax.export` writes it.

    `jax.export.deserialize(bytes).call(inputs)` runs it, on each of the platforms, with any number
    of inputs like those of the data set: uint8 images, or floats.

    Args:
      run: From `load_run`.
      platforms: What it can run on.

    Raises:
      ValueError: If JAX cannot export the network.
    """
    train = run.dataset.train.images
    shape = ", ".join(["batch", *map(str, train.shape[1:])])
    inputs = jax.ShapeDtypeStruct(jax_export.symbolic_shape(shape), train.dtype)
    # On one device, whatever the variables were restored to.
    variables = jax.tree.map(jnp.asarray, jax.device_get(run.variables))
    function = jax.jit(lambda images: run._replace(variables=variables).logits(images))
    return bytes(jax_export.export(function, platforms=tuple(platforms))(inputs).serialize())


def export_run(run: Run, directory: pathlib.Path) -> pathlib.Path:
    """Write `network.jaxexport`, and `network.json`, which tells what goes in and comes out.

    Returns:
      The path of the first.

    Raises:
      WriteError: If the directory takes no more.
    """
    exported = export(run)
    path = directory / "network.jaxexport"
    shape = run.dataset.train.images.shape[1:]
    about = {
        "inputs": {
            "shape": ["batch", *shape],
            "dtype": str(run.dataset.train.images.dtype),
            "range": "as in training; uint8 from 0 to 255, normalized inside of the function",
        },
        "class_names": run.dataset.class_names,
        "seed": run.seed,
        "step": run.step,
        "jax": jax.__version__,
        "config": run.config,
    }
    with files.writing(str(path)):
        directory.mkdir(parents=True, exist_ok=True)
        path.write_bytes(exported)
        files.write_json(path.with_suffix(".json"), about)
    return path
