from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from echoshift.extract.audio import log_spectrogram, rms_dbfs
from echoshift.extract.readers.audio import read_audio
from echoshift.extract.recipes import CHEN2020, PLANAMENTE2021, ZHANG2022, plan_spectrogram_shape
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import AudioSpec

RNG = np.random.default_rng(5)


def reference_zhang(samples: np.ndarray) -> np.ndarray:
    import scipy.signal

    tiled = np.tile(samples.astype(np.float64), math.ceil(160000 / len(samples)))[:160000]
    _, _, power = scipy.signal.spectrogram(np.clip(tiled, -1, 1), 16000, nperseg=512, noverlap=353)
    logs = np.log(power + 1e-7)
    return (logs - np.mean(logs)) / (np.std(logs) + 1e-9)


def reference_planamente(samples: np.ndarray) -> np.ndarray:
    import librosa

    stft = librosa.stft(
        samples.astype(np.float64), n_fft=511, hop_length=120, win_length=240, window="hann", pad_mode="constant"
    )
    return np.log(np.abs(stft) ** 2 + 1e-6)


def reference_chen(samples: np.ndarray) -> np.ndarray:
    """Compute RegNet's log-mel step by step as its data preparation does: decibels, -20, +100, / 100, clipped."""
    import librosa

    tiled = np.tile(samples.astype(np.float64), math.ceil(220500 / len(samples)))[:220500]
    magnitude = np.abs(librosa.stft(tiled, n_fft=1024, hop_length=256, pad_mode="constant"))
    mel = librosa.filters.mel(sr=22050, n_fft=1024, fmin=125, fmax=7600, n_mels=80) @ magnitude
    return np.clip((np.log10(np.maximum(mel, 1e-5)) * 20 - 20 + 100) / 100, 0, 1)


