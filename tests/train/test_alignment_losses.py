"""The losses of alignment against hand derivations and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.alignment.methods.align import alignment_loss
from echoshift.train.alignment.methods.grl import (
    adversarial_loss,
    build_discriminator,
    compute_reversal,
    reverse_gradient,
)
from echoshift.train.alignment.methods.hna import find_middle_norm, hard_norm_loss
from echoshift.train.alignment.methods.mmd import MaximumMeanDiscrepancy, discrepancy_loss
from echoshift.train.alignment.methods.orth import orthogonality_loss
from echoshift.train.alignment.methods.rna import relative_norm_loss, relative_norm_loss_by_source
from echoshift.train.alignment.methods.synchronisation import (
    build_synchronisation_head,
    find_strangers,
    synchronisation_loss,
)
from echoshift.train.alignment.two_streams import StreamFeatures

HEARD = torch.tensor([True, False, True, True, True, False])


def draw(n: int = 6, width: int = 4, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, width, generator=rng, dtype=torch.float64)).to(dtype)


# RNA


def test_rna_is_zero_where_the_mean_norms_are_equal_and_only_there():
    visual = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # norms 5 and 1
    audio = torch.tensor([[0.0, 2.0], [4.0, 0.0]])  # norms 2 and 4
    everything = torch.tensor([True, True])
    assert relative_norm_loss(visual, audio, everything).item() == 0
    assert relative_norm_loss(visual, 3 * audio, everything).item() == pytest.approx((1 / 3 - 1) ** 2)
    assert relative_norm_loss(3 * visual, audio, everything).item() == pytest.approx((3 - 1) ** 2)


def test_rna_leaves_out_the_sound_of_silent_segments_but_not_their_pictures():
    visual, audio = draw(seed=1), draw(seed=2)
    norms = np.linalg.norm(visual.numpy(), axis=1), np.linalg.norm(audio.numpy(), axis=1)
    expected = (norms[0].mean() / norms[1][HEARD.numpy()].mean() - 1) ** 2
    assert relative_norm_loss(visual, audio, HEARD).item() == pytest.approx(expected, rel=1e-5)
    audio[~HEARD] = 1e6
    assert relative_norm_loss(visual, audio, HEARD).item() == pytest.approx(expected, rel=1e-5)


def test_rnas_gradient_is_the_derived_one_and_that_of_finite_differences():
    visual, audio = draw(seed=3).requires_grad_(), draw(seed=4, scale=0.3).requires_grad_()
    relative_norm_loss(visual, audio, HEARD).backward()
    v, a, heard = visual.detach().numpy(), audio.detach().numpy(), HEARD.numpy()
    of_v, of_a = np.linalg.norm(v, axis=1), np.linalg.norm(a, axis=1)
    mean_v, mean_a = of_v.mean(), of_a[heard].mean()
    ratio = mean_v / mean_a
    # d/dv = 2 (r - 1) / mean_a * v / |v| / n;  d/da = -2 (r - 1) r / mean_a * a / |a| / n_heard.
    by_v = 2 * (ratio - 1) / mean_a * v / of_v[:, None] / len(v)
    by_a = -2 * (ratio - 1) * ratio / mean_a * a / of_a[:, None] / heard.sum() * heard[:, None]
    np.testing.assert_allclose(visual.grad, by_v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(audio.grad, by_a, rtol=1e-4, atol=1e-6)

    def compute(v: np.ndarray, a: np.ndarray) -> float:
        return (np.linalg.norm(v, axis=1).mean() / np.linalg.norm(a, axis=1)[heard].mean() - 1) ** 2

    step = 1e-6
    for i, j in ((0, 0), (2, 3), (4, 1)):
        nudge = np.zeros_like(v, dtype=np.float64)
        nudge[i, j] = step
        of_v_there = (compute(v + nudge, a) - compute(v - nudge, a)) / (2 * step)
        of_a_there = (compute(v, a + nudge) - compute(v, a - nudge)) / (2 * step)
        assert by_v[i, j] == pytest.approx(of_v_there, rel=1e-3)
        assert by_a[i, j] == pytest.approx(of_a_there, rel=1e-3)


@pytest.mark.parametrize("rotated", ["visual", "audio"])
def test_rna_doesnt_change_when_a_modality_is_rotated_and_align_does(rotated):
    visual, audio = draw(seed=5), draw(seed=6)
    rotation = torch.from_numpy(ortho_group.rvs(4, random_state=1)).float()
    turned = (visual @ rotation, audio) if rotated == "visual" else (visual, audio @ rotation)
    assert relative_norm_loss(*turned, HEARD).item() == pytest.approx(
        relative_norm_loss(visual, audio, HEARD).item(), rel=1e-5
    )
    assert abs(alignment_loss(*turned, HEARD).item() - alignment_loss(visual, audio, HEARD).item()) > 1e-2


def test_rna_of_several_sources_is_the_sum_of_those_of_each():
    visual, audio, domains = draw(seed=7), draw(seed=8), torch.tensor([0, 0, 2, 0, 2, 2])
    alone = [relative_norm_loss(visual[domains == d], audio[domains == d], HEARD[domains == d]) for d in (0, 2)]
    found = relative_norm_loss_by_source(StreamFeatures(visual, audio, HEARD), domains, 3)
    assert found.item() == pytest.approx(sum(alone).item(), rel=1e-5)  # domain 1 isn't in the batch, and adds nothing
    assert relative_norm_loss_by_source(StreamFeatures(visual, audio, HEARD), torch.zeros(6), 1).item() == (
        pytest.approx(relative_norm_loss(visual, audio, HEARD).item())
    )


def test_without_any_sound_cross_modal_losses_are_zero_with_finite_gradients():
    visual, audio = draw().requires_grad_(), torch.zeros(6, 4, requires_grad=True)
    silent = torch.zeros(6, dtype=torch.bool)
    head = build_synchronisation_head(4, 3)
    found = [
        relative_norm_loss(visual, audio, silent),
        alignment_loss(visual, audio, silent),
        orthogonality_loss(visual, audio, silent),
        synchronisation_loss(head, visual, audio, silent, find_strangers(audio.detach(), silent)),
        discrepancy_loss(audio, audio, silent, silent, (1.0,)),
    ]
    torch.stack(found).sum().backward()
    assert [loss.item() for loss in found] == [0] * 5
    assert visual.grad is not None and visual.grad.isfinite().all()
    assert audio.grad is not None and audio.grad.isfinite().all()


# HNA, Align, Orth


def test_hna_is_the_sum_of_squared_gaps_to_the_middle_norm():
    visual = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)  # mean norm 3
    audio = torch.tensor([[0.0, 12.0], [9.0, 0.0]])  # norms 12 and 9, the second isn't heard
    heard = torch.tensor([True, False])
    middle = find_middle_norm(visual, audio, heard)
    assert middle.item() == 7.5 and not middle.requires_grad
    assert hard_norm_loss(visual, audio, heard, middle).item() == pytest.approx(4.5**2 + 4.5**2)
    assert hard_norm_loss(visual, audio, heard, torch.tensor(3.0)).item() == pytest.approx(81.0)
    silent = torch.tensor([False, False])
    assert find_middle_norm(visual, audio, silent).item() == 3
    assert hard_norm_loss(visual, audio, silent, torch.tensor(1.0)).item() == pytest.approx(4.0)


def test_align_and_orth_are_those_computed_by_hand():
    visual = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    audio = torch.tensor([[0.0, 3.0], [5.0, 0.0], [7.0, 0.0]])  # cosines 0, 1/sqrt(2), 1
    heard = torch.tensor([True, True, False])
    assert alignment_loss(visual, audio, heard).item() == pytest.approx((1 + 1 - math.sqrt(0.5)) / 2, abs=1e-6)
    assert orthogonality_loss(visual, audio, heard).item() == pytest.approx((0 + 0.5) / 2, abs=1e-6)
    everything = torch.ones(3, dtype=torch.bool)
    assert alignment_loss(visual, visual, everything).item() == pytest.approx(0, abs=1e-6)
    assert orthogonality_loss(visual, -visual, everything).item() == pytest.approx(1, abs=1e-6)


# MMD


def compute_mmd(source: np.ndarray, target: np.ndarray, gammas: tuple[float, ...]) -> float:
    def mean_kernel(left: np.ndarray, right: np.ndarray) -> float:
        return float(np.mean([sum(math.exp(-np.sum((x - y) ** 2) / g) for g in gammas) for x in left for y in right]))

    return mean_kernel(source, source) + mean_kernel(target, target) - 2 * mean_kernel(source, target)


def test_mmd_is_numpys_over_the_rows_that_count():
    gammas = MaximumMeanDiscrepancy.Settings().gammas
    assert len(gammas) == 17 and gammas[0] == 9.7 / 256 and gammas[8] == 9.7 and gammas[16] == 9.7 * 256
    source, target, counted = draw(6, seed=9), draw(4, seed=10) + 0.5, torch.tensor([True, True, False, True])
    found = discrepancy_loss(source, target, HEARD, counted, gammas).item()
    expected = compute_mmd(source[HEARD].double().numpy(), target[counted].double().numpy(), gammas)
    assert expected > 0.05
    assert found == pytest.approx(expected, rel=1e-4)
    everything = torch.ones(6, dtype=torch.bool)
    assert discrepancy_loss(source, source, everything, everything, gammas).item() == pytest.approx(0, abs=1e-5)


# GRL


def test_the_reversed_gradient_grows_from_nothing_to_its_peak():
    shares = [0.0, 0.05, 0.1, 0.5, 1.0]
    expected = [0.2 * math.tanh(5 * p) for p in shares]  # 2 / (1 + exp(-10 p)) - 1 = tanh(5 p)
    found = [compute_reversal(torch.tensor(p), 0.2).item() for p in shares]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[0] == 0 and found[-1] == pytest.approx(0.2, abs=1e-4)


def test_a_gradient_comes_back_times_minus_the_factor_and_values_stay():
    values = draw(seed=11).requires_grad_()
    coming = draw(seed=12)
    found = reverse_gradient(values, torch.tensor(0.15))
    torch.testing.assert_close(found, values)
    found.backward(coming)
    torch.testing.assert_close(values.grad, -0.15 * coming)


def test_features_climb_the_loss_that_the_discriminator_descends():
    torch.manual_seed(0)
    discriminator = build_discriminator(4, 5)
    source, target = draw(6, seed=13), draw(3, seed=14)
    counted = torch.tensor([True, False, True])

    def compute(of_source: Tensor, of_target: Tensor) -> Tensor:
        logits = discriminator(torch.cat([of_source[HEARD], of_target[counted]]))
        return F.cross_entropy(logits, torch.tensor([0] * int(HEARD.sum()) + [1] * 2))

    plain = source.clone().requires_grad_()
    expected = compute(plain, target)
    weights = list(discriminator.parameters())
    gradients = torch.autograd.grad(expected, [plain, *weights])
    reversed_ = source.clone().requires_grad_()
    found = adversarial_loss(discriminator, reversed_, target, HEARD, counted, torch.tensor(0.2))
    of_reversed = torch.autograd.grad(found, [reversed_, *weights])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(of_reversed[0], -0.2 * gradients[0])
    for one, other in zip(of_reversed[1:], gradients[1:], strict=True):
        torch.testing.assert_close(one, other)


# SS


class PairRecorder(nn.Module):
    """Notes the pairs that it judges."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, pairs: Tensor) -> Tensor:
        self.seen.append(pairs)
        return torch.zeros(len(pairs), 2)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_no_pair_that_should_be_apart_is_of_one_segment(n):
    ids = torch.arange(n, dtype=torch.float32)[:, None]
    recorder, everything = PairRecorder(), torch.ones(n, dtype=torch.bool)
    synchronisation_loss(recorder, ids, ids, everything, everything)
    together, apart = recorder.seen
    assert (together[:, 0] == together[:, 1]).all()
    assert (apart[:, 0] != apart[:, 1]).all()
    assert apart[:, 1].sort().values.tolist() == ids[:, 0].tolist(), "each sound is in one pair of either kind"


def test_a_segment_twice_in_a_batch_is_no_stranger_to_itself():
    sound = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    heard = torch.tensor([True, True, True, False, True])
    # 0 gets the sound of 4; 1 that of 0, its own; 2 that of 1; 3 that of 2; 4 that of 3, which is silent.
    assert find_strangers(sound, heard).tolist() == [True, False, True, True, False]
    assert find_strangers(sound[:1], heard[:1]).tolist() == [False]


def test_synchronisation_is_the_cross_entropy_of_the_pairs_that_count():
    torch.manual_seed(1)
    head, visual, audio = build_synchronisation_head(4, 5), draw(seed=15), draw(seed=16)
    are_strangers = find_strangers(audio, HEARD)
    pairs = [(i, i, 1) for i in range(6) if HEARD[i]] + [(i, (i - 1) % 6, 0) for i in range(6) if HEARD[(i - 1) % 6]]
    each = [F.cross_entropy(head(torch.cat([visual[i], audio[j]]))[None], torch.tensor([k])) for i, j, k in pairs]
    found = synchronisation_loss(head, visual, audio, HEARD, are_strangers)
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
