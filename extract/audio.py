"""Turns samples into log spectrograms by the papers' recipes, and those into augmented views (METHODS section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from echoshift.extract.clips import draw_array, draw_integer
from echoshift.extract.recipes import plan_spectrogram_shape
from echoshift.extract.torchvision_import import ensure_torchaudio
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import AudioSpec, FeatureSpec

STD_FLOOR = 1e-9
TUKEY_SHAPE = 0.25
# [A-code] draws the first masked band from 0..246 of 257, so that the two highest bands always stay.
N_BAND_STARTS = 247


def log_spectrogram(samples: Tensor | Sequence[Tensor], spec: AudioSpec) -> Tensor:
    """Compute the log spectrogram of each window of audio.

    `samples` is float [B, n], or B tensors [n_i] of any lengths, at `spec.rate_hz`, full scale +-1. The result is
    float32 [B, 1, F, N] on the samples' device, (F, N) being `plan_spectrogram_shape(spec)`.

    `zhang2022` [A-code]: the first `n_samples`, tiled if there are fewer, clipped to +-1; then what
    scipy.signal.spectrogram computes with its defaults (periodic Tukey .25 window, the mean of each frame taken away,
    one-sided density, no centring); log(S + floor).
    `planamente2021` [B, section 4.1; its reference 27 for what it doesn't say]: the first `n_samples`, zeros appended
    if there are fewer; what librosa.stft computes with center=True and pad_mode="constant" (zeros beyond both ends;
    reflecting there would invent audio), the periodic Hann window in the middle of n_fft; log(|S|^2 + floor).
    `chen2020` [RegNet, the VAS data]: the first `n_samples`, tiled if there are fewer; |S| of librosa.stft as above,
    times librosa's mel filters (Slaney's scale and norm); 0.8 + 0.2 log10(max(mel, floor)), that is
    -80..20 dB brought to 0..1, clipped to it.
    `standardise` takes (x - mean) / (std + 1e-9) over the whole window, std of the population.

    Everything up to the result is float64, and each window is computed by itself: its values don't depend on what
    else is in the batch. Raises SpecError for a window without samples (the caller knows what a missing track means).
    """
    rows = list(samples)
    if not rows:
        raise SpecError("no window of audio was given")
    for row in rows:
        _check_samples(row)
    plan_spectrogram_shape(spec)
    window = _centred_window(spec, rows[0].device)
    return torch.stack([_window_spectrogram(row, window.to(row.device), spec) for row in rows])[:, None]


def _check_samples(samples: Tensor) -> None:
    if samples.ndim != 1:
        raise SpecError(f"a window of audio must be [n], has the shape {tuple(samples.shape)}")
    if samples.numel() == 0:
        raise SpecError("a window of audio has no samples: leave out what has no audio (has_audio) before this")
    if not samples.is_floating_point():
        raise SpecError(f"samples must be floating point with full scale +-1, are {samples.dtype}")


def _centred_window(spec: AudioSpec, device: torch.device) -> Tensor:
    """Return the analysis window: zhang2022 [n_window]; the others [n_fft] with zeros on both sides."""
    place = torch.arange(spec.n_window, dtype=torch.float64, device=device)
    if spec.recipe == "zhang2022":
        # Periodic: the symmetric window of n_window + 1 points without its last, hence edges at 0 and n_window.
        from_edge = torch.minimum(place, spec.n_window - place)
        taper = TUKEY_SHAPE * spec.n_window / 2
        return 0.5 - 0.5 * torch.cos(math.pi * (from_edge / taper).clamp(max=1))
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * place / spec.n_window)
    n_left = (spec.n_fft - spec.n_window) // 2
    return torch.nn.functional.pad(hann, (n_left, spec.n_fft - spec.n_window - n_left))


def _window_spectrogram(samples: Tensor, window: Tensor, spec: AudioSpec) -> Tensor:
    """Compute one window's log spectrogram, float32 [F, N], from samples [n]."""
    if spec.recipe == "chen2020":
        magnitude = _stft_power(_tile(samples, spec.n_samples), window, spec).sqrt()
        mel = magnitude @ _mel_filters(spec).to(magnitude)
        log_power = (0.8 + 0.2 * torch.log10(mel.clamp(min=spec.log_floor))).clamp(0, 1)
    elif spec.recipe == "planamente2021":
        log_power = torch.log(_stft_power(samples, window, spec) + spec.log_floor)
    else:
        log_power = torch.log(_zhang_power(samples, window, spec) + spec.log_floor)
    if spec.standardise:
        centred = log_power - log_power.mean()
        log_power = centred / (centred.square().mean().sqrt() + STD_FLOOR)
    return log_power.T.to(torch.float32).contiguous()


