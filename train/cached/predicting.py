"""Predicts rows of cached features with a method that is trained."""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from echoshift.train.cached.batches import Domain, Method
from echoshift.train.cached.feature_bank import Rows, make_bank

_N_AT_ONCE = 256


@torch.inference_mode()
def predict_rows(
    method: nn.Module,
    rows: Rows,
    index: np.ndarray,
    domain: Domain,
    device: torch.device,
    *,
    one_clip: bool = False,
    over_clips: Literal["mean", "max"] = "mean",
) -> np.ndarray:
    """Predict the segments whose row numbers are `index`, int64 [n]; return probabilities float32 [n, K].

    The mean over views. With `one_clip` each clip is predicted by itself, and `over_clips` combines them (METHODS 6:
    the maximum for CharadesEgo). The method is in eval mode, on the device.
    """
    bank = make_bank([rows], device)
    found = []
    for start in range(0, len(index), _N_AT_ONCE):
        part = torch.from_numpy(index[start : start + _N_AT_ONCE]).to(device)
        views = []
        for view in range(rows.n_views):
            of_view = torch.full_like(part, view)
            clips = [torch.full_like(part, clip) for clip in range(rows.n_clips)] if one_clip else [None]
            batches = [bank.gather(part, of_view, clip) for clip in clips]
            each = torch.stack([cast(Method, method).predict(batch, domain).float() for batch in batches])
            views.append(each.amax(dim=0) if over_clips == "max" else each.mean(dim=0))
        found.append(torch.stack(views).mean(dim=0).cpu().numpy())
    return np.concatenate(found)
