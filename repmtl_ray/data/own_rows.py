"""A few rows of the user's own data from Parquet files, for looking at a trained model without Ray.

Owns reading the files that `Dataset.write_parquet` leaves, by the description that is stored with
the model. Training reads Ray Datasets (`custom`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from repmtl_ray.data import arrow_arrays
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.description import DataDescription, tasks_of
from repmtl_ray.data.stream import Sample, Stream
from repmtl_ray.data.validation import sample_problems

NAME = "custom"


def open_own_rows(path: str | Path, data: DataDescription, num_rows: int) -> Stream:
    """The first rows of Parquet files as a stream; all are read and checked.

    Args:
        path: a file, or a folder of files.
        data: what a model was trained on; the rows must have its image size.
        num_rows: at most.

    Raises:
        ValueError: no such files, columns that are missing, or rows that are not as they should be.
    """
    tasks = tasks_of(data)
    kinds = {task.name: task.kind for task in tasks}
    num_classes = {task.name: task.num_outputs for task in tasks if hasattr(task, "num_classes")}
    try:
        files = pyarrow.dataset.dataset(str(Path(path).expanduser()), format="parquet")
        missing = sorted({IMAGE, *kinds} - set(files.schema.names))
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(files.schema.names)}."
            )
        table = files.head(num_rows, columns=[IMAGE, *kinds]).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet files ({str(error).partition(chr(10))[0]}); write the rows with "
            "Dataset.write_parquet(folder), and give the folder."
        ) from error
    samples = [_sample(table, row, str(path)) for row in range(table.num_rows)]
    for row, sample in enumerate(samples):
        problems = sample_problems(sample, kinds, num_classes)
        if data.image_size is not None and sample[IMAGE].shape[:2] != data.image_size:
            height, width = data.image_size
            problems = [*problems, f"image: the model was trained on {height} x {width}"]
        if problems:
            raise ValueError(f"{path}, row {row}: {'; '.join(problems)}")
    if not samples:
        raise ValueError(f"{path} has no rows.")
    return Stream(
        name=NAME,
        kinds=kinds,
        num_samples=len(samples),
        load=samples.__getitem__,
        normalize=data.normalize,
    )


def _sample(table: Any, row: int, where: str) -> Sample:
    sample: Sample = {SAMPLE_ID: np.asarray(row, dtype=np.int64)}
    for field in table.schema:
        value = table.column(field.name).slice(row, 1).combine_chunks()
        label = f"{where}, row {row}, column {field.name}"
        values = arrow_arrays.to_numpy(value, field, label)
        is_scalar = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        sample[field.name] = values.reshape(()) if is_scalar else values
    return sample
