"""Searches Rep-MTL's coefficients, temperature and policy for Office-31, or for Office-Home.

    repmtl-ray tune office31 --data DIR                        small images, small encoder
    repmtl-ray tune office31 --data DIR --preset paper         ResNet-18, 224 x 224, 100 epochs
    repmtl-ray tune office31 --data DIR --dataset office_home  four domains, 65 classes

Every domain is a task with its own images. DIR holds amazon/images/<class>/*.jpg, dslr/..., webcam/...
(Office-Home: Art/<class>/*.jpg, Clipart/..., Product/..., Real_World/...), and optionally the split
lists splits/<domain>_{train,val,test}.txt. Without lists, the command makes a split from a seed and
writes it beside the data.
"""

from __future__ import annotations

import argparse

from repmtl_ray.cli import search
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, replace

TITLES = {"office31": "Office-31", "office_home": "Office-Home"}


def small(data: str, name: str = "office31") -> Experiment:
    """Small images and a small encoder from scratch: shows the machinery on CPUs, no accuracy to
    quote."""
    return Experiment(
        data=DataConfig(name=name, path=data, height=64, width=64, augment=True),
        model=ModelConfig(
            encoder="resnet10t", features="pooled", output_stride=None, head="linear"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        epochs=12,
        batch_size=32,
    )


def paper(data: str, name: str = "office31") -> Experiment:
    """The benchmark's setting (LibMTL) without its extra bottleneck layer; needs --pretrained or
    --weights."""
    return Experiment(
        data=DataConfig(name=name, path=data),
        model=ModelConfig(encoder="resnet18", features="pooled", output_stride=None, head="linear"),
        epochs=100,
        batch_size=64,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every search, and the folder of the domains."""
    search.add_search_options(parser)
    data = parser.add_argument_group("the data")
    data.add_argument("--data", metavar="DIR", required=True, help="the data set's folder")
    data.add_argument(
        "--dataset", choices=tuple(TITLES), default="office31", help="default: %(default)s"
    )
    data.add_argument("--domains", nargs="+", metavar="NAME", help="default: the data set's")
    data.add_argument(
        "--pairing",
        choices=("position", "class"),
        default="position",
        help="class: row b of every domain's batch shows the same class (default: %(default)s)",
    )
    data.add_argument(
        "--eval-split", choices=("val", "test"), default="val", help="default: %(default)s"
    )
    data.add_argument(
        "--preset", choices=("small", "paper"), default="small", help="default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> None:
    """Searches, and writes the results."""
    preset = {"small": small, "paper": paper}[arguments.preset]
    chosen = search.overrides(arguments) | {
        "data.eval_split": arguments.eval_split,
        "data.pairing": arguments.pairing,
    }
    if arguments.domains is not None:
        chosen["data.domains"] = arguments.domains
    experiment = replace(preset(arguments.data, arguments.dataset), chosen)
    search.run_search(
        experiment,
        arguments,
        space="joint" if arguments.preset == "paper" else "small",
        samples=10,
        metrics=[f"{domain}/accuracy" for domain in experiment.data.domains or ()],
        data_title=f"{TITLES[arguments.dataset]}, {arguments.data}, {arguments.eval_split} split",
    )
