"""Finds trainings that came to their end and to nothing: streams whose units are dead, classes that weren't learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.train.alignment.stage_config import AlignmentStageConfig
from echoshift.train.alignment.two_streams import TwoStreams
from echoshift.train.cached.feature_bank import Rows, make_bank
from echoshift.train.cached.training import TrainedRun

# Half of a stream's units are dead from the start where features are much the same, and adaptation that works leaves
# up to 0.95 (DECISIONS.md, a dead stream).
ALL_BUT_NONE = 0.99
_N_LOOKED_AT, _N_AT_ONCE = 512, 128


@torch.inference_mode()
def measure_dead_units(method: nn.Module, rows: Rows, index: np.ndarray, *, one_clip: bool) -> dict[str, float]:
    """Measure which share of each stream's units is the same for every segment, `pictures` and `sound`, 0..1.

    A unit behind a ReLU is dead where its input is below 0 for all segments: no gradient reaches it again. Looks at up
    to 512 of the segments whose row numbers are `index`, int64 [n], at all their clips, or, unless `one_clip`, at their
    mean; of sound at those that have any. A stream that the network hasn't isn't measured, nor is one of fewer than two
    segments, nor a method without the two streams. The method is on the CPU, and in eval mode afterwards.
    """
    streams = next((module for module in method.eval().modules() if isinstance(module, TwoStreams)), None)
    if streams is None:
        return {}
    bank = make_bank([rows], torch.device("cpu"))
    spread = np.unique(np.linspace(0, len(index) - 1, min(len(index), _N_LOOKED_AT)).astype(np.int64))
    looked_at = torch.from_numpy(index[spread])
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    n_seen = {"pictures": 0, "sound": 0}
    for part in looked_at.split(_N_AT_ONCE):
        view = torch.zeros_like(part)
        for clip in [torch.full_like(part, clip) for clip in range(rows.n_clips)] if one_clip else [None]:
            visual, audio, heard = streams.encode(bank.gather(part, view, clip), "source")
            for name, values in (("pictures", visual), ("sound", audio[heard])):
                if not len(values):
                    continue
                n_seen[name] += len(values)
                least, most = values.amin(dim=0), values.amax(dim=0)
                low[name] = torch.minimum(low[name], least) if name in low else least
                high[name] = torch.maximum(high[name], most) if name in high else most
    there = {"pictures": streams.project_visual is not None, "sound": streams.project_audio is not None}
    return {
        name: float((low[name] == high[name]).float().mean())
        for name, is_there in there.items()
        if is_there and n_seen[name] > 1
    }


def compute_guessing_loss(labels: np.ndarray) -> float:
    """Compute the loss of who knows only how often each class occurs in labels int64 [n], or 0 and 1 [n, K], in nats.

    It is the entropy of the classes, or, multi-label, the mean over classes of each one's.
    """
    if labels.ndim == 1:
        shares = np.bincount(labels) / len(labels)
        return float(-sum(share * np.log(share) for share in shares if share > 0))
    of_class = labels.mean(axis=0, dtype=np.float64)
    both = np.stack([of_class, 1 - of_class])
    return float(-(both * np.log(np.where(both > 0, both, 1))).sum(axis=0).mean())


def describe_collapse(
    run: TrainedRun, shares: Mapping[str, float], labels: np.ndarray, config: AlignmentStageConfig
) -> tuple[str, ...]:
    """Describe in a line each which streams are dead (`shares`, `measure_dead_units`), and that no class was learned.

    That is where the last epoch's mean class loss isn't below `compute_guessing_loss` of the training's `labels`; a
    method from outside, whose terms are its own, isn't judged by it. The settings that help stand in the line.
    """
    alignment, steps = config.alignment, config.iterations
    knobs = [f"iterations.lr ({steps.lr:g})"]
    for name, methods in _WEIGHTED.items():
        if alignment.method in methods:
            knobs.append(f"alignment.{name}.weight ({getattr(alignment, name).weight:g})")
    lower = f"lower {' or '.join(knobs)}"
    found = []
    dead = [f"{share:.1%} of the units of {name}" for name, share in shares.items() if share >= ALL_BUT_NONE]
    if dead:
        found.append(
            f"training has left {' and '.join(dead)} the same for every segment; where that isn't what the method is "
            f"for, {lower}"
        )
    if not alignment.source and alignment.class_weight > 0:
        reached, guessed = float(run.losses[-1, 0]) / alignment.class_weight, compute_guessing_loss(labels)
        if reached >= guessed:
            found.append(
                f"no class was learned: at the end the source's class loss is {reached:.2f}, that of guessing "
                f"{guessed:.2f}; {lower}, or, where it has hardly begun, raise iterations.n_steps ({steps.n_steps})"
            )
    return tuple(found)


_WEIGHTED: Mapping[str, tuple[str, ...]] = {
    "rna": ("rna", "rna_grl", "planamente_rerun"),
    "hna": ("hna",),
    "mmd": ("mmd",),
}
