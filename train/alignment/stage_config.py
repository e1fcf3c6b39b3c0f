"""The configuration of a run of alignment: method, length, and which features it reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.schedule import AlignmentScheduleConfig
from echoshift.train.stage2.config import DataConfig, StreamConfig


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
