"""Procedural street scenes in the Cityscapes npy layout: the data set that needs no download.

Owns the two sensors (camera, stereo matcher), the labels and the folder on disk. The street is laid
out in `_street`, ray-cast in `_raycast` and lit in `_shading`. The folder is read as any Cityscapes
folder is, elsewhere.

    {train,val}/image/<i>.npy    [height, width, 3] float32 in [0, 1]
    {train,val}/label_7/<i>.npy  [height, width] int16, 0 to 6, -1 to ignore
    {train,val}/depth/<i>.npy    [height, width, 1] float32, inverse depth; 0 where invalid
    scenes.json                  what was rendered; written last, so its presence means complete

Classes: 0 flat, 1 human, 2 vehicle, 3 construction, 4 object, 5 nature, 6 sky.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data._raycast import Floats, camera_rays, stereo_matched, trace, value_noise
from repmtl_ray.data._shading import shade
from repmtl_ray.data._street import FOCAL, SKY, street

CLASSES = ("flat", "human", "vehicle", "construction", "object", "nature", "sky")
RENDERER_VERSION = 1  # raise whenever a pixel changes: cached folders of older versions are refused
VAL_OFFSET = 2**31  # val/<i>.npy is render(seed, VAL_OFFSET + i)

BASELINE = 0.2093  # metres between the two cameras of Cityscapes
# Cityscapes stores disparity at 2048 pixels times 256 in 16 bits, and the community divides by
# 65535. So stored value = INVERSE_DEPTH / depth in metres, at every resolution.
INVERSE_DEPTH = FOCAL * 2048 * BASELINE * 256 / 65535
MAX_INVERSE_DEPTH = 0.4922  # the matcher's search range; anything nearer than 3.8 m is invalid

_COLUMNS = ("image", "label_7", "depth")
_PARAMETERS = "scenes.json"


def render(seed: int, index: int, *, height: int, width: int) -> dict[str, NDArray[Any]]:
    """One street scene.

    The street depends on (seed, index) alone, so two sizes with the same aspect show the same view.
    The same arguments give the same bits on one machine; another processor or NumPy may round
    differently.

    Args:
        seed: which series of streets; 0 to 2**32 - 1.
        index: which street of the series; 0 to 2**32 - 1.
        height: pixels, at least 16.
        width: pixels, at least 16.

    Returns:
        image: [height, width, 3] float32 in [0, 1].
        label_7: [height, width] int16; 0 to 6 as in CLASSES, -1 to ignore (the car's own bonnet,
            part of the pixels along class borders).
        depth: [height, width, 1] float32; INVERSE_DEPTH / (metres along the optical axis), up to
            MAX_INVERSE_DEPTH; 0 where a stereo matcher would find nothing (sky, occlusions, holes).

    Raises:
        ValueError: an argument out of its range.
    """
    _check("render", seed=(seed, 0, 2**32 - 1), index=(index, 0, 2**32 - 1))
    _check("render", height=(height, 16, 2**15), width=(width, 16, 2**15))
    # One stream a concern: how many numbers a picture takes must not change its street or light.
    rng, matcher, sensor, annotator = np.random.default_rng([seed, index]).spawn(4)
    camera, pieces = street(rng)
    noise = rng.random((64, 64))
    solids = [piece.solid for piece in pieces]
    metres, ids = trace(camera, solids, noise, height=height, width=width)
    rays = camera_rays(camera, height, width)
    radiance = shade(rng, pieces, noise, camera.position, rays, metres, ids)
    labels = np.array([piece.look.label for piece in pieces] + [SKY], dtype=np.int16)[ids]
    inverse = INVERSE_DEPTH / metres

    bonnet = _bonnet(rng, height, width)
    radiance[:, bonnet] = 0.08 + 0.12 * rng.random() + 0.1 * noise[:3, 0, None]
    inverse[~_measured(matcher, noise, inverse) | bonnet] = 0.0
    return {
        "image": _expose(sensor, radiance),
        "label_7": _with_ignored(annotator, labels, bonnet),
        "depth": inverse[:, :, None].astype(np.float32),
    }


def write(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    height: int = 128,
    width: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    max_workers: int = 1,
) -> Path:
    """Render a data set into a folder, or find it there already.

    Everything is written to a hidden sibling folder that is renamed at the end, so `root` is either
    absent or complete, whoever else writes it at the same time. Only a killed process leaves its
    hidden folder, `.<name>.<process>-<random>`, behind; it is never read and safe to delete.

    Args:
        root: the folder to be; its parents are made.
        num_train: scenes of the training split, at least 1.
        num_val: scenes of the validation split, at least 1.
        height: pixels.
        width: pixels.
        seed: which series of streets.
        progress: called with (scenes written, scenes in all) after each scene.
        max_workers: processes; above 1 the caller's main module must be importable. The files do
            not depend on it.

    Returns:
        root.

    Raises:
        ValueError: an argument out of its range, or root holds something other than this data set.
    """
    _check("write", num_train=(num_train, 1, VAL_OFFSET), num_val=(num_val, 1, VAL_OFFSET))
    _check("write", seed=(seed, 0, 2**32 - 1), max_workers=(max_workers, 1, 1024))
    _check("write", height=(height, 16, 2**15), width=(width, 16, 2**15))
    root, parameters = Path(root), _parameters(num_train, num_val, height, width, seed)
    if _is_complete(root, parameters):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = root.parent / f".{root.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        for column in _COLUMNS:
            (draft / "train" / column).mkdir(parents=True)
            (draft / "val" / column).mkdir(parents=True)
        jobs = [("train", i) for i in range(num_train)] + [("val", i) for i in range(num_val)]
        work = partial(_write_scene, draft, seed=seed, height=height, width=width)
        with closing(_run(work, jobs, max_workers)) as written:  # ends the workers on any way out
            for done, _ in enumerate(written, start=1):
                if progress is not None:
                    progress(done, len(jobs))
        (draft / _PARAMETERS).write_text(json.dumps(parameters, indent=2) + "\n")
        try:
            draft.rename(root)
        except OSError:  # someone else was faster, or put something else there meanwhile
            if not _is_complete(root, parameters):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def cached(
    *,
    num_train: int,
    num_val: int,
    height: int,
    width: int,
    seed: int,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_workers: int = 1,
) -> Path:
    """The data set with these parameters, rendered on first use.

    Args:
        num_train, num_val, height, width, seed, progress, max_workers: as in `write`.
        cache_dir: None takes $REPMTL_RAY_CACHE, or else ~/.cache/repmtl_ray.

    Returns:
        <cache_dir>/street_scenes-<digest of the parameters and of RENDERER_VERSION>

    Raises:
        ValueError: as `write`.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("REPMTL_RAY_CACHE") or Path.home() / ".cache/repmtl_ray")
    parameters = _parameters(num_train, num_val, height, width, seed)
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return write(
        Path(cache_dir) / f"street_scenes-{digest}",
        num_train=num_train,
        num_val=num_val,
        height=height,
        width=width,
        seed=seed,
        progress=progress,
        max_workers=max_workers,
    )


