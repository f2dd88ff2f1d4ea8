"""Searches Rep-MTL's coefficients, temperature and policy for Office-31.

    python pipelines/tune_office31.py --data DIR                    small images, small encoder
    python pipelines/tune_office31.py --data DIR --preset paper     ResNet-18, 224 x 224, 100 epochs

Every domain is a task with its own images. DIR holds amazon/images/<class>/*.jpg, dslr/...,
webcam/... and, if there are any, the split lists splits/{amazon,dslr,webcam}_{train,val,test}.txt;
without lists a seeded split is made and written beside the data.
"""

from __future__ import annotations

from repmtl_ray import cli
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, replace


def small(data: str) -> Experiment:
    """Small images and a small encoder from scratch: shows the machinery on CPUs, no accuracy to
    quote."""
    return Experiment(
        data=DataConfig(name="office31", path=data, height=64, width=64, augment=True),
        model=ModelConfig(
            encoder="resnet10t", features="pooled", output_stride=None, head="linear"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        epochs=12,
        batch_size=32,
    )


def paper(data: str) -> Experiment:
    """The benchmark's setting (LibMTL) without its extra bottleneck layer; needs --pretrained or
    --weights."""
    return Experiment(
        data=DataConfig(name="office31", path=data),
        model=ModelConfig(encoder="resnet18", features="pooled", output_stride=None, head="linear"),
        epochs=100,
        batch_size=64,
    )


def main() -> None:
    parser = cli.search_parser(__doc__)
    data = parser.add_argument_group("the data")
    data.add_argument("--data", metavar="DIR", required=True, help="the Office-31 folder")
    data.add_argument(
        "--domains", nargs="+", default=["amazon", "dslr", "webcam"], help="default: %(default)s"
    )
    data.add_argument(
        "--eval-split", choices=("val", "test"), default="val", help="default: %(default)s"
    )
    data.add_argument(
        "--preset", choices=("small", "paper"), default="small", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    experiment = {"small": small, "paper": paper}[arguments.preset](arguments.data)
    chosen = cli.overrides(arguments) | {
        "data.domains": arguments.domains,
        "data.eval_split": arguments.eval_split,
    }
    cli.run_search(
        replace(experiment, chosen),
        arguments,
        space="joint" if arguments.preset == "paper" else "small",
        samples=10,
        metrics=[f"{domain}/accuracy" for domain in arguments.domains],
        data_title=f"Office-31, {arguments.data}, {arguments.eval_split} split",
    )


if __name__ == "__main__":
    cli.main(main)
