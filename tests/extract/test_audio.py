"""Checks spectrograms and their stored views against SciPy, librosa and NumPy, and what names a store of views."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import kstest

from echoshift.extract.audio import augment_spectrogram, log_spectrogram
from echoshift.extract.clips import draw_array
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.readers.audio import read_audio
from echoshift.extract.recipes import CHEN2020, PLANAMENTE2021, ZHANG2022, plan_spectrogram_shape
from echoshift.extract.shard import load_network
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import AudioSpec, FeatureSpec, fingerprint
from echoshift.pipeline.store.open import list_stores, open_store

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


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Compare to 1e-4 of the value, and of one (a standard deviation, a neper) where the value is near zero."""
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "reference", "shape", "n"),
    [
        (ZHANG2022, reference_zhang, (257, 1004), 160000),
        (PLANAMENTE2021, reference_planamente, (256, 256), 30696),
        *((CHEN2020, reference_chen, (80, 862), n) for n in (220500, 50000, 300000)),
    ],
)
def test_spectrograms_equal_scipy_and_librosa(spec, reference, shape, n):
    for samples in some_sounds(spec.rate_hz, n).values():
        samples = samples.astype(np.float32)
        ours = log_spectrogram([torch.from_numpy(samples)], spec)[0, 0]
        assert ours.shape == plan_spectrogram_shape(spec) == shape
        assert_close(ours, reference(samples))


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
        samples = read_audio(path, 0, 99, 16000)
        assert_close(log_spectrogram([torch.from_numpy(samples)], ZHANG2022)[0, 0], reference_zhang(samples))
        middle = read_audio(path, 0, 99, 24000)[24000 : 24000 + 30696]
        assert_close(log_spectrogram([torch.from_numpy(middle)], PLANAMENTE2021)[0, 0], reference_planamente(middle))


@pytest.mark.parametrize("n", [1, 53333, 159999, 300000])
def test_zhang2022_tiles_the_short_and_cuts_the_long(n):
    samples = RNG.normal(0, 0.2, n).astype(np.float32)
    assert_close(log_spectrogram([torch.from_numpy(samples)], ZHANG2022)[0, 0], reference_zhang(samples))


def test_silence_is_all_zero():
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
    assert torch.equal(log_spectrogram(rows, ZHANG2022), torch.cat([log_spectrogram([r], ZHANG2022) for r in rows]))


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
    for samples, message in (
        ([torch.randn(100), torch.zeros(0)], "has no samples"),
        ([], "no window of audio"),
        (torch.zeros(2, 1, 5), r"must be \[n\], has the shape \(1, 5\)"),
        (torch.zeros(1, 5, dtype=torch.int16), r"full scale \+-1, are torch.int16"),
    ):
        with pytest.raises(SpecError, match=message):
            log_spectrogram(samples, ZHANG2022)
    for update, message in (
        ({"n_fft": 256}, "n_hop <= n_window <= n_fft, has 159, 512, 256"),
        ({"duration_s": 0.01}, "160 samples is shorter than n_window = 512"),
        ({"n_views": 2, "n_masked_bins": 257}, "n_masked_bins = 257 masks all of the 257 bands"),
    ):
        with pytest.raises(SpecError, match=message):
            plan_spectrogram_shape(ZHANG2022.model_copy(update=update))


VIEWS = ("--set", "audio.n_views=3", "--set", "audio.noise=0.05", "--set", "audio.n_masked_bins=9")
SPEC = ZHANG2022.model_copy(update={"n_views": 3, "noise": 0.05, "n_masked_bins": 9})
NO_WEIGHTS = replace(resolve_weights("random:0", "resnet_demo"), sha256="0" * 64)


def augment_by_hand(spectrogram: np.ndarray, segment_id: str, view: int, window: int, seed: int = 0) -> np.ndarray:
    """Compute [F, N] anew from hashlib and NumPy: 24-bit fractions for the noise, 53 bits for the band."""
    n_bins = len(spectrogram)
    name = f"{seed}\n{segment_id}\n{view}\n{window}\n".encode()
    numbers = np.frombuffer(hashlib.shake_128(name + b"noise").digest(4 * spectrogram.size), "<u4") // 256 / 2**24
    found = spectrogram + ((2 * numbers - 1) * 0.05).reshape(spectrogram.shape)
    draw = int.from_bytes(hashlib.blake2b(name + b"masked band", digest_size=8).digest(), "big") / 2**64
    start = int(draw * min(247, n_bins - 9 + 1))
    found[start : start + 9] = 0
    return found