def _check(where: str, **ranges: tuple[int, int, int]) -> None:
    for name, (found, low, high) in ranges.items():
        if not low <= found <= high:
            raise ValueError(f"{where}: {name} is {found}; expected {low} to {high}.")


def _parameters(num_train: int, num_val: int, height: int, width: int, seed: int) -> dict[str, int]:
    return {
        "renderer_version": RENDERER_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "height": height,
        "width": width,
        "seed": seed,
    }


def _is_complete(root: Path, parameters: dict[str, int]) -> bool:
    """Whether root holds this data set; False if it is absent or empty, an error otherwise."""
    remedy = "choose another folder, or delete this one to render it again"
    if not root.exists() and not root.is_symlink():
        return False
    if not root.is_dir():
        raise ValueError(f"street scenes: {root} is not a folder; {remedy}.")
    if not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / _PARAMETERS).read_text())
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(path.name for path in root.iterdir())[:5])
        raise ValueError(
            f"street scenes: {root} holds {names}, but no readable {_PARAMETERS}; {remedy}."
        ) from error
    if found != parameters:
        raise ValueError(
            f"street scenes: {root} was rendered with {found}, asked for {parameters}; {remedy}."
        )
    for split in ("train", "val"):
        for column in _COLUMNS:
            num_files = sum(1 for _ in (root / split / column).glob("*.npy"))
            if num_files != parameters[f"num_{split}"]:
                raise ValueError(
                    f"street scenes: {root / split / column} has {num_files} frames, expected "
                    f"{parameters[f'num_{split}']}; {remedy}."
                )
    return True


