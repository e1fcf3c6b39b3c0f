"""Finds streams that training has killed: units of f^v or f^a that are the same whatever the segment."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from train.alignment.stage_config import AlignmentStageConfig
from train.alignment.two_streams import TwoStreams
from train.cached.feature_bank import Rows, make_bank

# Streams that learn have up to 0.72 of their units dead (half of them are from the start, where features are much the
# same), streams that a few steps threw off from 0.81 on (benchmarks/README.md, norm_gap and grid_av).
MANY = 0.8
_N_LOOKED_AT, _N_AT_ONCE = 512, 128


@torch.inference_mode()
def measure_dead_units(method: nn.Module, rows: Rows, index: np.ndarray, *, one_clip: bool) -> dict[str, float]:
    """Measures which share of each stream's units is the same for every segment, `pictures` and `sound`, 0..1.

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


def describe_dead_units(shares: Mapping[str, float], config: AlignmentStageConfig) -> tuple[str, ...]:
    """Says in a line which streams are dead, with the settings that help; nothing where none has many dead units."""
    dead = [f"{share:.0%} of the units of {name}" for name, share in shares.items() if share >= MANY]
    if not dead:
        return ()
    alignment, knobs = config.alignment, [f"iterations.lr ({config.iterations.lr:g})"]
    if alignment.method in ("rna", "rna_grl", "planamente_rerun"):
        knobs.append(f"alignment.rna.weight ({alignment.rna.weight:g})")
    if alignment.method == "hna":
        knobs.append(f"alignment.hna.weight ({alignment.hna.weight:g})")
    return (
        f"training has left {' and '.join(dead)} the same for every segment: its first steps were too long for "
        f"features of this scale; lower {' or '.join(knobs)}",
    )