@pytest.mark.parametrize(("n_bins", "seed"), [(257, 0), (257, 4), (30, 0)])
def test_an_augmented_view_is_noise_and_one_empty_band(n_bins, seed):
    plain = torch.randn(1, n_bins, 50, generator=torch.Generator().manual_seed(1)) + 3
    before, starts, noise = plain.clone(), set(), []
    for i in range(60):
        found = augment_spectrogram(plain, SPEC, seed, f"s{i}", 2, 1)
        expected = augment_by_hand(plain[0].double().numpy(), f"s{i}", 2, 1, seed)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-6)
        empty = (found[0] == 0).all(dim=1).numpy()
        assert empty.sum() == 9 and np.flatnonzero(empty)[-1] - np.flatnonzero(empty)[0] == 8
        starts.add(int(np.flatnonzero(empty)[0]))
        noise.append((found - plain)[0][~empty].numpy().ravel())
    assert torch.equal(plain, before)
    assert max(starts) <= min(246, n_bins - 9) and len(starts) > 15
    assert kstest(np.concatenate(noise)[::7], "uniform", args=(-0.05, 0.1)).pvalue > 1e-3


def test_arrays_are_drawn_by_name_and_evenly():
    drawn = draw_array((300, 40), 0, "s", 1, 0, "noise")
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    assert drawn[0, :2].tolist() == [0.8876261711120605, 0.9571086168289185]  # the same on every machine
    others = [(1, "s", 1, 0, "noise"), (0, "t", 1, 0, "noise"), (0, "s", 2, 0, "noise"), (0, "s", 1, 1, "noise")]
    for name in (*others, (0, "s", 1, 0, "band")):
        assert abs(np.corrcoef(drawn.ravel(), draw_array((300, 40), *name).ravel())[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("encoder", "preset", "expected"),
    [
        ("resnet18_audio", "", "feb198967592"),
        ("resnet18_audio", "rna-test", "986485f5ba40"),
        ("resnet_demo", "zhang-stage1-train", "32ce641b4db4"),
        ("bninception_audio", "", "d2a270dc8486"),
        ("slowfast_demo", "zhang-sound-train", "767111723e17"),  # pictures have no views of sound
    ],
)
def test_without_views_stores_keep_the_names_they_had_before_there_were_any(encoder, preset, expected):
    spec = make_feature_spec(encoder, NO_WEIGHTS, StoreOptions(), preset=preset)
    assert fingerprint(spec) == expected
    assert FeatureSpec.model_validate_json(spec.model_dump_json()) == spec
    if spec.audio is not None:
        assert not {"n_views", "noise", "n_masked_bins"} & spec.audio.model_dump().keys()


def test_views_are_part_of_what_names_a_store_and_the_preset_sets_them():
    preset = make_feature_spec("resnet18_audio", NO_WEIGHTS, StoreOptions(), preset="zhang-sound-train")
    by_hand = ["audio.n_views=4", "audio.noise=0.05", "audio.n_masked_bins=9"]
    assert preset == make_feature_spec("resnet18_audio", NO_WEIGHTS, StoreOptions(), overrides=by_hand)
    assert FeatureSpec.model_validate_json(preset.model_dump_json()) == preset
    names = {fingerprint(preset)}
    for override in ("audio.n_views=3", "audio.noise=0.1", "audio.n_masked_bins=0"):
        overrides = [*by_hand, override]
        names.add(fingerprint(make_feature_spec("resnet18_audio", NO_WEIGHTS, StoreOptions(), overrides=overrides)))
    assert len(names) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_views": 4}, "4 views of sound are all the same: set `noise` and `n_masked_bins`, such as 0.05 and 9"),
        ({"noise": 0.05}, "change the views after the first: set `n_views` to 2 or more"),
        ({"n_views": 4, "noise": 0.05, "standardise": False}, "those of zhang2022 aren't"),
    ],
)
def test_views_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AudioSpec.model_validate({**ZHANG2022.model_dump(), **fields})
    overrides = [f"audio.{name}={value}" for name, value in fields.items()]
    with pytest.raises(SpecError, match=f"^resnet_demo: .*{message}"):
        make_feature_spec("resnet_demo", NO_WEIGHTS, StoreOptions(), overrides=overrides)


def read_outputs(cache):
    (path,) = [path for path in list_stores(cache) if "resnet_demo" in path.name]
    store = open_store(path)
    names = ["outputs/map", "outputs/pooled", "times", "frames", "n_valid", "has_audio", "loudness_dbfs"]
    return store, {name: store.read_array(name) for name in names}


