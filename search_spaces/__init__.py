"""Search spaces: functions that return a Ray Tune `param_space` over dotted paths of `Experiment`.

Each says which section of the paper (arXiv:2507.21049) it comes from. Write your own the same way
and hand it to `repmtl_ray.tune`, or to a pipeline by `--space package.module:function`.
"""

from search_spaces.rep_mtl import (
    bounded,
    bounded_grid,
    joint,
    mid_run,
    paper_grid,
    policies,
    scalarisation,
    sensitivity,
    small,
)

__all__ = [
    "bounded",
    "bounded_grid",
    "joint",
    "mid_run",
    "paper_grid",
    "policies",
    "scalarisation",
    "sensitivity",
    "small",
]
