"""What works in an environment that has the core's libraries alone; a program of its own, because
whatever another test imported stays importable.

`python -m tests.helpers.core_alone` makes every library of the extras impossible to find. It prints
the policies that combined gradients and took a step, and the message of every one that could not.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.machinery import ModuleSpec, PathFinder

from repmtl_ray import extras

NEEDED_BY_THE_CORE = {"PIL", "jinja2", "markupsafe", "tqdm", "yaml"}
"""Libraries of the extras that torch and timm bring."""


class CoreAlone(PathFinder):
    """Python's own search for modules, but for the libraries of the extras."""

    hidden = {name for names in extras.MODULES.values() for name in names} - NEEDED_BY_THE_CORE
    hidden |= {"albumentations"}  # which has a twin, so that nothing asks for it

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def,override]
        """As Python's."""
        if fullname.partition(".")[0] in cls.hidden:
            return None
        found: ModuleSpec | None = PathFinder.find_spec(fullname, path, target)
        return found


def main() -> None:
    """Tries the public names, the policies and the console command."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = CoreAlone
    import torch

    import repmtl_ray
    from repmtl_ray import RepMTL, combined_loss, policies
    from repmtl_ray.cli import console
    from repmtl_ray.collectives import ALONE
    from tests.helpers.runs import NEEDED_ARGUMENTS, dense_batch, policy_config, small_stepper

    for name in repmtl_ray.__all__:
        try:
            getattr(repmtl_ray, name)
        except extras.MissingLibraryError as error:
            print(error)
    for name in policies.names():
        arguments = NEEDED_ARGUMENTS.get(name, {}) | (
            {"weights": [1, 2, 3]} if name == "Constant" else {}
        )
        try:
            policy = policies.build(name, num_tasks=1 if name == "stl" else 3, **arguments)
        except ValueError as error:
            print(error)
            continue
        with contextlib.suppress(ValueError):  # it needs more than one gradient a task
            policy.combine(torch.randn(len(policy.tasks), 5), torch.rand(len(policy.tasks)) + 0.1)
            print(f"{name} combines")
    for name in ("EW", "FAMO", "MGDA", "GradNorm", "MoDo", "MTAdam"):
        stepper = small_stepper(ALONE, policy_config(name), regularizer=(0.9, 0.7))
        stepper.step(dense_batch(0, ALONE), global_step=0)
        print(f"{name} steps")
    encoder, heads = torch.nn.Linear(8, 4), [torch.nn.Linear(4, 1) for _ in range(2)]
    features = encoder(torch.randn(6, 8))
    losses = [head(features).square().mean() for head in heads]
    loss = combined_loss(policies.build("MGDA", num_tasks=2), losses, list(encoder.parameters()))
    (loss + RepMTL(share=0.1)(losses, features)).backward()
    console.main(["--help"])


if __name__ == "__main__":
    main()
