"""One run of Stage 2: what it trains on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.segments import Manifest
from echoshift.train.stage1.config import TargetLabelsConfig
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.stage1_outputs import StreamInputs


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """One stream, such as rgb: its configuration and the files that it reads."""

    name: str
    config: Stage2Config
    inputs: StreamInputs


@dataclass(frozen=True, slots=True)
class Stage2Request:
    """One run.

    Attributes:
        config: what the streams have in common: selection rules, sound at test.
        described: the whole configuration as JSON; its hash names the run.
        runs_dir: where steps and results lie, `runs/DATASET`.
        row: the grid's row that asks for it.
        rerun: names of steps that are done anew.
    """

    card: DatasetCard
    manifest: Manifest
    shift: Shift
    seed: int
    config: Stage2Config
    target_labels: TargetLabelsConfig
    streams: tuple[StreamRequest, ...]
    described: Mapping[str, Any]
    runs_dir: Path
    row: str = ""
    rerun: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """Name the run in a line of progress."""
        row = f", {self.row}" if self.row else ""
        return f"{self.shift.name}, seed {self.seed}{row}"

    @property
    def is_multi_label(self) -> bool:
        """Whether a segment may have any number of classes."""
        return self.card.task == "multi-label"
