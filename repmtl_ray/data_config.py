"""Which samples an experiment sees: the data sets there are, their forms, and `DataConfig`.

Owns names and checks that need no file; loads neither torch nor Ray. Reading is in `data.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from repmtl_ray.conversion import added, check, check_range, check_types, nearest

FORMS: Mapping[str, tuple[str, ...]] = {
    "cityscapes": ("npy", "parquet", "official", "shards"),
    "nyuv2": ("npy", "parquet", "official", "shards"),
    "office31": ("folders", "shards"),
    "office_home": ("folders", "shards"),
    "image_folders": ("folders", "shards"),
    "image_table": ("table",),
    "custom": (),
}
"""The data sets, and the forms in which each is read."""
RENDERED: Mapping[str, tuple[int, int]] = {"cityscapes": (2975, 500), "nyuv2": (795, 654)}
"""Those that are rendered without a path, and how many samples the real ones have."""
DOMAINS: Mapping[str, tuple[str, ...]] = {
    "office31": ("amazon", "dslr", "webcam"),
    "office_home": ("Art", "Clipart", "Product", "Real_World"),
}
WITH_DOMAINS = (*DOMAINS, "image_folders")
"""The data sets with one task a domain."""
MAX_SEED = 2**32 - 1
MAX_SIZE = 16_384
"""Of an image's height and width in pixels."""
MAX_RENDERED = 10_000_000
_WHAT_DECIDES = {
    "custom": "The samples, their size, both splits and the tasks are those of CustomData.",
    "cityscapes": "It is for rendered scenes, or for a part of a split that has one.",
    "nyuv2": "It is for rendered rooms, or for a part of a split that has one.",
}
_TITLES = {"nyuv2": "NYUv2", "office31": "Office-31", "office_home": "Office-Home"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples, at which size, with which augmentation.

    Args:
        name: "cityscapes" (segmentation and inverse depth), "nyuv2" (segmentation, depth in metres
            and surface normals), "office31" or "office_home" (one task per domain), "image_folders"
            (the same of any folders <domain>/<class>/<photograph>: PACS, DomainNet, your own);
            "image_table" (a CSV or Parquet file of photographs' paths and a column for each task);
            "custom" for the data sets handed to `fit(data=...)`.
        path: of the data, or folder or URI (s3://, gs://) of its shards; None renders street
            scenes (cityscapes) or rooms (nyuv2).
        height, width: pixels; None takes the stored size (official files: the benchmark's; office:
            224).
        augment: random scale-crop and flip of the training samples (docs/guide.md, augmentation).
        num_train, num_val: rendered scenes only; how many; None means as many as the real data set.
        scene_seed: rendered scenes only; which streets or rooms.
        domains: office and image_folders only; which domains, in which order; None means all of
            office's; image_folders needs them.
        eval_split: "val", "test" or "holdout"; the split that the epoch metrics are computed on.
        form: of what is at the path, as `FORMS` lists them; "auto" looks.
        columns: Parquet files only; our column's name to the file's, where they differ.
        pairing: office and image_folders only; whether row b of every domain's batch is any sample ("position") or
            one of the same class ("class").
        holdout: fraction of the training split that is cut off, seeded, as the split "holdout"; 0
            trains on all of it.
        holdout_seed: which samples that takes; not the run's seed, so that all seeds share the cut.
        task_options: by task, options of its class (docs/guide.md, options of tasks), for example
            {"depth": {"loss": "silog"}}; tasks of `CustomData` have them themselves.
    """

    name: str
    path: str | None = None
    height: int | None = None
    width: int | None = None
    augment: bool = False
    num_train: int | None = None
    num_val: int | None = None
    scene_seed: int = 0
    domains: tuple[str, ...] | None = None
    eval_split: Literal["val", "test", "holdout"] = "val"
    form: str = added("auto")
    columns: Mapping[str, str] = added(factory=dict)
    pairing: Literal["position", "class"] = added("position")
    holdout: float = added(0.0)
    holdout_seed: int = added(0)
    task_options: Mapping[str, Mapping[str, Any]] = added(factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "data")
        if self.name not in FORMS:
            raise ValueError(f"data.name is {self.name!r}; {nearest(self.name, FORMS)}")
        self._fill_in()
        for name in ("height", "width"):
            check_range(f"data.{name}", getattr(self, name), 8, MAX_SIZE)
        check(
            (self.height is None) == (self.width is None),
            "data.(height, width)",
            (self.height, self.width),
            "both or neither",
        )
        for name in ("num_train", "num_val"):
            check_range(f"data.{name}", getattr(self, name), 1, MAX_RENDERED)
        for name in ("scene_seed", "holdout_seed"):
            check_range(f"data.{name}", getattr(self, name), 0, MAX_SEED)
        if self.domains is None:
            raise ValueError(
                f"data.domains is not given, which data.name {self.name!r} needs: the names of folders "
                'in data.path, for example ("photo", "sketch"); each is a task.'
            )
        domains = self.domains
        check(len(set(domains)) == len(domains), "data.domains", domains, "no repeats")
        check(bool(domains), "data.domains", domains, "at least one domain")
        check(
            self.name in (*RENDERED, "custom") or self.path is not None,
            "data.path",
            self.path,
            f"the {_TITLES.get(self.name, 'data')} folder (only {' and '.join(RENDERED)} can be rendered "
            "without one)",
        )
        check(0 <= self.holdout < 1, "data.holdout", self.holdout, "a fraction in [0, 1)")
        check(
            self.eval_split != "holdout" or self.holdout > 0,
            "data.holdout",
            self.holdout,
            "above 0 with eval_split 'holdout'",
        )
        self._check_form()
        self._check_unused()

    def _fill_in(self) -> None:
        """What depends on the name has a value from here on: equal experiments look equal."""
        num_train, num_val = RENDERED.get(self.name, RENDERED["cityscapes"])
        for name, value in {
            "num_train": num_train,
            "num_val": num_val,
            "domains": DOMAINS.get(self.name, DOMAINS["office31"]),
        }.items():
            if getattr(self, name) is None and (name, self.name) != ("domains", "image_folders"):
                object.__setattr__(self, name, value)
        if self.name in ("office_home", "image_folders"):  # Office-Home writes "Real World"
            given = self.domains
            domains = None if given is None else tuple(name.replace(" ", "_") for name in given)
            object.__setattr__(self, "domains", domains)

    def _check_unused(self) -> None:
        """Refuses settings that would change nothing: whoever gives them expects that they do.

        What `_fill_in` writes is no setting, whichever name of data it was written for.
        """
        rendered = self.name in RENDERED and self.path is None
        train, val = ({None, *sizes} for sizes in zip(*RENDERED.values(), strict=True))
        unused = {
            "num_train": rendered or self.num_train in train,
            "num_val": rendered or self.num_val in val,
            "scene_seed": rendered or self.scene_seed == 0,
            "domains": self.name in WITH_DOMAINS or self.domains in DOMAINS.values(),
            "columns": self.name in RENDERED or not self.columns,
            "holdout_seed": self.holdout > 0 or self.holdout_seed == 0,
        }
        if self.name == "custom":
            usual: dict[str, object] = {"path": None, "height": None, "width": None, "form": "auto"}
            usual |= {"pairing": "position", "eval_split": "val", "holdout": 0.0}
            usual |= {"task_options": {}}
            unused |= {name: getattr(self, name) == value for name, value in usual.items()}
        for name, is_right in unused.items():
            if not is_right:
                where = "" if self.path is None else f" and data.path {self.path!r}"
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}, but it is not used with data.name "
                    f"{self.name!r}{where}; leave it out. {_WHAT_DECIDES.get(self.name, '')}".rstrip()
                )

    def _check_form(self) -> None:
        forms = FORMS[self.name]
        if self.form != "auto" and self.form not in forms:
            raise ValueError(
                f"data.form is {self.form!r}; {self.name} is read as {', '.join(forms)}, or 'auto'."
            )
        check(
            self.form == "auto" or self.path is not None,
            "data.form",
            self.form,
            "'auto' without a data.path",
        )
        for ours, theirs in self.columns.items():
            check(isinstance(theirs, str), f"data.columns[{ours!r}]", theirs, "a column's name")
        check(
            not self.columns or (self.form in ("auto", "parquet") and self.path is not None),
            "data.columns",
            self.columns,
            "no names, except for Parquet files",
        )
        check(
            self.pairing == "position" or self.name in WITH_DOMAINS,
            "data.pairing",
            self.pairing,
            f"'position', except for {', '.join(WITH_DOMAINS)}",
        )
