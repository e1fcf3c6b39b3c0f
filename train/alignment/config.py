"""The configuration of alignment: METHODS section 7, each default in one place, a method's own in its file.

[M] is Munro and Damen's released code (MM-SADA), where Planamente et al. 2021 say nothing; [?] is a choice of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from echoshift.pipeline.errors import suggest
from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import find_method, list_builtin, list_methods, load_builtin
from echoshift.train.alignment.methods.align import AngularAlignment
from echoshift.train.alignment.methods.grl import GradientReversal
from echoshift.train.alignment.methods.hna import HardNormAlignment
from echoshift.train.alignment.methods.mmd import MaximumMeanDiscrepancy
from echoshift.train.alignment.methods.orth import Orthogonality
from echoshift.train.alignment.methods.rna import RelativeNormAlignment
from echoshift.train.alignment.methods.synchronisation import Synchronisation
from echoshift.train.stage2.config import DataConfig, StreamConfig

_COMMON_PARTS = ("enabled", "method", "setting", "class_weight", "network", "own", "source")


class NetworkConfig(SpecModel):
    """The network on the cached features: a trainable projection a modality, then the classifier.

    A projection is a linear layer of `width` and a ReLU, with BatchNorm after it where `batch_norm`. `fusion` `late`
    sums the logits of two classifiers, `mid` has one classifier of both features side by side. `clips` `one` (the
    paper's): training sees one random clip of a segment, at test each is predicted by itself and probabilities are
    averaged; `mean` averages the cached features of all clips; `each` projects every clip and averages what comes out.
    `modalities` other than `both` are Figure 5's.
    """

    width: int = Field(default=1024, gt=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    batch_norm: bool = False
    fusion: Literal["late", "mid"] = "late"
    clips: Literal["one", "mean", "each"] = "one"
    modalities: Literal["both", "visual", "audio"] = "both"

    @model_validator(mode="after")
    def _check_fusion(self) -> NetworkConfig:
        if self.fusion == "mid" and self.modalities != "both":
            raise ValueError("fusion 'mid' needs modalities 'both'")
        return self


class AlignmentConfig(SpecModel):
    """Everything that decides a method's loss and network.

    `setting` is what training sees: `dg` the labelled source alone (one or several domains), `uda` the unlabelled
    target too, `supervised` the target's own labelled training split as if it were the source.
    `class_weight` is that of the source's cross-entropy; 0.2 in [M] where the domains are adapted.
    The paper's BatchNorm is `source_only` with `network.batch_norm`.
    The parts that bear methods' names are the settings of those, and of the methods that join them (`reads`). `own` are
    the settings of any other method, and `source` is where one from outside came from, which is found, not set.
    """

    method: str = "rna"
    setting: Literal["dg", "uda", "supervised"] = "dg"
    class_weight: float = Field(default=1.0, ge=0)
    network: NetworkConfig = NetworkConfig()
    rna: RelativeNormAlignment.Settings = RelativeNormAlignment.Settings()
    hna: HardNormAlignment.Settings = HardNormAlignment.Settings()
    align: AngularAlignment.Settings = AngularAlignment.Settings()
    orth: Orthogonality.Settings = Orthogonality.Settings()
    synchronisation: Synchronisation.Settings = Synchronisation.Settings()
    mmd: MaximumMeanDiscrepancy.Settings = MaximumMeanDiscrepancy.Settings()
    grl: GradientReversal.Settings = GradientReversal.Settings()
    own: dict[str, Any] = Field(default_factory=dict)
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Complete `own` and `source`, so that what a run's name is made of holds them."""
        if not isinstance(values, dict):
            return values
        name = values.get("method", cls.model_fields["method"].default)
        found = find_method(name) if isinstance(name, str) else None
        if found is None:
            return values  # `_check_name` says so
        return {**values, "own": found.fill_settings(values.get("own", {})), "source": found.source}

    @model_serializer(mode="wrap")
    def _describe(self, describe: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a method hasn't, so that the runs of those without keep their names."""
        described: dict[str, Any] = describe(self)
        if not self.source:
            del described["source"]
            if not self.own:
                del described["own"]
        return described

    @field_validator("method")
    @classmethod
    def _check_name(cls, method: str) -> str:
        names = list_methods()
        if method not in names:
            raise ValueError(f"unknown method {method!r}; {suggest(method, names, listed_by='echoshift list methods')}")
        return method

    @model_validator(mode="after")
    def _check_method(self) -> AlignmentConfig:
        found = find_method(self.method)
        assert found is not None, "`_check_name` looked"
        if found.adapts and self.setting != "uda":
            raise ValueError(f"method {self.method} adapts to the target; it needs setting 'uda'")
        for name, values in found.allowed.items():
            if getattr(self.network, name) not in values:
                shown = " or ".join(str(value).lower() for value in values)
                raise ValueError(f"method {self.method} needs network.{name}={shown}")
        return self


def keep_used(described: Mapping[str, Any]) -> dict[str, Any]:
    """Keep, of an AlignmentConfig as JSON, what its method reads: the common parts and its own, no other method's.

    Whatever names a training or a record by its configuration goes through this, so that a new method, or a new field
    of one, changes no other method's names.
    """
    built_in = not described.get("source") and described["method"] in list_builtin()
    parts = (*_COMMON_PARTS, *(load_builtin(described["method"]).reads if built_in else ()))
    return {name: value for name, value in described.items() if name in parts}


class AlignmentScheduleConfig(SpecModel):
    """How a method is trained, by SGD: `lr` until `lr_drop_step`, then `dropped_lr`.

    A batch has `n_batch` segments; where there is a target, half of them are the target's, as in Munro and Damen's
    code. The score is the mean over the last `n_checkpoints` checkpoints, which are `checkpoint_every` steps apart: the
    paper has 9 and doesn't say how far apart, 50 is Munro and Damen's.
    """

    n_steps: int = Field(default=9000, gt=0)
    n_batch: int = Field(default=128, gt=1)
    lr: float = Field(default=0.01, gt=0)
    lr_drop_step: int = Field(default=3000, ge=0)
    dropped_lr: float = Field(default=0.001, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-7, ge=0)
    n_checkpoints: int = Field(default=9, gt=0)
    checkpoint_every: int = Field(default=50, gt=0)

    @model_validator(mode="after")
    def _check_checkpoints(self) -> AlignmentScheduleConfig:
        if (self.n_checkpoints - 1) * self.checkpoint_every >= self.n_steps:
            raise ValueError("the checkpoints that are averaged begin before the first step; raise n_steps")
        return self

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The numbers of steps after which the averaged predictions are made, but for the last."""
        return tuple(self.n_steps - k * self.checkpoint_every for k in range(self.n_checkpoints - 1, 0, -1))


class ScoringConfig(SpecModel):
    """How a run is scored: `mean_last`, the mean over the last checkpoints (the paper's), and `last`."""

    rules: tuple[Literal["mean_last", "last"], ...] = Field(default=("mean_last", "last"), min_length=1)


class FeaturesConfig(SpecModel):
    """Which features a stream reads: `cache`, what was extracted, or `stage1`, what Stage 1 made of it.

    In the cache a stream reads the stores of Stage 1's `visual.encoder` and `sound.encoder` with `pooled` features.
    """

    of: Literal["cache", "stage1"] = "cache"


class AlignmentStageConfig(SpecModel):
    """Everything that decides a run's result but data and seed.

    `networks` are as Stage 2's `streams`: rgb, flow, …, each trained with the sound, whose probabilities are averaged.
    """

    alignment: AlignmentConfig = AlignmentConfig()
    iterations: AlignmentScheduleConfig = AlignmentScheduleConfig()
    scoring: ScoringConfig = ScoringConfig()
    features: FeaturesConfig = FeaturesConfig()
    networks: tuple[StreamConfig, ...] = Field(default=(StreamConfig(),), min_length=1)
    memory: DataConfig = DataConfig()

    @field_validator("networks")
    @classmethod
    def _check_networks(cls, networks: tuple[StreamConfig, ...]) -> tuple[StreamConfig, ...]:
        names = [network.name for network in networks]
        if len(set(names)) < len(names):
            raise ValueError(f"two networks have one name: {', '.join(names)}")
        return networks

    def describe(self) -> dict[str, Any]:
        """Return as JSON everything that decides a result; how features are held isn't among it."""
        described = self.model_dump(mode="json")
        del described["memory"]
        return described