def some_sounds(rate_hz: int, n: int) -> dict[str, np.ndarray]:
    time_s = np.arange(n) / rate_hz
    return {
        "noise": RNG.normal(0, 0.1, n),
        "loud noise that clips": RNG.normal(0, 0.8, n).clip(-1, 1) * 1.7,
        "sine": 0.7 * np.sin(2 * np.pi * 440 * time_s),
        "sine on a constant": 0.5 + 0.2 * np.sin(2 * np.pi * 3000 * time_s),
        "click": np.eye(1, n, n // 3)[0],
        "faint": RNG.normal(0, 1e-5, n),
    }


def read_mono(path: Path, rate_hz: int) -> np.ndarray:
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate_hz)
    with av.open(str(path)) as container:
        frames = [r for f in container.decode(audio=0) for r in resampler.resample(f)]
        frames += resampler.resample(None)
    return np.concatenate([f.to_ndarray()[0] for f in frames])


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Compare to 1e-4 of the value, and of one (a standard deviation, a neper) where the value is near zero."""
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4)


def test_shapes_are_the_papers():
    assert plan_spectrogram_shape(ZHANG2022) == (257, 1004)
    assert plan_spectrogram_shape(PLANAMENTE2021) == (256, 256)
    assert ZHANG2022.n_samples == 160000 and PLANAMENTE2021.n_samples == 30696
    assert log_spectrogram(torch.randn(2, 160000), ZHANG2022).shape == (2, 1, 257, 1004)
    assert log_spectrogram(torch.randn(2, 30696), PLANAMENTE2021).shape == (2, 1, 256, 256)


@pytest.mark.parametrize("name", list(some_sounds(16000, 1024)))
def test_zhang2022_equals_scipy(name):
    samples = some_sounds(16000, 160000)[name].astype(np.float32)
    assert_close(log_spectrogram([torch.from_numpy(samples)], ZHANG2022)[0, 0], reference_zhang(samples))


@pytest.mark.parametrize("name", list(some_sounds(24000, 1024)))
def test_planamente2021_equals_librosa(name):
    samples = some_sounds(24000, 30696)[name].astype(np.float32)
    assert_close(log_spectrogram([torch.from_numpy(samples)], PLANAMENTE2021)[0, 0], reference_planamente(samples))


@pytest.mark.parametrize("n", [220500, 50000, 300000])
@pytest.mark.parametrize("name", list(some_sounds(22050, 1024)))
def test_chen2020_equals_librosa(name, n):
    samples = some_sounds(22050, n)[name].astype(np.float32)
    ours = log_spectrogram([torch.from_numpy(samples)], CHEN2020)[0, 0]
    assert ours.shape == plan_spectrogram_shape(CHEN2020) == (80, 862)
    assert_close(ours, reference_chen(samples))


@pytest.mark.shared
def test_chen2020_reproduces_the_log_mels_of_vas_frame_by_frame(shared_data):
    paths = sorted((shared_data / "vas").glob("*/*_mel.npy"))
    assert len(paths) == 10
    for path in paths:
        theirs = np.load(path)
        samples = read_audio(path.with_name(path.name.replace("_mel.npy", ".mp4")), 0, 10, 22050)
        ours = log_spectrogram([torch.from_numpy(samples)], CHEN2020)[0, 0, :, :860].numpy()
        by_shift = {
            shift: np.corrcoef(ours[:, 8:-8].ravel(), theirs[:, 8 + shift : 852 + shift].ravel())[0, 1]
            for shift in range(-3, 4)
        }
        assert max(by_shift, key=by_shift.__getitem__) == 0, path  # one frame is 11.6 ms
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.95, path  # the short ones are tiled there too


def test_mel_fields_belong_to_the_mel_recipe():
    fields = CHEN2020.model_dump()
    with pytest.raises(ValidationError, match="chen2020 needs `n_mels`, `f_min_hz` and `f_max_hz`"):
        AudioSpec(**{**fields, "n_mels": None})
    with pytest.raises(ValidationError, match="at most at half of `rate_hz`"):
        AudioSpec(**{**fields, "f_max_hz": 12000})
    with pytest.raises(ValidationError, match="zhang2022 has no mel bands"):
        AudioSpec(**{**ZHANG2022.model_dump(), "n_mels": 80})


@pytest.mark.shared
def test_both_recipes_equal_their_references_on_real_sounds(shared_data):
    paths = sorted((shared_data / "esc10").glob("*/*.ogg"))[::17]
    assert len(paths) >= 5
    for path in paths:
        samples = read_mono(path, 16000)
        assert_close(log_spectrogram([torch.from_numpy(samples)], ZHANG2022)[0, 0], reference_zhang(samples))
        middle = read_mono(path, 24000)[24000 : 24000 + 30696]
        assert_close(log_spectrogram([torch.from_numpy(middle)], PLANAMENTE2021)[0, 0], reference_planamente(middle))


@pytest.mark.parametrize("n", [1, 700, 53333, 159999, 160001, 300000])
def test_zhang2022_tiles_the_short_and_cuts_the_long(n):
    samples = RNG.normal(0, 0.2, n).astype(np.float32)
    assert_close(log_spectrogram([torch.from_numpy(samples)], ZHANG2022)[0, 0], reference_zhang(samples))


def test_zhang2022_is_standardised_and_silence_is_all_zero():
    spectrogram = log_spectrogram(torch.randn(1, 160000), ZHANG2022).double()
    assert abs(spectrogram.mean()) < 1e-6
    assert spectrogram.std(unbiased=False) == pytest.approx(1, abs=1e-6)
    silence = log_spectrogram(torch.zeros(1, 160000), ZHANG2022)
    assert torch.isfinite(silence).all() and silence.abs().max() < 1e-3


def test_planamente2021_appends_zeros_and_cuts():
    samples = torch.randn(20000)
    padded = torch.nn.functional.pad(samples, (0, 30696 - 20000))
    whole = log_spectrogram([padded], PLANAMENTE2021)
    torch.testing.assert_close(log_spectrogram([samples], PLANAMENTE2021), whole, rtol=0, atol=0)
    longer = torch.cat([padded, torch.randn(100)])
    torch.testing.assert_close(log_spectrogram([longer], PLANAMENTE2021), whole, rtol=0, atol=0)
    assert whole[0, 0, :, 200:].max() == pytest.approx(math.log(1e-6), abs=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    rows = [torch.randn(n) * 0.1 for n in (160000, 4000, 90000)]
    together = log_spectrogram(rows, ZHANG2022)
    for row, spectrogram in zip(rows, together, strict=True):
        assert torch.equal(log_spectrogram([row], ZHANG2022)[0], spectrogram)


def test_other_lengths_follow_scipy_too():
    import scipy.signal

    spec = ZHANG2022.model_copy(
        update={"rate_hz": 8000, "duration_s": 1.0, "n_window": 255, "n_hop": 100, "n_fft": 301, "standardise": False}
    )
    samples = RNG.normal(0, 0.1, 8000)
    _, _, power = scipy.signal.spectrogram(samples, 8000, nperseg=255, noverlap=155, nfft=301)
    ours = log_spectrogram([torch.from_numpy(samples)], spec)[0, 0]
    assert ours.shape == power.shape == plan_spectrogram_shape(spec)
    assert_close(ours, np.log(power + 1e-7))


def test_what_cannot_be_computed_is_said():
    with pytest.raises(SpecError, match="has no samples"):
        log_spectrogram([torch.randn(100), torch.zeros(0)], ZHANG2022)
    with pytest.raises(SpecError, match="no window of audio"):
        log_spectrogram([], ZHANG2022)
    with pytest.raises(SpecError, match=r"must be \[n\], has the shape \(1, 5\)"):
        log_spectrogram(torch.zeros(2, 1, 5), ZHANG2022)
    with pytest.raises(SpecError, match=r"full scale \+-1, are torch.int16"):
        log_spectrogram(torch.zeros(1, 5, dtype=torch.int16), ZHANG2022)
    with pytest.raises(SpecError, match="n_hop <= n_window <= n_fft, has 159, 512, 256"):
        log_spectrogram(torch.randn(1, 5), ZHANG2022.model_copy(update={"n_fft": 256}))
    with pytest.raises(SpecError, match="160 samples is shorter than n_window = 512"):
        plan_spectrogram_shape(ZHANG2022.model_copy(update={"duration_s": 0.01}))
    with pytest.raises(SpecError, match="n_masked_bins = 257 masks all of the 257 bands"):
        plan_spectrogram_shape(ZHANG2022.model_copy(update={"n_views": 2, "n_masked_bins": 257}))


def test_rms_dbfs():
    time_s = torch.arange(16000) / 16000
    assert rms_dbfs(torch.sin(2 * math.pi * 100 * time_s)) == pytest.approx(-3.0103, abs=1e-3)
    assert rms_dbfs(torch.full((10,), 0.1)) == pytest.approx(-20, abs=1e-3)
    assert rms_dbfs(torch.zeros(10)) == -math.inf
    with pytest.raises(SpecError, match="has no samples"):
        rms_dbfs(torch.zeros(0))
