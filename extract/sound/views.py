"""Makes the stored views of a window of sound: the spectrogram as it is, and augmented ones (METHODS section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from echoshift.extract.random_draws import draw_array, draw_integer
from echoshift.pipeline.specs import AudioSpec, FeatureSpec

# [A-code] draws the first masked band from 0..246 of 257, so that the two highest bands always stay.
N_BAND_STARTS = 247


def list_views(spectrogram: Tensor, spec: FeatureSpec, segment_id: str, window: int) -> Iterator[tuple[int, Tensor]]:
    """List the entries that come from one window of a segment's sound, number and float32 [1, F, N].

    The first is `spectrogram` itself; entry number window * n_sound_views + view.
    """
    audio = spec.audio
    assert audio is not None, "called for stores of sound only"
    first = window * audio.n_views
    yield first, spectrogram
    for view in range(1, audio.n_views):
        yield first + view, augment_spectrogram(spectrogram, audio, spec.clip.seed, segment_id, view, window)


def augment_spectrogram(
    spectrogram: Tensor, spec: AudioSpec, seed: int, segment_id: str, view: int, window: int
) -> Tensor:
    """Add uniform noise of +-`noise` to a standardised spectrogram [1, F, N], and set `n_masked_bins` bands to 0.

    float32, on the spectrogram's device, which keeps its values. Noise and place of the bands are drawn from the seed,
    the segment's id, and the numbers of view and window alone (extract/random_draws.py): the same values on every
    device, in every batch and worker. The first band is one of 0..246, or the last behind which the rest fits [A-code].
    """
    n_bins, n_masked = spectrogram.shape[1], spec.n_masked_bins
    augmented = spectrogram.clone()
    if spec.noise:
        drawn = draw_array(tuple(spectrogram.shape), seed, segment_id, view, window, "noise")
        augmented += torch.from_numpy((drawn * 2 - 1) * drawn.dtype.type(spec.noise)).to(augmented)
    if n_masked:
        n_starts = min(N_BAND_STARTS, n_bins - n_masked + 1)
        start = draw_integer(0, n_starts - 1, seed, segment_id, view, window, "masked band")
        augmented[:, start : start + n_masked] = 0
    return augmented
