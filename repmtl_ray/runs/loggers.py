"""The numbers of a run for TensorBoard, MLflow, Weights & Biases, and as CSV files.

Owns the four writers by name. Each is a callback (`callbacks.py`) whose first worker writes: every
`every` steps the losses, penalties, gradient norm and samples per second of the step; after every
epoch its metrics, and pictures of predictions if they are asked for; and the experiment at the start.
A run that is continued goes on in the same place, and what was written of steps that are trained again
is replaced, as far as the place can do that.

The libraries are the extra `loggers` and are imported when a run starts. Imports no Ray.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmtl_ray import extras, storage
from repmtl_ray.config import nearest, to_dict
from repmtl_ray.conversion import shown
from repmtl_ray.runs.callbacks import Callback, RunContext, StepInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from repmtl_ray.runs.pictures import LoggedPictures

EVERY_STEPS = 10
FOLDER = "logs"
"""In the folder of the run."""
PROJECT = "repmtl_ray"
"""Of MLflow's experiment and of the project at Weights & Biases, if the environment names none."""
LIBRARIES = {"csv": "", "tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""By name of a writer, the module that it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The numbers of a step or of an epoch.

    Args:
        global_step: steps of the run so far.
        values: by name.
        pictures: of an epoch's predictions, [height, width, 3], by name.
    """

    global_step: int
    values: Mapping[str, float]
    pictures: Mapping[str, NDArray[np.uint8]] = dataclasses.field(default_factory=dict)


class RunLogger(Callback):
    """What the writers share; a subclass opens its place, writes numbers and closes it.

    Args:
        every: steps between two that are written; 0 writes epochs alone.
        images: evaluation samples whose predictions are written as pictures after every epoch.
    """

    def __init__(self, *, every: int = EVERY_STEPS, images: int = 0) -> None:
        self._every, self._images = every, images
        self._pictures: LoggedPictures | None = None
        self._writes = False
        self._num_workers = 1

    def on_run_start(self, context: RunContext) -> None:
        self._writes = context.workers.rank == 0
        self._num_workers = context.workers.size
        if self._images:  # on every worker, so that all refuse the same run
            from repmtl_ray.runs.pictures import LoggedPictures

            self._pictures = LoggedPictures(context, self._images)
        if self._writes:
            self.open(context)

    def on_step_end(self, step: StepInfo) -> None:
        if self._writes and self._every and step.global_step % self._every == 0:
            samples_per_s = step.num_samples * self._num_workers / max(step.seconds, 1e-9)
            values = {**step.metrics, "samples_per_s": samples_per_s}
            self.write_step(Step(global_step=step.global_step, values=values))

    def on_epoch_end(self, metrics: Mapping[str, float]) -> None:
        if self._writes:
            drawn = {} if self._pictures is None else self._pictures.draw()
            pictures = {f"{task}/predictions": picture for task, picture in drawn.items()}
            global_step = int(metrics["global_step"])
            self.write_epoch(Step(global_step=global_step, values=metrics, pictures=pictures))

    def on_run_end(self, error: BaseException | None) -> None:
        if self._writes:
            self._writes = False
            self.close(error)

    def open(self, context: RunContext) -> None:
        """Opens the place, or opens it again where the run continues."""
        raise NotImplementedError

    def write_step(self, step: Step) -> None:
        """Writes the numbers of a step."""
        raise NotImplementedError

    def write_epoch(self, epoch: Step) -> None:
        """Writes the metrics of an epoch, and its pictures."""
        raise NotImplementedError

    def close(self, error: BaseException | None) -> None:
        """Closes the place.

        Args:
            error: why the run ended before its last epoch, or None.
        """
        raise NotImplementedError


class CsvLogger(RunLogger):
    """`logs/steps.csv` and `logs/epochs.csv`, whose columns are those of the first row.

    Pictures are PNG files in `logs/pictures`, with the number of steps in their names.
    """

    def open(self, context: RunContext) -> None:
        folder = log_folder(context.folder)
        self._folder = folder
        done = context.progress.global_step
        self._files = {name: folder / f"{name}.csv" for name in ("steps", "epochs")}
        for path in self._files.values():
            if path.exists():  # what is trained again is written again
                rows = list(csv.reader(path.read_text().splitlines()))
                kept = [row for row in rows[1:] if int(float(row[0])) <= done]
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows([*rows[:1], *kept] if kept else [])

    def write_step(self, step: Step) -> None:
        self._append("steps", step)

    def write_epoch(self, epoch: Step) -> None:
        self._append("epochs", epoch)
        for name, picture in epoch.pictures.items():
            from PIL import Image

            path = (
                self._folder / "pictures" / f"{name.replace('/', '.')}.{epoch.global_step:06}.png"
            )
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)

    def close(self, error: BaseException | None) -> None:
        """Nothing is open between two rows."""

    def _append(self, name: str, step: Step) -> None:
        path = self._files[name]
        values = {name: value for name, value in step.values.items() if name != "global_step"}
        is_new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["global_step", *values])
            writer.writerow([step.global_step, *values.values()])


class TensorBoardLogger(RunLogger):
    """Event files in `logs/tensorboard`; look with `tensorboard --logdir FOLDER`."""

    def open(self, context: RunContext) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = log_folder(context.folder) / "tensorboard"
        done = context.progress.global_step
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        lines = [f"    {line}" for line in flat(to_dict(context.experiment)).items()]
        self._writer.add_text("experiment", "\n".join(map(str, lines)), done)

    def write_step(self, step: Step) -> None:
        for name, value in step.values.items():
            self._writer.add_scalar(f"step/{name}", value, step.global_step)

    def write_epoch(self, epoch: Step) -> None:
        for name, value in epoch.values.items():
            if name != "global_step":
                self._writer.add_scalar(name, value, epoch.global_step)
        for name, picture in epoch.pictures.items():
            self._writer.add_image(name, picture, epoch.global_step, dataformats="HWC")
        self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        self._writer.close()


class MlflowLogger(RunLogger):
    """A run at the server of MLFLOW_TRACKING_URI, or in `logs/mlruns` without one.

    A continued run is the same run of MLflow; steps that are trained again stand in it twice.
    """

    def open(self, context: RunContext) -> None:
        from mlflow.tracking import MlflowClient

        folder = log_folder(context.folder)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(server or f"sqlite:///{folder}/mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:  # without a server, pictures would go to the process's working folder
            place = None if server else (folder / "mlartifacts").absolute().as_uri()
            experiment = self._client.create_experiment(name, artifact_location=place)
        else:
            experiment = found.experiment_id
        kept = folder / "mlflow_run_id"
        if kept.exists():
            self._run = kept.read_text()
            self._client.set_terminated(self._run, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=context.folder.rpartition("/")[2])
        self._run = made.info.run_id
        kept.write_text(self._run)
        for key, value in flat(to_dict(context.experiment)).items():
            self._client.log_param(self._run, key, value)

    def write_step(self, step: Step) -> None:
        self._write({f"step/{name}": value for name, value in step.values.items()}, step)

    def write_epoch(self, epoch: Step) -> None:
        self._write(epoch.values, epoch)
        for name, picture in epoch.pictures.items():
            # Some versions of the library cannot give back a picture with a slash in its name.
            key = name.replace("/", ".")
            self._client.log_image(self._run, picture, key=key, step=epoch.global_step)

    def close(self, error: BaseException | None) -> None:
        stopped = "KILLED" if isinstance(error, GeneratorExit) else "FAILED"
        self._client.set_terminated(self._run, status="FINISHED" if error is None else stopped)

    def _write(self, values: Mapping[str, float], step: Step) -> None:
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, float(v), now, step.global_step) for name, v in values.items()]
        self._client.log_batch(self._run, metrics=metrics)


class WandbLogger(RunLogger):
    """A run at Weights & Biases; WANDB_MODE=offline keeps it in `logs/wandb` for `wandb sync`.

    A continued run is the same run of Weights & Biases.
    """

    def open(self, context: RunContext) -> None:
        import wandb

        folder = log_folder(context.folder)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=context.folder.rpartition("/")[2] or None,
            id=hashlib.sha256(context.folder.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=to_dict(context.experiment),
            reinit="create_new",
        )
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def write_step(self, step: Step) -> None:
        values = {f"step/{name}": value for name, value in step.values.items()}
        self._run.log({**values, "global_step": step.global_step})

    def write_epoch(self, epoch: Step) -> None:
        import wandb

        pictures = {name: wandb.Image(picture) for name, picture in epoch.pictures.items()}
        self._run.log({**epoch.values, **pictures, "global_step": epoch.global_step})

    def close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


LOGGERS: dict[str, type[RunLogger]] = {
    "csv": CsvLogger,
    "tensorboard": TensorBoardLogger,
    "mlflow": MlflowLogger,
    "wandb": WandbLogger,
}


def make_loggers(
    names: Sequence[str], *, every: int = EVERY_STEPS, images: int = 0
) -> list[Callback]:
    """The writers of these names.

    Args:
        names: of `LOGGERS`; a name that is given twice counts once.
        every: steps between two that are written; 0 writes epochs alone.
        images: evaluation samples whose predictions are written as pictures after every epoch.

    Raises:
        ValueError: an unknown name, or a library that is not installed.
    """
    if images:
        extras.require("log_images", "report", "matplotlib", "PIL")
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"log {name!r}: {nearest(name, LOGGERS)}")
        library = LIBRARIES[name]
        if library:
            extras.require(f"log {name!r}", "loggers", library)
    return [LOGGERS[name](every=every, images=images) for name in dict.fromkeys(names)]


def checked_callbacks(
    callbacks: object, log: object, log_every: object, log_images: object = 0
) -> list[Callback]:
    """The callbacks of `fit`, and the writers that it is to have.

    Raises:
        ValueError: something else than callbacks, or as `make_loggers`.
    """
    if not isinstance(callbacks, list | tuple) or not all(
        isinstance(callback, Callback) for callback in callbacks
    ):
        raise ValueError(f"callbacks is {shown(callbacks)}; expected a list of Callback.")
    if not isinstance(log, list | tuple) or not all(isinstance(name, str) for name in log):
        raise ValueError(f"log is {shown(log)}; expected a list of {', '.join(LOGGERS)}.")
    if type(log_every) is not int or log_every < 0:
        raise ValueError(f"log_every is {shown(log_every)}; expected a number of steps from 0.")
    if type(log_images) is not int or log_images < 0:
        raise ValueError(f"log_images is {shown(log_images)}; expected a number of samples from 0.")
    if log_images and not log:
        raise ValueError(f"log_images is {log_images}, but log names none of {', '.join(LOGGERS)}.")
    return [*callbacks, *make_loggers(log, every=log_every, images=log_images)]


def check_place(names: Sequence[str], location: str) -> None:
    """Refuses writers that need a folder where the runs are in a bucket.

    Raises:
        ValueError: the runs' storage is no folder.
    """
    if names and not storage.is_local(location):
        raise ValueError(
            f"log {', '.join(names)}: the runs are in {location}, and logs are written to a folder; "
            "give a storage that is a folder on a shared disk."
        )


def log_folder(run_folder: str) -> Path:
    """The folder of a run's logs, made."""
    folder = Path(run_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found
