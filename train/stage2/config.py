"""Stage 2's configuration: every hyper-parameter of METHODS section 6, each with its default in one place.

The defaults are the preset `paper`: what Zhang et al. 2022 print; where they are silent, what their released code does.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from echoshift.pipeline.specs import SpecModel

SelectionRule = Literal["last", "mean_last", "source_val", "target_oracle"]


class RecogniserConfig(SpecModel):
    """What the audio-infused recogniser is.

    z^m (Eq. 5) is `class_token=learnable`, `audio_tokens=true`, `domain_embedding=none`; z' (Eq. 6) is z^m with
    `domain_embedding=per_domain`; z (Eq. 7) is the default. `class_token` `h` takes the first of the two selections of
    activity sounds, without looking at the frames. `class_tokens` `per_clip` sends one class token a clip through the
    transformer, whose logits are averaged. `bank_width` is that of the activity-sound vectors, 0: as wide as the
    tokens. `fc` is what makes h and h': one `linear` layer, or one `hidden` layer of `fc_width` with BatchNorm.
    `clips` `joint`: all clips of a segment are the tokens of one prediction; `each`: a prediction a clip (CharadesEgo),
    combined by `over_clips` at test.
    """

    class_token: Literal["learnable", "h", "h_prime"] = "h_prime"
    class_tokens: Literal["mean", "per_clip"] = "mean"
    audio_tokens: bool = False
    domain_embedding: Literal["none", "shared", "per_domain"] = "per_domain"
    width: int = Field(default=512, gt=0)
    bank_width: int = Field(default=0, ge=0)
    n_layers: int = Field(default=2, gt=0)
    n_heads: int = Field(default=8, gt=0)
    head_width: int = Field(default=64, gt=0)
    mlp_width: int = Field(default=512, gt=0)
    dropout: float = Field(default=0.15, ge=0, lt=1)
    visual_width: int = Field(default=64, gt=0)
    fc: Literal["linear", "hidden"] = "linear"
    fc_width: int = Field(default=512, gt=0)
    clips: Literal["joint", "each"] = "joint"
    over_clips: Literal["mean", "max"] = "mean"


class LossConfig(SpecModel):
    """What the terms of Eq. 8 weigh: cross-entropy of p* on source and target, of h and of h' (eta).

    `sound_terms_on` says on which domains h and h' are trained. The paper gives no eta [?]; 0.1 is the released code's
    weight of h.
    """

    source: float = Field(default=1.0, ge=0)
    target: float = Field(default=1.0, ge=0)
    h: float = Field(default=0.1, ge=0)
    h_prime: float = Field(default=0.1, ge=0)
    sound_terms_on: Literal["both", "source"] = "both"


class PseudoLabelConfig(SpecModel):
    """What takes the place of the target's labels.

    `hard`: Stage 1's argmax; `thresholded`: those to which it gives at least `threshold`; `none`; `oracle`, the truth.
    Multi-label, `hard` and `thresholded` are the classes to which Stage 1 gives at least `threshold`. `oracle` reads
    the target's labels: an upper bound, which tables mark as one.
    """

    kind: Literal["hard", "thresholded", "none", "oracle"] = "hard"
    threshold: float = Field(default=0.5, gt=0, lt=1)


class MissingSoundConfig(SpecModel):
    """What takes the place of the audio feature of a silent segment: a learned embedding, or the source's mean.

    `p_missing` is how often a segment's sound is withheld in training, so that the embedding is learned [?].
    """

    embedding: Literal["learned", "mean"] = "learned"
    p_missing: float = Field(default=0.1, ge=0, lt=1)


class TestConfig(SpecModel):
    """What test segments are predicted from: `sound` = `missing` takes the sound away.

    Zhang et al., section 5.1, report 51.2 on EPIC without sound. Visual features are then those that Stage 1's encoder
    makes without sound.
    """

    __test__ = False  # it is no test of pytest's

    sound: Literal["kept", "missing"] = "kept"


class ScheduleConfig(SpecModel):
    """How the recogniser is trained; `n_steps` other than 0 takes the place of `n_epochs`.

    A batch has n_source + n_target segments, and n_labelled of the target where it has labels. An epoch is one over the
    source.
    """

    lr: float = Field(default=7e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    n_source: int = Field(default=8, gt=0)
    n_target: int = Field(default=8, gt=0)
    n_labelled: int = Field(default=8, gt=0)
    n_epochs: int = Field(default=29, gt=0)
    n_steps: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"


class SelectionConfig(SpecModel):
    """By which rules the weights that are scored are chosen; each gives a result of its own.

    `last`; `source_val`, the epoch that is best on the source's test split; `target_oracle`, the one that is best on
    what is scored, an upper bound.
    """

    rules: tuple[SelectionRule, ...] = Field(default=("last",), min_length=1)


class StreamConfig(SpecModel):
    """One stream, such as rgb or flow, whose probabilities are averaged with the others'.

    `stage1` are overrides of Stage 1's configuration for this stream, `stage2` of this one. `features` and the three
    beside it are files made elsewhere, which take the place of Stage 1's: stores of features, of training views, and of
    sound, and a table; `{shift}` and `{seed}` in them are filled in.
    """

    name: str = Field(default="rgb", pattern=r"^[a-z0-9_]+$")
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()
    features: str = ""
    train_features: str = ""
    sound: str = ""
    table: str = ""


class DataConfig(SpecModel):
    """How features are held: those that would take more than `max_memory_mb` stay in their store."""

    max_memory_mb: int = Field(default=16384, gt=0)


class Stage2Config(SpecModel):
    """Everything that decides Stage 2's result but data and seed."""

    recogniser: RecogniserConfig = RecogniserConfig()
    loss: LossConfig = LossConfig()
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    missing_sound: MissingSoundConfig = MissingSoundConfig()
    test: TestConfig = TestConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    selection: SelectionConfig = SelectionConfig()
    streams: tuple[StreamConfig, ...] = Field(default=(StreamConfig(),), min_length=1)
    data: DataConfig = DataConfig()

    @field_validator("streams")
    @classmethod
    def _check_streams(cls, streams: tuple[StreamConfig, ...]) -> tuple[StreamConfig, ...]:
        names = [stream.name for stream in streams]
        if len(set(names)) < len(names):
            raise ValueError(f"two streams have one name: {', '.join(names)}")
        return streams

    def describe(self) -> dict[str, Any]:
        """Return as JSON everything that decides a result; how features are held isn't among it."""
        described = self.model_dump(mode="json")
        del described["data"]
        return described
