"""Rendered data sets on disk: written once, complete or not there, found again by their parameters.

Owns the folder; what is in a scene is for `street_scenes` and `rooms`.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

VAL_OFFSET = 2**31
"""val/<i>.npy is render(seed, VAL_OFFSET + i)."""
PARAMETERS = "scenes.json"
"""What was rendered; written last, so its presence means complete."""

Render = Callable[..., dict[str, NDArray[Any]]]
"""(seed, index, height=, width=) to one scene by column; picklable."""


class Rendering(NamedTuple):
    """A series of scenes.

    Attributes:
        title: begins error messages.
        columns: names of folders in {train,val}.
        render: makes one scene.
        version: of the renderer.
    """

    title: str
    columns: tuple[str, ...]
    render: Render
    version: int


def write(
    rendering: Rendering,
    root: Path,
    *,
    num_train: int,
    num_val: int,
    height: int,
    width: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
    max_workers: int,
) -> Path:
    """Renders a data set into a folder, or finds it there already; see `street_scenes.write`."""
    check("write", num_train=(num_train, 1, VAL_OFFSET), num_val=(num_val, 1, VAL_OFFSET))
    check("write", seed=(seed, 0, 2**32 - 1), max_workers=(max_workers, 1, 1024))
    check("write", height=(height, 16, 2**15), width=(width, 16, 2**15))
    parameters = _parameters(rendering, num_train, num_val, height, width, seed)
    root = Path(root)
    if _is_complete(rendering, root, parameters):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = root.parent / f".{root.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        for column in rendering.columns:
            (draft / "train" / column).mkdir(parents=True)
            (draft / "val" / column).mkdir(parents=True)
        jobs = [("train", i) for i in range(num_train)] + [("val", i) for i in range(num_val)]
        work = partial(_write_scene, rendering.render, draft, seed=seed, height=height, width=width)
        with closing(_run(work, jobs, max_workers)) as written:  # ends the workers on any way out
            for done, _ in enumerate(written, start=1):
                if progress is not None:
                    progress(done, len(jobs))
        (draft / PARAMETERS).write_text(json.dumps(parameters, indent=2) + "\n")
        try:
            draft.rename(root)
        except OSError:  # someone else was faster, or put something else there meanwhile
            if not _is_complete(rendering, root, parameters):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def cached(
    rendering: Rendering,
    name: str,
    *,
    num_train: int,
    num_val: int,
    height: int,
    width: int,
    seed: int,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None,
    max_workers: int,
) -> Path:
    """The data set with these parameters, rendered on first use.

    Returns:
        <cache_dir>/<name>-<digest of the parameters and of the renderer's version>
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("REPMTL_RAY_CACHE") or Path.home() / ".cache/repmtl_ray")
    parameters = _parameters(rendering, num_train, num_val, height, width, seed)
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return write(
        rendering,
        Path(cache_dir) / f"{name}-{digest}",
        num_train=num_train,
        num_val=num_val,
        height=height,
        width=width,
        seed=seed,
        progress=progress,
        max_workers=max_workers,
    )


def check(where: str, **ranges: tuple[int, int, int]) -> None:
    for name, (found, low, high) in ranges.items():
        if not low <= found <= high:
            raise ValueError(f"{where}: {name} is {found}; expected {low} to {high}.")


def _parameters(
    rendering: Rendering, num_train: int, num_val: int, height: int, width: int, seed: int
) -> dict[str, int]:
    return {
        "renderer_version": rendering.version,
        "num_train": num_train,
        "num_val": num_val,
        "height": height,
        "width": width,
        "seed": seed,
    }


def _is_complete(rendering: Rendering, root: Path, parameters: Mapping[str, int]) -> bool:
    """Whether root holds this data set; False if it is absent or empty, an error otherwise."""
    remedy = "choose another folder, or delete this one to render it again"
    if not root.exists() and not root.is_symlink():
        return False
    if not root.is_dir():
        raise ValueError(f"{rendering.title}: {root} is not a folder; {remedy}.")
    if not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / PARAMETERS).read_text())
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(path.name for path in root.iterdir())[:5])
        raise ValueError(
            f"{rendering.title}: {root} holds {names}, but no readable {PARAMETERS}; {remedy}."
        ) from error
    if found != parameters:
        raise ValueError(
            f"{rendering.title}: {root} was rendered with {found}, asked for {parameters}; {remedy}."
        )
    for split in ("train", "val"):
        for column in rendering.columns:
            num_files = sum(1 for _ in (root / split / column).glob("*.npy"))
            if num_files != parameters[f"num_{split}"]:
                raise ValueError(
                    f"{rendering.title}: {root / split / column} has {num_files} frames, expected "
                    f"{parameters[f'num_{split}']}; {remedy}."
                )
    return True


def write_alone(
    render: Render, root: Path, split: str, number: int, *, seed: int, height: int, width: int
) -> None:
    """One scene of a data set as frame 0 of an otherwise empty folder.

    Args:
        render: as in `Rendering`.
        root: made if it is absent.
        split: "train" or "val".
        number: of the scene in the split of the whole data set.
        seed, height, width: as in `write`.
    """
    scene = _scene(render, split, number, seed=seed, height=height, width=width)
    for column, values in scene.items():
        (root / split / column).mkdir(parents=True)
        np.save(root / split / column / "0.npy", values)


def _scene(
    render: Render, split: str, number: int, *, seed: int, height: int, width: int
) -> dict[str, NDArray[Any]]:
    offset = VAL_OFFSET if split == "val" else 0
    return render(seed, offset + number, height=height, width=width)


def _write_scene(
    render: Render, draft: Path, job: tuple[str, int], *, seed: int, height: int, width: int
) -> None:
    split, number = job
    scene = _scene(render, split, number, seed=seed, height=height, width=width)
    for column, values in scene.items():
        np.save(draft / split / column / f"{number}.npy", values)


def _run(
    work: Callable[[tuple[str, int]], None], jobs: list[tuple[str, int]], max_workers: int
) -> Generator[None, None, None]:
    if max_workers == 1:
        yield from map(work, jobs)
        return
    # Spawned, not forked: the caller may have threads (torch, Ray) that a fork would break.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers, mp_context=spawn) as pool:
        yield from pool.map(work, jobs, chunksize=8)
