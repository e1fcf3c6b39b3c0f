"""What each term of Eq. 8 counts: h' by hand, sound that is withheld, several labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from echoshift.train.features import FeatureBatch, FeatureShapes
from echoshift.train.loop import Dropouts, SourceFeatures, StepInputs, TargetFeatures
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import AudioInfusedRecogniser, build_recogniser

N_CLASSES, N_AUDIO, N_VISUAL, N_CLIPS, N = 3, 5, 6, 2, 4
SMALL = {"width": 8, "n_heads": 2, "head_width": 4, "mlp_width": 8, "visual_width": 4}


def build(seed: int = 0, *, multi_label: bool = False, p_missing: float = 0.1, **recogniser: Any) -> Any:
    config = Stage2Config.model_validate(
        {"recogniser": {**SMALL, **recogniser}, "missing_sound": {"p_missing": p_missing}}
    )
    shapes = FeatureShapes({"pooled": (N_VISUAL,)}, N_AUDIO, multi_label=multi_label)
    return build_recogniser(config, shapes, N_CLASSES, torch.linspace(-1, 1, N_AUDIO), seed)


def make_step(labels: Tensor, pseudo: Tensor | None = None, seed: int = 0) -> StepInputs:
    rng = torch.Generator().manual_seed(seed)

    def draw() -> FeatureBatch:
        heard = torch.tensor([True, False, True, True])
        visual = torch.randn(N, N_CLIPS, N_VISUAL, generator=rng)
        return FeatureBatch({"pooled": visual}, torch.randn(N, N_AUDIO, generator=rng), heard)

    source = SourceFeatures(draw(), labels, torch.zeros(N, dtype=torch.int64))
    return StepInputs(source, None if pseudo is None else TargetFeatures(draw(), pseudo), None, torch.tensor(0.0))


def select_by_hand(model: AudioInfusedRecogniser, batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray]:
    """The logits of h [N, K] and of h' [N, n_clips, K], segment by segment, in NumPy."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ state[f"sound_token.{name}.weight"].T + state[f"sound_token.{name}.bias"])

    h, h_prime = [], []
    for visual, audio, has_audio in zip(batch.visual["pooled"], batch.audio, batch.has_audio, strict=True):
        h.append(linear(audio.double().numpy() if has_audio else state["missing_sound"], "heard.out"))
        mixture = np.exp(h[-1]) / np.exp(h[-1]).sum() @ state["sound_token.bank"]
        narrow = linear(visual.double().numpy(), "narrow")
        spread = np.sqrt(narrow.var(1, keepdims=True) + 1e-5)
        narrow = np.maximum((narrow - narrow.mean(1, keepdims=True)) / spread, 0)  # its norm is fresh: weight 1, bias 0
        h_prime.append(linear(np.concatenate([np.tile(mixture, (N_CLIPS, 1)), narrow], axis=1), "chosen.out"))
    return np.stack(h), np.stack(h_prime)


def cross_entropy(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[label])


def compute_terms(
    model: AudioInfusedRecogniser, step: StepInputs, dropouts: Dropouts | None = None
) -> dict[str, float]:
    with torch.no_grad():
        terms = model.losses(step, dropouts or Dropouts())
    return dict(zip(model.loss_names, terms.tolist(), strict=True))


def test_h_prime_is_learned_from_each_clip_of_silent_segments_too() -> None:
    model = build().eval()
    labels, pseudo = [2, 0, 1, 1], [-1, 2, 0, -1]
    step = make_step(torch.tensor(labels), torch.tensor(pseudo))
    assert step.target is not None
    of_source = select_by_hand(model, step.source.inputs)
    of_target = select_by_hand(model, step.target.inputs)
    source = [cross_entropy(of_source[1][i, c], labels[i]) for i in range(4) for c in range(N_CLIPS)]
    target = [cross_entropy(of_target[1][i, c], pseudo[i]) for i in (1, 2) for c in range(N_CLIPS)]
    terms = compute_terms(model, step)
    assert terms["h'"] == pytest.approx(0.1 * (np.mean(source) + np.mean(target)), rel=1e-5)
    # h: the second segment of each has no sound, the third alone has a pseudo-label and sound.
    heard = np.mean([cross_entropy(of_source[0][i], labels[i]) for i in (0, 2, 3)])
    assert terms["h"] == pytest.approx(0.1 * (heard + cross_entropy(of_target[0][2], pseudo[2])), rel=1e-5)


def test_a_target_without_any_pseudo_label_adds_nothing() -> None:
    model, labels = build().eval(), torch.tensor([2, 0, 1, 1])
    with_none = compute_terms(model, make_step(labels, torch.full((N,), -1)))
    assert with_none["target"] == 0
    assert with_none == pytest.approx(compute_terms(model, make_step(labels)), rel=1e-6)


def test_h_mixes_by_softmax_and_is_learned_by_sigmoids_where_there_are_several_labels() -> None:
    model = build(multi_label=True).eval()
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    pseudo = torch.tensor([[0.0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    pseudo[0] = torch.nan
    step = make_step(labels, pseudo)
    assert step.target is not None

    def average(logits: np.ndarray, wanted: Tensor, counted: list[int]) -> float:
        truth = wanted.double().numpy()[counted].reshape(len(counted), *[1] * (logits.ndim - 2), N_CLASSES)
        chosen = logits[counted]
        return float(np.mean(np.log1p(np.exp(chosen)) - truth * chosen))

    of_source = select_by_hand(model, step.source.inputs)
    of_target = select_by_hand(model, step.target.inputs)
    terms = compute_terms(model, step)
    expected = average(of_source[0], labels, [0, 2, 3]) + average(of_target[0], pseudo, [2, 3])
    assert terms["h"] == pytest.approx(0.1 * expected, rel=1e-5)
    expected = average(of_source[1], labels, [0, 1, 2, 3]) + average(of_target[1], pseudo, [1, 2, 3])
    assert terms["h'"] == pytest.approx(0.1 * expected, rel=1e-5)


def test_withheld_sound_is_as_no_sound_in_training_alone() -> None:
    """The first numbers of a step withhold sound: here those of segments 0 and 2, under p_missing = 0.1."""
    model = build(dropout=0.0)
    step, draws = make_step(torch.tensor([2, 0, 1, 1])), torch.tensor([0.05, 0.5, 0.0999, 0.1])
    silent = step.source.inputs._replace(has_audio=torch.tensor([False, False, False, True]))
    as_silent = step._replace(source=step.source._replace(inputs=silent))
    withheld = compute_terms(model.train(), step, Dropouts(lambda shape: draws))
    assert withheld == pytest.approx(compute_terms(model.eval(), as_silent), rel=1e-6)
    assert withheld["h"] != pytest.approx(compute_terms(model, step)["h"], rel=1e-3)
