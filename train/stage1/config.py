"""Stage 1's configuration: every hyper-parameter of METHODS section 5, each with its default in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.config import AlignmentConfig


class VisualConfig(SpecModel):
    """The network that sees the frames, and their form.

    `mode`: `frames` decodes and augments in every epoch (the reference); `trunk` trains from level-2 stores of
    `n_views` augmented views, made once. `train_preset` and `test_preset` are extraction presets; `overrides`
    are those of `echoshift extract --set`, applied to both. `weights` is a reference of `echoshift weights ls`, a file
    or `random:SEED`; "" takes the catalogue's preferred ones. `n_readers` is how many processes decode (None: the
    device's own number), `n_cached_mb` how many MB of decoded frames are kept from epoch to epoch.
    """

    encoder: str
    weights: str = ""
    mode: Literal["frames", "trunk"] = "frames"
    train_preset: str = "zhang-stage1-train"
    test_preset: str = "zhang-stage2-test"
    overrides: tuple[str, ...] = ()
    n_views: int = Field(default=4, gt=0)
    n_readers: int | None = Field(default=None, ge=0)
    n_cached_mb: int = Field(default=2048, ge=0)


class SoundConfig(SpecModel):
    """The audio network; `weights` and `overrides` as in VisualConfig.

    `n_views` is how many views of a segment's audio are stored, of which training draws one each time it takes a
    segment: the clean one, and n_views - 1 with noise and masked bands [A-code: 0.05 and 9; `overrides` of audio.noise
    and audio.n_masked_bins say otherwise]. 1 trains on clean audio; whatever isn't training hears the clean view.
    """

    encoder: str
    weights: str = ""
    overrides: tuple[str, ...] = ()
    n_views: int = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _check_overrides(self) -> SoundConfig:
        for override in self.overrides:
            if override.partition("=")[0].strip().endswith("audio.n_views"):
                raise ValueError(f"override {override!r}: say it as sound.n_views, so that training draws the views")
        return self


class AudioClassifierConfig(SpecModel):
    """Training of layer4 and the classifier of the audio network on the source (METHODS 5.1)."""

    lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    batch: int = Field(default=16, gt=0)
    n_epochs: int = Field(default=4, gt=0)


class ClusterConfig(SpecModel):
    """Search for interaction clusters (METHODS 5.2)."""

    max_clusters: int = Field(default=20, gt=0)
    n_init: int = Field(default=10, gt=0)


class BalanceConfig(SpecModel):
    """Weights of source samples (METHODS 5.3; Eq. 2 and 3).

    `normalised` scales class weights so that they sum to the number of classes, and cluster weights of a class to its
    number of clusters, as Cui et al. and the released code do. Raw products, which is what the paper prints, average
    3e-4 on EPIC's D1, beside which the absent activities' loss with lambda 1 leaves the labels no say (DECISIONS).
    """

    kind: Literal["none", "class", "audio"] = "audio"
    beta: float = Field(default=0.999, ge=0, lt=1)
    normalised: bool = True


class AbsentConfig(SpecModel):
    """Learning of absent activities (METHODS 5.4; Eq. 1): `weight` is lambda, 0 leaves them out.

    `n_absent` is r (single-label), `gamma` the multi-label share.
    """

    weight: float = Field(default=1.0, ge=0)
    n_absent: int = Field(default=3, gt=0)
    gamma: float = Field(default=0.05, gt=0, le=1)


class AttentionConfig(SpecModel):
    """The audio-based attention (METHODS 5.5).

    `p_missing` is how often a segment's audio is withheld in training, so that the learned missing-audio embedding is
    learned [?].
    """

    enabled: bool = True
    width: int = Field(default=256, gt=0)
    n_layers: int = Field(default=8, gt=0)
    n_heads: int = Field(default=8, gt=0)
    head_width: int = Field(default=64, gt=0)
    mlp_width: int = Field(default=512, gt=0)
    dropout: float = Field(default=0.15, ge=0, lt=1)
    embedding_dropout: float = Field(default=0.1, ge=0, lt=1)
    p_missing: float = Field(default=0.1, ge=0, lt=1)


class TrainingConfig(SpecModel):
    """Training of the encoder (METHODS 5.6).

    `lr_by_source` overrides `lr` where the shift has exactly that one source domain. `trainable_from` names the first
    stage whose weights train; `split` is the one after the split point (res5 of SlowFast, Mixed_5b of I3D).
    `batch_norm` is the mode of the frozen part's BatchNorm. A batch has n_source + n_target segments (and n_labelled of
    the target, where there are labels), computed in `n_accumulated` parts one after the other. Every `validate_every`
    epochs the source's validation split is scored, 0 never.
    """

    lr: float = Field(default=1e-4, gt=0)
    lr_by_source: dict[str, float] = Field(default_factory=dict)
    weight_decay: float = Field(default=1e-4, ge=0)
    n_source: int = Field(default=16, gt=0)
    n_target: int = Field(default=16, gt=0)
    n_labelled: int = Field(default=16, gt=0)
    n_accumulated: int = Field(default=1, gt=0)
    n_epochs: int = Field(default=15, gt=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    trainable_from: str = "split"
    batch_norm: Literal["eval", "train"] = "eval"
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every: int = Field(default=1, ge=0)

    def find_lr(self, source: Sequence[str]) -> float:
        """Find the learning rate for a shift from these domains."""
        return self.lr_by_source.get(source[0], self.lr) if len(source) == 1 else self.lr


class TargetLabelsConfig(SpecModel):
    """The labelled part of the target's train split (semi-supervised CharadesEgo), and the pairs that are used.

    `labelled_fraction` is the first part of the target's train segments in file order; None takes the manifest's tags
    `labelled` where `use_tags`. `pairs` thins the train splits as `manifest import charades_ego --pairs` does.
    `clusters_from` says whose audio is clustered: the source's, or the labelled target's, whose clusters the paired
    source videos then take (METHODS 9).
    """

    use_tags: bool = False
    labelled_fraction: float | None = Field(default=None, ge=0, le=1)
    pairs: Literal["all", "half", "none"] = "all"
    clusters_from: Literal["source", "labelled-target"] = "source"

    @model_validator(mode="after")
    def _check_choice(self) -> TargetLabelsConfig:
        if self.use_tags and self.labelled_fraction is not None:
            raise ValueError("`use_tags` and `labelled_fraction` exclude each other")
        return self


class ExportConfig(SpecModel):
    """Output of Stage 1: stores of adapted features, and pseudo-labels (METHODS 5.7).

    `outputs` are those of the visual encoder; `train_preset` is that of a second store with the train splits alone, ""
    for none. `label_preset` is what pseudo-labels are the mean over.
    """

    outputs: tuple[str, ...] = ("pooled",)
    train_preset: str = "zhang-stage2-train"
    label_preset: str = "zhang-stage2-test"


class ObjectiveConfig(AlignmentConfig):
    """The method of Planamente et al. that trains the encoder end to end, in place of Eq. 4; fields as there.

    The method's projections, classifiers and losses take the pooled features of the visual network and of the audio
    network, whose layer4 trains with it; predictions are the method's. `network.clips` has no effect: training sees one
    clip of a segment, at test each is predicted by itself.
    """

    enabled: bool = False

    @model_validator(mode="after")
    def _check_use(self) -> ObjectiveConfig:
        if not self.enabled:
            return self
        if self.method in ("adabn", "planamente_rerun", "yang_rerun"):
            raise ValueError(f"method {self.method} is one of cached features; run `echoshift align`")
        if self.setting == "supervised":
            raise ValueError("setting 'supervised' is one of `echoshift align`; use 'dg' or 'uda'")
        return self


class EvaluationConfig(SpecModel):
    """What is scored: `sound` = `missing` takes the audio away at test (METHODS 6; A: 50.7 on EPIC).

    The gates are then those of the missing-audio embedding, which attention.p_missing above 0 teaches.
    """

    sound: Literal["kept", "missing"] = "kept"


class Stage1Config(SpecModel):
    """Everything that decides Stage 1's result but data and seed."""

    visual: VisualConfig
    sound: SoundConfig
    audio_classifier: AudioClassifierConfig = AudioClassifierConfig()
    clusters: ClusterConfig = ClusterConfig()
    balance: BalanceConfig = BalanceConfig()
    absent: AbsentConfig = AbsentConfig()
    attention: AttentionConfig = AttentionConfig()
    training: TrainingConfig = TrainingConfig()
    target_labels: TargetLabelsConfig = TargetLabelsConfig()
    export: ExportConfig = ExportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _check_objective(self) -> Stage1Config:
        if self.objective.enabled and (self.absent.weight or self.balance.kind != "none"):
            raise ValueError(
                "an objective has losses of its own; set absent.weight=0 and balance.kind=none beside objective.enabled"
            )
        return self

    @model_validator(mode="after")
    def _check_missing_sound(self) -> Stage1Config:
        taught = not self.attention.enabled or self.attention.p_missing > 0
        if self.evaluation.sound == "missing" and not taught:
            raise ValueError(
                "evaluation.sound 'missing' needs attention.p_missing above 0, which trains the missing embedding"
            )
        return self

    def describe(self) -> dict[str, Any]:
        """Return as JSON everything that decides a result; speed isn't among it."""
        described = self.model_dump(mode="json")
        for name in ("n_readers", "n_cached_mb"):
            del described["visual"][name]
        if self.sound.n_views == 1:
            del described["sound"]["n_views"]  # the same runs as before views existed
        if not self.objective.enabled:
            del described["objective"]  # a disabled one decides nothing
        return described
