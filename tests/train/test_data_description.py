"""Checks the lines that say what a run of Stage 1 trains on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from echoshift.pipeline.cards import Shift
from echoshift.train.stage1.run import describe_data


@pytest.mark.parametrize(("n_classes", "listed"), [(3, "(c0 2, c1 1, c2 0)"), (157, "(157 classes, of each 0 to 2)")])
def test_many_classes_are_summed_up(n_classes: int, listed: str) -> None:
    """157 classes, those of CharadesEgo, once made lines of 1,500 characters."""
    labels = np.zeros((2, n_classes), np.float32)
    labels[:, 0] = labels[0, 1] = 1
    splits = SimpleNamespace(
        source_train=Part(labels), source_val=(), target_train=(), target_labelled=(), target_test=()
    )
    context = SimpleNamespace(
        splits=splits,
        request=SimpleNamespace(shift=Shift(source=("s",), target="t")),
        card=SimpleNamespace(classes=tuple(f"c{k}" for k in range(n_classes))),
        inputs=SimpleNamespace(audio=SimpleNamespace(has_audio=lambda ids: np.ones(len(ids), bool)), left_out=()),
    )
    first, _, absent = describe_data(context)  # type: ignore[arg-type]
    assert first == f"s-t: source s, 2 train segments {listed}, 0 for validation"
    names = [f"c{k}" for k in range(2, min(n_classes, 22))]
    more = " and 135 other classes" if n_classes == 157 else ""
    assert absent == f"s-t: the source has no train segment of {', '.join(names)}{more}"


class Part:
    """A part with labels and nothing else."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)
