"""Writes a small tensorflow-datasets set as ArrayRecord, without TensorFlow."""

import io
import pathlib

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds


def write_tfds(
    data_dir,
    name,
    images_train,
    labels_train,
    images_test,
    labels_test,
    *,
    version="1.0.0",
    splits=("train", "test"),
):
    """Write images and labels where `lpa_jax.data.load(name, data_dir=data_dir)` finds them.

    Args:
      data_dir: A folder.
      name: A name in snake case.
      images_train: uint8 [N, H, W, C], or a list of [H, W, C] that differ in size.
      labels_train: Integer [N], from 0.
      images_test: Like images_train.
      labels_test: Like labels_train.
      version: Of the set; one that tensorflow-datasets itself has must match its own.
      splits: What to call the two parts.

    Returns:
      The folder of the set.
    """
    shape = images_train.shape[1:] if isinstance(images_train, np.ndarray) else (None, None, 3)
    features = {
        "image": tfds.features.Image(shape=shape, encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=1 + int(max(labels_train))),
    }
    examples = {
        split: [
            {"image": png(image), "label": int(label)}
            for image, label in zip(images, labels, strict=True)
        ]
        for split, images, labels in zip(
            splits, (images_train, images_test), (labels_train, labels_test), strict=True
        )
    }
    return write_examples(data_dir, name, features, examples, version=version)


def write_examples(data_dir, name, features, examples, *, version="1.0.0"):
    """Write any features; `examples` maps splits to lists of dictionaries."""
    folder = pathlib.Path(data_dir) / name / version
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=1000, file_format="array_record"
    )
    writer.initialize_splits(list(examples))
    writer.add_examples(examples)
    writer.close_all()
    return folder


def png(image):
    """Return the bytes of a PNG file."""
    # From bytes: to encode an array, tensorflow-datasets calls TensorFlow.
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()