def test_a_store_of_views_holds_what_the_network_makes_of_each(tiny, tiny_dataset):
    tiny.add_videos("v", "w", n_each=2)
    tiny_dataset.write_video(tiny.media / "w.mp4", sound="none")
    base = ("--encoders", "resnet_demo", "--dtype", "float32")
    code, out, err = tiny.run("plan", "tiny", *tiny.places, *base, *VIEWS, "--sample", "0", "--json")
    assert code == 0, err
    (planned,) = json.loads(out)["stores"]
    assert planned["n_clips"] == 3 * 4
    assert tiny.extract(*base, *VIEWS)[0] == 0
    store, found = read_outputs(tiny.cache)
    for output in planned["outputs"]:
        files = (Path(store.path) / "outputs" / output["name"] / "c").rglob("*")
        assert output["n_bytes"] == sum(file.stat().st_size for file in files if file.is_file())
        assert output["n_bytes_a_row"] == found[f"outputs/{output['name']}"][0].nbytes
    assert found["n_valid"].tolist() == [3] * 4 and found["has_audio"].tolist() == [1, 1, 0, 0]
    assert (found["times"] == found["times"][:, :1]).all() and (found["frames"] == found["frames"][:, :1]).all()
    assert np.isnan(found["outputs/pooled"][2:]).all() and np.isnan(found["outputs/map"][2:]).all()
    assert np.isfinite(found["outputs/pooled"][:2]).all()

    network = load_network("resnet_demo", resolve_weights("random:0", "resnet_demo"), "cpu")
    samples = torch.from_numpy(read_audio(tiny.media / "v.mp4", 0.5, 1.7, 16000))
    clean = log_spectrogram([samples], store.spec.audio)[0, 0].numpy()
    shown = [clean, *(augment_by_hand(clean.astype(np.float64), "v-1", view, 0) for view in (1, 2))]
    inputs = torch.from_numpy(np.stack(shown)[:, None].astype(np.float32))
    with torch.inference_mode():
        expected = network(inputs, ["map", "pooled"])
    row = list(store.segment_ids).index("v-1")
    for name in ("map", "pooled"):
        values = found[f"outputs/{name}"][row]
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-3, atol=1e-4)
        assert len({view.tobytes() for view in values}) == 3

    assert tiny.verify(store.path, "--sample", "100")[0] == 0
    explained = tiny.run("store", "explain", "v-1", store.path, *tiny.places)[1]
    assert "3 views of each window of audio" in explained and "noise of +-0.05 and 9 bands masked" in explained
    assert "up to date" in explained


def test_a_view_is_the_same_whatever_batch_shard_and_company(tiny, tmp_path):
    tiny.add_videos("v", n_each=4)
    base = ("--encoders", "resnet_demo", "--dtype", "float32")
    held = {}
    for name, options in {
        "clean": (),
        "one by one": (*VIEWS, "--batch", "1", "--rows-per-shard", "1"),
        "together": (*VIEWS, "--batch", "5", "--readers", "3"),
        "hdf5": (*VIEWS, "--backend", "hdf5", "--batch", "1"),
    }.items():
        tiny.cache = tmp_path / name
        assert tiny.extract(*base, *options)[0] == 0
        held[name] = read_outputs(tiny.cache)[1]
    for name, of_one in held["one by one"].items():
        np.testing.assert_allclose(of_one, held["together"][name], rtol=1e-4, atol=1e-5)
        assert of_one.tobytes() == held["hdf5"][name].tobytes()
        if name.startswith("outputs/"):
            assert of_one[:, :1].tobytes() == held["clean"][name].tobytes()  # view 0 is the clean one
            assert (of_one[:, 1] != of_one[:, 0]).reshape(4, -1).any(axis=1).all()


def test_sound_around_each_clip_has_views_too_once_it_is_standardised(tiny):
    tiny.add_videos("v", n_each=1)
    base = ("--encoders", "resnet_demo", "--preset", "rna-test", "--dtype", "float32", "--outputs", "pooled")
    code, _, err = tiny.extract(*base, *VIEWS)
    assert code == 2 and "those of planamente2021 aren't: leave out" in err and len(err.strip().splitlines()) == 1
    assert tiny.extract(*base, *VIEWS, "--set", "audio.standardise=true")[0] == 0
    (path,) = list_stores(tiny.cache)
    store = open_store(path)
    pooled, times = store.read(["v-0"], "pooled")[0], store.read_array("times")[0]
    assert pooled.shape[0] == 15 and (times.reshape(5, 3, 2) == times.reshape(5, 3, 2)[:, :1]).all()
    assert len({view.tobytes() for view in pooled}) == 11  # the segment is shorter than a clip: five times the same
    network = load_network("resnet_demo", resolve_weights("random:0", "resnet_demo"), "cpu")
    audio = store.spec.audio
    start_s, stop_s = times[4 * 3]
    samples = read_audio(tiny.media / "v.mp4", max(0, start_s), stop_s, audio.rate_hz)
    n_before = round(max(0, -start_s) * audio.rate_hz)
    samples = np.pad(samples, (n_before, max(0, audio.n_samples - n_before - len(samples))))[: audio.n_samples]
    clean = log_spectrogram([torch.from_numpy(samples)], audio)[0, 0].numpy()
    shown = augment_by_hand(clean.astype(np.float64), "v-0", 2, 4)
    with torch.inference_mode():
        expected = network(torch.from_numpy(shown[None, None].astype(np.float32)), ["pooled"])["pooled"][0].numpy()
    np.testing.assert_allclose(pooled[4 * 3 + 2], expected, rtol=1e-3, atol=1e-4)
    assert tiny.verify(path, "--sample", "100")[0] == 0
