"""A trained model as one safetensors file: numbers and a description, nothing that could run.

Owns the file's format: the model's tensors under their names (`encoder.*`, `heads.<task>.*`) and
the experiment as JSON in its metadata; or the encoder's alone under timm's names, which
`model.weights` reads. Optimiser and policy stay in the checkpoint. No Ray.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repmtl_ray import storage
from repmtl_ray.config import Experiment, from_dict, replace, to_dict
from repmtl_ray.data.sources import image_size
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.models.encoders import check_tensors
from repmtl_ray.runs import checkpoint, loop

METADATA_KEY = "experiment"


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
    if out.exists():
        raise ValueError(f"{out} exists already; name another file, or remove it.")
    storage.check_writable(str(out.absolute().parent))
    experiment = checkpoint.read_experiment(directory)
    tensors = checkpoint.read_state(directory)["model"]
    if encoder_only:
        prefix = "encoder."
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    draft = out.with_name(out.name + ".partial")
    try:
        save_file(tensors, draft, metadata={METADATA_KEY: json.dumps(to_dict(experiment))})
        draft.replace(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):  # the error of the write is the one to show
            draft.unlink()
    return experiment


def import_model(path: Path) -> tuple[MultiTaskModel, Experiment]:
    """The model of an exported file, in eval mode, on the CPU.

    Raises:
        ValueError: not such a file, or tensors that do not fit the experiment that it names.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}).") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} names no experiment; it was not exported by this project.")
    no_model = f"{path} holds no model of this version"
    try:
        experiment = from_dict(Experiment, json.loads(metadata[METADATA_KEY]))
        tasks = loop.selected_tasks(experiment)
        own = replace(experiment, {"model.pretrained": False, "model.weights": None}).model
        size = image_size(experiment.data)
        model = build_model(own, tasks, image_size=size, penalized=False)
        model = model.to(loop.DTYPES[experiment.precision])
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