def write_alone(root: Path, split: str, number: int, *, seed: int, height: int, width: int) -> None:
    """One scene of a data set as frame 0 of an otherwise empty folder.

    Args:
        root: made if it is absent.
        split: "train" or "val".
        number: of the scene in the split of the whole data set.
        seed, height, width: as in `write`.
    """
    for column, values in _scene(split, number, seed=seed, height=height, width=width).items():
        (root / split / column).mkdir(parents=True)
        np.save(root / split / column / "0.npy", values)


def _scene(
    split: str, number: int, *, seed: int, height: int, width: int
) -> dict[str, NDArray[Any]]:
    offset = VAL_OFFSET if split == "val" else 0
    return render(seed, offset + number, height=height, width=width)


def _write_scene(draft: Path, job: tuple[str, int], *, seed: int, height: int, width: int) -> None:
    split, number = job
    for column, values in _scene(split, number, seed=seed, height=height, width=width).items():
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


def _bonnet(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Pixels of the camera's own car, [height, width]; in some scenes none."""
    top = rng.uniform(0.92, 1.04)
    across = (np.arange(width) + 0.5) / width - rng.uniform(0.45, 0.55)
    edge = top + 0.35 * across**2
    return (np.arange(height) + 0.5)[:, None] / height > edge


def _measured(rng: np.random.Generator, noise: Floats, inverse: Floats) -> NDArray[np.bool_]:
    """Where a stereo matcher finds a disparity, [height, width]; rarely in a fifth of scenes."""
    height, width = inverse.shape
    disparity = FOCAL * width * BASELINE / INVERSE_DEPTH * inverse
    holes = rng.uniform(0.5, 0.85) if rng.random() < 0.2 else rng.uniform(0.01, 0.2)
    rows, columns = np.arange(height)[:, None] / height, np.arange(width) / height
    shift, size = rng.uniform(0.0, 64.0, 2), rng.uniform(4.0, 10.0)
    blotches = value_noise(noise, rows * size + shift[0], columns * size + shift[1])
    band = int(width * rng.uniform(0.0, 0.05))
    blotches = blotches + 0.35 * rng.random((height, width))
    measured = stereo_matched(disparity) & (inverse > 0) & (inverse <= MAX_INVERSE_DEPTH)
    measured &= blotches > np.quantile(blotches, holes)
    measured[:, :band] = False
    return measured


def _expose(rng: np.random.Generator, radiance: Floats) -> NDArray[np.float32]:
    """The picture, [height, width, 3], of the light, [3, height, width]."""
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3)
    picture = np.moveaxis(radiance, 0, 2).astype(np.float32) * gain.astype(np.float32)
    spread = np.float32(rng.uniform(0.005, 0.025))
    picture += spread * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0.0, 1.0)


def _with_ignored(
    rng: np.random.Generator, labels: NDArray[np.int16], bonnet: NDArray[np.bool_]
) -> NDArray[np.int16]:
    """Labels without the bonnet and without a share of the pixels at class borders."""
    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    border &= rng.uniform(0.0, 0.3) > rng.random(labels.shape)
    return np.where(bonnet | border, np.int16(-1), labels)
