"""Pictures of a checkpoint's model on a few images: predictions, saliency, and affinities of the tasks.

    python pipelines/pictures.py CHECKPOINT --out DIR
    python pipelines/pictures.py CHECKPOINT --images 6 --split val --tensorboard LOGS

Writes predictions.png, saliency.png (|S_t| of every task, the task distribution P, its entropy) and
affinity.png (how similar the tasks' channel affinities are). With --tensorboard it writes the same
pictures as a TensorBoard log (pip install "repmtl_ray[loggers]").
"""

from __future__ import annotations

from repmtl_ray import cli
from repmtl_ray.cli.options import new_parser
from repmtl_ray.report import figures
from repmtl_ray.report.inspection import inspect_checkpoint


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--out", default="pictures", help="folder (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=4, help="how many; of each domain (default: %(default)s)"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: the run's")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="the data, if not where the run had it; Parquet files for data of your own",
    )
    parser.add_argument("--tensorboard", metavar="DIR", help="also write them as a TensorBoard log")
    arguments = parser.parse_args()
    inspection = inspect_checkpoint(
        arguments.checkpoint,
        num_images=arguments.images,
        split=arguments.split,
        data_path=arguments.data,
    )
    cli.folder(arguments.out)
    for path in figures.save_inspection(inspection, arguments.out):
        print(f"picture    {path}")
    if arguments.tensorboard:
        figures.log_tensorboard(inspection, arguments.tensorboard)
        print(
            f"log        {arguments.tensorboard}; look: tensorboard --logdir {arguments.tensorboard}"
        )


if __name__ == "__main__":
    cli.main(main)
