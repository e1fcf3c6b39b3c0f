"""Makes small batches, configurations and methods for the tests of alignment."""

from __future__ import annotations

from typing import Any

import torch

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.method import build_method
from echoshift.train.features import FeatureBatch, FeatureShapes
from echoshift.train.loop import SourceFeatures, StepInputs, TargetFeatures
from echoshift.train.settings import merge_settings

N_VISUAL, N_AUDIO, N_CLASSES, WIDTH = 6, 5, 3, 8
SHAPES = FeatureShapes({"pooled": (N_VISUAL,)}, N_AUDIO)
NEEDS: dict[str, dict[str, Any]] = {
    "adabn": {"setting": "uda", "network": {"batch_norm": True}},
    "mmd": {"setting": "uda"},
    "grl": {"setting": "uda"},
    "mm_sada": {"setting": "uda"},
    "rna_grl": {"setting": "uda"},
    "planamente_rerun": {"setting": "uda"},
    "yang_rerun": {"setting": "uda", "network": {"fusion": "mid"}},
}


def make_config(method: str, **changes: Any) -> AlignmentConfig:
    """Make a small configuration in which the method may stand."""
    small = {"method": method, "network": {"width": WIDTH}, "grl": {"n_hidden": 4}, "synchronisation": {"n_hidden": 4}}
    return AlignmentConfig.model_validate(merge_settings(merge_settings(small, NEEDS.get(method, {})), changes))


def build(method: str, seed: int = 0, shapes: FeatureShapes = SHAPES, **changes: Any) -> Any:
    """Build a small method."""
    return build_method(make_config(method, **changes), shapes, N_CLASSES, seed)


def make_batch(n: int, seed: int, n_clips: int = 2, silent: tuple[int, ...] = (1,)) -> FeatureBatch:
    """Make features of n segments, some of them silent."""
    rng = torch.Generator().manual_seed(seed)
    has_audio = torch.ones(n, dtype=torch.bool)
    has_audio[list(silent)] = False
    audio = torch.randn(n, N_AUDIO, generator=rng) * has_audio[:, None]
    return FeatureBatch({"pooled": torch.randn(n, n_clips, N_VISUAL, generator=rng)}, audio, has_audio)


def make_step(seed: int = 0, progress: float = 0.5, *, has_target: bool = True, **batch: Any) -> StepInputs:
    """Make a step of seven source segments of two domains, and five of the target."""
    rng = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, N_CLASSES, (7,), generator=rng)
    domains = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    target = TargetFeatures(make_batch(5, seed + 100, **batch), torch.full((5,), -1)) if has_target else None
    source = SourceFeatures(make_batch(7, seed, **batch), labels, domains)
    return StepInputs(source, target, None, torch.tensor(progress))