def _tile(samples: Tensor, n_samples: int) -> Tensor:
    return samples.repeat(-(-n_samples // samples.shape[0]))[:n_samples]


@lru_cache(maxsize=8)
def _mel_filters(spec: AudioSpec) -> Tensor:
    """Compute the mel filters [n_fft // 2 + 1, n_mels], in float32 as librosa has them."""
    ensure_torchaudio()
    from torchaudio.functional import melscale_fbanks

    assert spec.f_min_hz is not None and spec.f_max_hz is not None and spec.n_mels is not None
    n_bins = spec.n_fft // 2 + 1
    return melscale_fbanks(n_bins, spec.f_min_hz, spec.f_max_hz, spec.n_mels, spec.rate_hz, "slaney", "slaney")


def _zhang_power(samples: Tensor, window: Tensor, spec: AudioSpec) -> Tensor:
    """Compute the one-sided power density [N, F] as scipy.signal.spectrogram does by default."""
    signal = _tile(samples, spec.n_samples).to(torch.float64).clamp(-1, 1)
    frames = signal.unfold(0, spec.n_window, spec.n_hop)
    frames = (frames - frames.mean(dim=1, keepdim=True)) * window
    spectrum = torch.fft.rfft(frames, n=spec.n_fft)
    power = (spectrum.real.square() + spectrum.imag.square()) / (spec.rate_hz * window.square().sum())
    n_mirrored = power.shape[1] - (1 if spec.n_fft % 2 == 0 else 0)
    power[:, 1:n_mirrored] *= 2  # every bin but DC and, for an even n_fft, Nyquist counts for its mirror too
    return power


def _stft_power(samples: Tensor, window: Tensor, spec: AudioSpec) -> Tensor:
    """Compute |S|^2 [N, F] of centred frames as librosa.stft does with zeros beyond the ends."""
    signal = samples[: spec.n_samples].to(torch.float64)
    n_half = spec.n_fft // 2
    signal = torch.nn.functional.pad(signal, (n_half, n_half + spec.n_samples - signal.shape[0]))
    spectrum = torch.fft.rfft(signal.unfold(0, spec.n_fft, spec.n_hop) * window)
    return spectrum.real.square() + spectrum.imag.square()


def list_views(spectrogram: Tensor, spec: FeatureSpec, segment_id: str, window: int) -> Iterator[tuple[int, Tensor]]:
    """List the entries that come from one window of a segment's audio, number and float32 [1, F, N].

    The first is `spectrogram` itself; entry number window * n_sound_views + view.
    """
    audio = spec.audio
    assert audio is not None, "called for stores of audio only"
    first = window * audio.n_views
    yield first, spectrogram
    for view in range(1, audio.n_views):
        yield first + view, augment_spectrogram(spectrogram, audio, spec.clip.seed, segment_id, view, window)


def augment_spectrogram(
    spectrogram: Tensor, spec: AudioSpec, seed: int, segment_id: str, view: int, window: int
) -> Tensor:
    """Add uniform noise of +-`noise` to a standardised spectrogram [1, F, N], and set `n_masked_bins` bands to 0.

    float32, on the spectrogram's device, which keeps its values. Noise and place of the bands are drawn from the seed,
    the segment's id, and the numbers of view and window alone (extract/clips.py): the same values on every
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
