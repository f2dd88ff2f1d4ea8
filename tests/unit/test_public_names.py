"""What `from repmtl_ray import ...` offers, and that it costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import repmtl_ray


def test_every_public_name_exists_and_is_listed() -> None:
    assert len(set(repmtl_ray.__all__)) == len(repmtl_ray.__all__)
    assert set(repmtl_ray.__all__) <= set(dir(repmtl_ray))
    for name in repmtl_ray.__all__:
        assert getattr(repmtl_ray, name) is not None


def test_an_unknown_name_is_an_attribute_error_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'fitt'; it offers .*fit, "):
        _ = repmtl_ray.fitt
    with pytest.raises(ImportError):
        from repmtl_ray import fitt  # noqa: F401


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys, repmtl_ray\n"
        "assert {'RepMTL', 'fit', 'load_model', 'policies'} <= set(dir(repmtl_ray))\n"
        "heavy = {'torch', 'ray', 'numpy', 'timm', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert repmtl_ray.policies.names()\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
