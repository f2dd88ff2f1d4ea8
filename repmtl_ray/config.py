"""The frozen description of an experiment: everything that decides its result, and nothing else.

Owns the configuration classes (the data's is in `data_config`, the step's are in `step_config`),
their checks, and changing one by path. Where an experiment runs (workers, storage, cluster) is not
part of it: results do not depend on that. Imports neither torch nor Ray, so a search space can be
checked anywhere before anything starts.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from repmtl_ray.conversion import (
    ExperimentError,
    NonFiniteLossError,
    added,
    check,
    check_range,
    check_types,
    differences,
    digest,
    from_dict,
    nearest,
    to_dict,
)
from repmtl_ray.data_config import MAX_SEED, DataConfig
from repmtl_ray.policy_names import OwnPolicy, check_names, name_of
from repmtl_ray.step_config import (
    MAX_BATCH_SIZE,
    MAX_EPOCHS,
    MAX_FLOAT,
    ComputeConfig,
    OptimizerConfig,
)

__all__ = [
    "ComputeConfig",
    "DataConfig",
    "Experiment",
    "ExperimentError",
    "ModelConfig",
    "NonFiniteLossError",
    "OptimizerConfig",
    "PolicyConfig",
    "RegularizerConfig",
    "differences",
    "digest",
    "from_dict",
    "nearest",
    "replace",
    "to_dict",
]

MAX_CHANNELS = 65_536
SEGNET = "segnet_mtan"
"""The encoder of this project's own (`models/segnet.py`)."""
OWN_MODEL = "custom"
"""The encoder of a model of the user's own; all others are timm's."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One shared timm encoder and one head for every task.

    Args:
        encoder: a timm model name, or "segnet_mtan", SegNet with MTAN's attention, from scratch;
            "custom" for a model handed to `fit(model=...)`, whose settings here are
            `representation` and `batch_norm` alone.
        features: what the encoder hands over: "map" [B, C, H', W'] (its last feature map), "pooled"
            [B, C] or "tokens" [B, N, C].
        output_stride: of the feature map (features "map" only); 8 gives dilated ResNets. Encoders
            that cannot dilate refuse it.
        pretrained: load timm's published weights from the hub (needs the network or its cache).
        weights: path of a local state dict (.pth, .safetensors) for the encoder; takes the hub's
            place. "efficientnet_lite0": ImageNet weights of "tf_efficientnet_lite0" from the Python
            package of the extra `pretrained`, with input_scale "symmetric".
        representation: where saliency is taken: "encoder" (its output), or the dotted name of a
            module on every task's path, for example "encoder.layer4" of `MultiTaskModel`.
        head: "mtan" (of "segnet_mtan" alone), "aspp" (dense tasks) or "linear" (1x1 convolution for dense tasks, affine map for
            vectors).
        head_channels, atrous_rates, dropout: of the ASPP head.
        bottleneck: units of LibMTL's extra layer between pooled features and heads (affine, batch
            norm, ReLU, dropout 0.5), part of the encoder; None leaves it out.
        batch_norm: "global" normalises with the statistics of the whole global batch, so that
            results do not depend on the number of workers; "local" with each worker's own, as
            DistributedDataParallel does.
        batch_norm_momentum: of the encoder's batch normalisation; None keeps the network's own. Values
            near 0.01 are slow for runs of a few hundred steps.
        input_scale: "data" hands images over as the data set normalises them; "symmetric" brings
            them to -1..1, (x - 0.5) / 0.5 of images in 0..1, as some pretrained weights expect.
        code: which code a model of the user's own is made by; `fit`, `tune` and `benchmark` fill it
            in.
    """

    encoder: str = "resnet50"
    features: Literal["map", "pooled", "tokens"] = "map"
    output_stride: int | None = 8
    pretrained: bool = False
    weights: str | None = None
    representation: str = "encoder"
    head: Literal["aspp", "linear", "mtan"] = "aspp"
    head_channels: int = 256
    atrous_rates: tuple[int, ...] = (12, 24, 36)
    dropout: float = 0.5
    bottleneck: int | None = added(None)
    batch_norm: Literal["global", "local"] = "global"
    batch_norm_momentum: float | None = added(None)
    input_scale: Literal["data", "symmetric"] = added("data")
    code: str = added("")

    def __post_init__(self) -> None:
        check_types(self, "model")
        check(
            self.output_stride in (None, 4, 8, 16, 32),
            "model.output_stride",
            self.output_stride,
            "4, 8, 16, 32 or None",
        )
        check_range("model.head_channels", self.head_channels, 1, MAX_CHANNELS)
        check(
            self.code == "" or self.encoder == OWN_MODEL,
            "model.code",
            self.code,
            f"'', except with encoder {OWN_MODEL!r}",
        )
        is_segnet = self.encoder == SEGNET
        check(
            is_segnet == (self.head == "mtan"),
            "model.(encoder, head)",
            (self.encoder, self.head),
            f"head 'mtan' with encoder {SEGNET!r}, and only there",
        )
        check(
            not is_segnet
            or (self.features, self.output_stride, self.pretrained, self.weights)
            == ("map", None, False, None),
            "model.(features, output_stride, pretrained, weights)",
            (self.features, self.output_stride, self.pretrained, self.weights),
            f"'map', None, False and None with encoder {SEGNET!r}, which is trained from scratch",
        )
        check_range("model.batch_norm_momentum", self.batch_norm_momentum, 0, 1, above=True)
        self._check_weights()
        check_range("model.bottleneck", self.bottleneck, 1, MAX_CHANNELS)
        check(
            self.bottleneck is None or self.features == "pooled",
            "model.bottleneck",
            self.bottleneck,
            "None, except with features 'pooled'",
        )
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        for rate in self.atrous_rates:
            check_range("model.atrous_rates", rate, 1, MAX_CHANNELS)
        check(
            not (self.head == "aspp" and self.features != "map"),
            "model.(head, features)",
            (self.head, self.features),
            "features 'map' for an ASPP head, or head 'linear'",
        )
        self._check_unused()

    def _check_weights(self) -> None:
        packaged = (self.encoder, self.input_scale) == ("tf_efficientnet_lite0", "symmetric")
        check(
            self.weights != "efficientnet_lite0" or packaged,
            "model.(encoder, input_scale)",
            (self.encoder, self.input_scale),
            "'tf_efficientnet_lite0' and 'symmetric' with weights 'efficientnet_lite0'",
        )
        check(
            not (self.pretrained and self.weights is not None),
            "model.(pretrained, weights)",
            (self.pretrained, self.weights),
            "one of the two: the hub's weights or a local file",
        )

    def _check_unused(self) -> None:
        """Refuses settings of parts that this model has not.

        Defaults are no settings, and 0.0 is the dropout of every head that has none.
        """
        has_aspp = self.head == "aspp"
        usual = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name, is_used in {
            "head_channels": has_aspp,
            "atrous_rates": has_aspp,
            "dropout": has_aspp or self.dropout == 0.0,
            "output_stride": self.features == "map" or self.output_stride is None,
        }.items():
            value = getattr(self, name)
            if not is_used and value != usual[name]:
                raise ValueError(
                    f"model.{name} is {value!r}, but it is not used with head {self.head!r} and "
                    f"features {self.features!r}; leave it out."
                )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How task losses become one update.

    Args:
        name: a name from `repmtl_ray.policies.names()`, or a class of your own (docs/own_policy.md),
            which becomes its name with the identity of its code; of a `functools.partial` or an
            instance, the arguments become `arguments`.
        arguments: the policy's own arguments. Their names are checked here, their values when the
            policy is built.
        log_losses: train on log L_t, as the paper does; policies that need positive losses take L_t
            itself and only the saliency sees the logarithm (docs/guide.md, log losses).
        gradients: gradient policies only: task gradients at the shared "parameters" (one encoder
            backward per task) or at the "representation" (one in all, where the method allows).
    """

    name: str | Any = "EW"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    log_losses: bool = True
    gradients: Literal["parameters", "representation"] = "parameters"

    def __post_init__(self) -> None:
        name = name_of(self.name)
        if isinstance(name, OwnPolicy) and name.arguments:
            object.__setattr__(self, "arguments", {**name.arguments, **self.arguments})
            name = name_of(name.policy)
        object.__setattr__(self, "name", name)
        check_types(self, "policy")
        check_names(self.name, self.arguments)


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """Rep-MTL's two penalties: lambda_tsr * TSR + lambda_csa * CSA (equation 10); 0 turns one off.

    Args:
        lambda_tsr, lambda_csa: weights; the paper's centre is 0.9 each.
        temperature: of CSA's softmax; the paper gives none. 0.5 is this project's default
            (docs/methods.md).
        share: bounds the penalty: its gradient at the representation has this share of the norm of
            the tasks' gradient there, over the global batch, and the lambdas only weigh TSR against
            CSA. In (0, 1]; None is the paper (docs/methods.md).
        through: "all" is the paper: the penalty's gradient reaches encoder and heads. "encoder": it
            reaches the encoder alone.
        diagnostics: report the quantities of `diagnostics.py` without penalties too; with penalties
            they are always reported.
        direction: a control for studies, not a method. "penalty" is the penalty's gradient;
            "flipped" its opposite; "random" a direction of the same norm that is drawn for each
            step and sample from the seed (with through "encoder" alone); "divergence" the gradient
            of `penalties.divergence_loss` in place of the two penalties'.
    """

    lambda_tsr: float = 0.9
    lambda_csa: float = 0.9
    temperature: float = 0.5
    share: float | None = added(None)
    through: Literal["all", "encoder"] = added("all")
    diagnostics: bool = added(False)
    direction: Literal["penalty", "random", "flipped", "divergence"] = added("penalty")

    def __post_init__(self) -> None:
        check_types(self, "regularizer")
        check_range("regularizer.lambda_tsr", self.lambda_tsr, 0, MAX_FLOAT)
        check_range("regularizer.lambda_csa", self.lambda_csa, 0, MAX_FLOAT)
        check_range("regularizer.temperature", self.temperature, 0, MAX_FLOAT, above=True)
        # Cosines are divided by the temperature.
        check_range("regularizer.temperature", self.temperature, 1 / MAX_FLOAT, MAX_FLOAT)
        check_range("regularizer.share", self.share, 0, 1, above=True)
        if self.share is not None and not self.active:
            raise ValueError(
                f"regularizer.share is {self.share} with lambda_tsr 0 and lambda_csa 0: there is no penalty to bound. Set one "
                "of them above 0, or share to None."
            )
        check(
            self.direction != "random" or self.through == "encoder",
            "regularizer.(direction, through)",
            (self.direction, self.through),
            "through 'encoder' with direction 'random', which is drawn at the representation",
        )

    @property
    def active(self) -> bool:
        return self.lambda_tsr > 0 or self.lambda_csa > 0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a result.

    Args:
        data, model, policy, regularizer, optimizer: the parts.
        tasks: which of the data set's tasks, by name; None means all.
        epochs: passes over the training split (over the longest domain's).
        batch_size: samples per step over **all** workers; for office of each domain.
        seed: of initial weights, epoch order, augmentation, dropout and random policies; from 0 to
            2**32 - 1, which NumPy, torch and Ray Tune's search algorithms all accept.
        precision: "float32"; "bfloat16" or "float16" (autocast; losses, saliency and penalties stay
            in float32; with float16 derivatives are scaled, and a step that overflows is skipped);
            or "float64".
        protocol: recorded with every result; rows of different protocols are never compared.
        compute: how a device computes a step.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tasks: tuple[str, ...] | None = None
    epochs: int = 200
    batch_size: int = 64
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    protocol: str = "libmtl"
    compute: ComputeConfig = added(factory=ComputeConfig)  # noqa: RUF009

    def __post_init__(self) -> None:
        check_types(self)
        check_range("epochs", self.epochs, 1, MAX_EPOCHS)
        check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        check_range("seed", self.seed, 0, MAX_SEED)
        if self.policy.gradients == "representation" and self.model.representation != "encoder":
            raise ValueError(
                f"policy.gradients is 'representation' with model.representation {self.model.representation!r}: "
                "shared layers behind the representation would follow no policy; take them at the 'parameters', or "
                "the representation at the 'encoder'."
            )
        inside = self.model.representation != "encoder"
        if self.regularizer.active and self.regularizer.through == "encoder" and inside:
            raise ValueError(
                f"regularizer.through is 'encoder' with model.representation {self.model.representation!r}: shared layers "
                "behind the representation would get no penalty and follow their tasks alone, as heads do. Set through to "
                "'all', or take the representation at the 'encoder'."
            )
        self.compute.check_fits(self.batch_size, self.model.representation)
        tasks = self.tasks
        check(
            tasks is None or len(set(tasks)) == len(tasks) > 0,
            "tasks",
            tasks,
            "names without repeats",
        )
        if self.regularizer.lambda_csa > 0 and self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size} with regularizer.lambda_csa {self.regularizer.lambda_csa}: CSA "
                "contrasts samples and needs at least 2 in the global batch; raise batch_size or set lambda_csa to 0."
            )


def replace(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """A copy with some values changed, named by dotted path.

    Args:
        experiment: stays as it is.
        overrides: for example {"regularizer.lambda_tsr": 1.1, "policy.name": "UW", "epochs": 20}.

    Raises:
        ValueError: a path that names no field (the nearest are offered), or a value that its class
            refuses.
    """
    values = dataclasses.asdict(experiment)  # `to_dict` would lose the class of a policy
    for path, value in overrides.items():
        *parents, last = path.split(".")
        target: Any = values
        for depth, name in enumerate(parents):
            if (
                isinstance(target, dict) and parents[:depth] == _OPTIONS
            ):  # by task, as many as given
                target.setdefault(name, {})
            if not isinstance(target, dict) or name not in target:
                _unknown_path(path, ".".join(parents[: depth + 1]), target)
            target = target[name]
        free_form = parents[-1:] in (["arguments"], ["columns"]) or parents[:2] == _OPTIONS
        if not isinstance(target, dict) or (last not in target and not free_form):
            _unknown_path(path, path, target)
        target[last] = dataclasses.asdict(value) if isinstance(value, _PARTS) else value
    return from_dict(Experiment, values)


_OPTIONS = ["data", "task_options"]
_PARTS = (
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RegularizerConfig,
    OptimizerConfig,
    ComputeConfig,
)


def _unknown_path(path: str, at: str, target: Any) -> typing.NoReturn:
    choices = target if isinstance(target, dict) else {}
    raise ValueError(
        f"override {path!r}: {at!r} names no field; {nearest(at.split('.')[-1], choices)}"
    )
