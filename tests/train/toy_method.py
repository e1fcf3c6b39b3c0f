"""Makes a small method, and small features, for tests of the loop that trains any method."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.features import FeatureBatch, FeatureRows
from echoshift.train.loop import Domain, Dropouts, Schedule, StepInputs, TrainingData, TrainingJob

N_CLASSES, N_CLIPS, N_VISUAL, N_AUDIO = 3, 2, 5, 4


class ToyMethod(nn.Module):
    """A linear classifier of pictures and sound with BatchNorm, dropout and a term of the target."""

    loss_names = ("source", "target")

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.BatchNorm1d(N_VISUAL + N_AUDIO)
            self.linear = nn.Linear(N_VISUAL + N_AUDIO, N_CLASSES)
            self.frozen = nn.Parameter(torch.randn(N_CLASSES), requires_grad=False)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the two terms."""
        of_source = F.cross_entropy(self._classify(step.source.inputs, dropouts), step.source.labels)
        of_target = torch.zeros(())
        if step.target is not None:
            of_target = self._classify(step.target.inputs, dropouts).square().mean() * step.progress
        return torch.stack([of_source, of_target.to(of_source)])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict a softmax."""
        return self._classify(inputs, Dropouts()).softmax(dim=-1)

    def _classify(self, inputs: FeatureBatch, dropouts: Dropouts) -> Tensor:
        seen = torch.cat([inputs.visual["pooled"].mean(dim=1), inputs.audio], dim=-1)
        return self.linear(dropouts.drop(self.norm(seen), 0.25)) + self.frozen


def make_rows(n: int, seed: int, *, n_views: int = 2) -> FeatureRows:
    """Make features of n segments."""
    rng = np.random.default_rng(seed)
    return FeatureRows(
        tuple(f"s{i}" for i in range(n)),
        {"pooled": torch.from_numpy(rng.standard_normal((n, n_views, N_CLIPS, N_VISUAL)).astype(np.float16))},
        torch.from_numpy(rng.standard_normal((n, N_AUDIO)).astype(np.float32)),
        torch.ones(n, dtype=torch.bool),
    )


def make_job(
    seed: int, n_steps: int = 12, *, n_rows: int = 30, rows: FeatureRows | None = None, **schedule: Any
) -> TrainingJob:
    """Make a job on 18 segments of the source and 12 of the target."""
    rows = rows or make_rows(n_rows, seed)
    rng = np.random.default_rng(seed + 1)
    data = TrainingData(
        train=rows,
        source=np.arange(18),
        source_labels=rng.integers(0, N_CLASSES, 18),
        source_domains=np.zeros(18, dtype=np.int64),
        target=np.arange(18, 30),
        pseudo_labels=np.full(12, -1),
        labelled=np.zeros(0, dtype=np.int64),
        labelled_labels=np.zeros(0, dtype=np.int64),
    )
    settings: dict[str, Any] = {"optimiser": "adam", "lr": 1e-2, "weight_decay": 1e-3, **schedule}
    return TrainingJob(
        title=f"toy {seed}",
        build=lambda: ToyMethod(seed),
        data=data,
        schedule=Schedule(n_source=4, n_target=3, n_labelled=2, n_steps=n_steps, **settings),
        seed=seed,
    )
