"""A trained model as one safetensors file: numbers and a description, nothing that could run.

Owns the file's format: the model's tensors under their names (`encoder.*`, `heads.<task>.*`) and
the experiment and the description of its data as JSON in its metadata; or the encoder's alone under timm's names, which
`model.weights` reads. Optimiser and policy stay in the checkpoint. No Ray.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repmtl_ray import storage
from repmtl_ray.config import Experiment, from_dict, to_dict
from repmtl_ray.data.description import DataDescription
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.encoders import check_tensors
from repmtl_ray.runs import checkpoint

METADATA_KEY = "experiment"
DATA_KEY = "data"


def export_model(directory: str | Path, out: Path, *, encoder_only: bool = False) -> Experiment:
    """Writes the model of a checkpoint.

    Args:
        directory: of the checkpoint, path or URI.
        out: the file; one that exists is refused.
        encoder_only: without heads, under timm's names.

    Returns:
        What the model was trained as.

    Raises:
        ValueError: no whole checkpoint, a file that exists, or one that cannot be written.
    """
    with storage.explained(str(out)):
        exists = out.exists()
    if exists:
        raise ValueError(f"{out} exists already; name another file, or remove it.")
    storage.check_writable(str(out.absolute().parent))
    experiment, data = checkpoint.read_experiment(directory), checkpoint.read_description(directory)
    tensors = checkpoint.read_state(directory)["model"]
    if encoder_only:
        prefix = "encoder."
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    draft = out.with_name(out.name + ".partial")
    try:
        metadata = {
            METADATA_KEY: json.dumps(to_dict(experiment)),
            DATA_KEY: json.dumps(to_dict(data)),
        }
        save_file(tensors, draft, metadata=metadata)
        draft.replace(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):  # the error of the write is the one to show
            draft.unlink()
    return experiment


def read_exported_description(path: Path) -> DataDescription:
    """What the data of an exported model were: tasks, image size and normalisation.

    Raises:
        ValueError: as `import_model`.
    """
    metadata, _ = _read(path)
    experiment = from_dict(Experiment, json.loads(metadata[METADATA_KEY]))
    return _description(path, metadata, experiment)


def import_model(path: Path) -> tuple[MultiTaskModel, Experiment]:
    """The model of an exported file, in eval mode, on the CPU.

    Raises:
        ValueError: not such a file, or tensors that do not fit the experiment that it names.
    """
    metadata, tensors = _read(path)
    no_model = f"{path} holds no model of this version"
    try:
        experiment = from_dict(Experiment, json.loads(metadata[METADATA_KEY]))
        model = checkpoint.build_stored_model(experiment, _description(path, metadata, experiment))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{no_model}: {checkpoint.brief(error)}.") from error
    check_tensors(str(path), tensors, model.state_dict())
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{no_model}: {checkpoint.brief(error)}. "
            "A file with the encoder alone is for model.weights."
        ) from error
    return model.eval(), experiment


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}).") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} names no experiment; it was not exported by this project.")
    return metadata, tensors


def _description(path: Path, metadata: dict[str, str], experiment: Experiment) -> DataDescription:
    if DATA_KEY not in metadata:
        return checkpoint.missing_description(str(path), experiment)
    return checkpoint.description_from(metadata[DATA_KEY], str(path))
