"""Checks the road from manifest to store on small videos: values, times, resuming, staleness, failures, sound."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from echoshift.extract.clips import plan_clips
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.frames import prepare_clips
from echoshift.extract.run import ExtractionRequest, ExtractionSummary, extract_features
from echoshift.extract.shard import load_network
from echoshift.extract.weights.load import resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.store.verify import verify_store

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_dataset.py")))
CARD, N_FRAMES, RATE_HZ = TINY["CARD"], TINY["N_FRAMES"], TINY["RATE_HZ"]
read_every_array, write_video = TINY["read_every_array"], TINY["write_video"]


def make_segments(video_ids: list[str], n_each: int = 4) -> tuple[Segment, ...]:
    return tuple(TINY["make_segments"](video_ids, n_each))


class Silent:
    def start(self, what: str, n_total: int) -> None: ...

    def advance(self, n: int = 1) -> None: ...


Extract = Callable[..., ExtractionSummary]


@pytest.fixture
def extract(tmp_path: Path) -> Extract:
    def run(
        segments, *, encoders="slowfast_demo resnet_demo", overrides=(), outputs=("pooled",), backend="zarr"
    ) -> ExtractionSummary:
        specs = []
        for name in encoders.split():
            record = resolve_weights("random:0", name)
            spec = make_feature_spec(name, record, StoreOptions(dtype="float32"), outputs=outputs, overrides=overrides)
            specs.append((spec, record))
        request = ExtractionRequest(
            card=CARD,
            manifest=Manifest("tiny", segments, "m"),
            media_root=tmp_path / "media",
            cache_dir=tmp_path / "cache",
            encoders=tuple(specs),
            options=RunOptions(device="cpu"),
            backend=backend,
        )
        return extract_features(request, Silent())

    return run


def test_features_equal_the_plain_computation(tmp_path: Path, extract: Extract) -> None:
    write_video(tmp_path / "media/v.mp4")
    segments = make_segments(["v"])
    summary = extract(segments, encoders="slowfast_demo", outputs=("trunk_slow", "pooled"))
    store = open_store(Path(summary.stores[0].path))
    assert {o.name: o.shape for o in store.spec.outputs}["trunk_slow"] == store.read_all("trunk_slow").shape[2:]
    assert store.read_all("trunk_slow").any(axis=(2, 3, 4, 5)).all()
    with av.open(str(tmp_path / "media/v.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    spec = store.spec
    assert spec.frame is not None
    times = np.arange(N_FRAMES) / RATE_HZ
    network = load_network("slowfast_demo", resolve_weights("random:0", "slowfast_demo"), "cpu")
    for segment in segments:
        plan = plan_clips(spec.clip, segment.start_s, segment.stop_s, times, N_FRAMES / RATE_HZ)
        for clip in range(plan.n_clips):
            indices = np.floor(plan.frame_times_s[clip] * RATE_HZ + 1e-6).astype(int)
            with torch.inference_mode():
                batch = prepare_clips(torch.from_numpy(decoded[indices])[None], spec.frame)
                expected = network(batch, ["pooled"])["pooled"][0].numpy()
            found = store.read([segment.segment_id], "pooled")[0, clip]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # the inference form rounds otherwise
            row = list(store.segment_ids).index(segment.segment_id)
            assert store.read_array("frames")[row, clip].tolist() == [indices.min(), indices.max()]
            np.testing.assert_allclose(store.read_array("times")[row, clip], plan.times_s[clip])
    assert verify_store(store) == []


def test_both_backends_hold_equal_values(tmp_path: Path, extract: Extract) -> None:
    write_video(tmp_path / "media/v.mp4")
    write_video(tmp_path / "media/w.mp4", seed=1, sound="none")
    segments = make_segments(["v", "w"])
    zarr, hdf5 = (extract(segments, backend=backend) for backend in ("zarr", "hdf5"))
    for a, b in zip(zarr.stores, hdf5.stores, strict=True):
        assert read_every_array(a.path) == read_every_array(b.path)
        assert verify_store(open_store(Path(b.path))) == []


def test_new_segments_are_appended_and_changed_ones_redone(tmp_path: Path, extract: Extract) -> None:
    write_video(tmp_path / "media/v.mp4")
    write_video(tmp_path / "media/w.mp4", seed=1)
    old = extract(make_segments(["v"]))
    before = open_store(Path(old.stores[0].path)).read(["v-1", "v-2"], "pooled")
    (tmp_path / "media/v.mp4").touch()
    assert [s.n_computed for s in extract(make_segments(["v"])).stores] == [0, 0], "a touched video is the same"
    both = extract(make_segments(["v", "w"]))
    store = open_store(Path(both.stores[0].path))
    assert list(store.segment_ids) == [*(f"v-{i}" for i in range(4)), *(f"w-{i}" for i in range(4))]
    np.testing.assert_array_equal(store.read(["v-1", "v-2"], "pooled"), before)
    moved = [*make_segments(["v", "w"])]
    moved[1] = Segment("v-1", "v", 1.4, 2.6, ("a",), "d", "train")
    extract(tuple(moved))
    after = open_store(Path(both.stores[0].path)).read(["v-1", "v-2"], "pooled")
    assert (after[0] != before[0]).any()
    np.testing.assert_array_equal(after[1], before[1])


def test_missing_sound_is_a_named_state(tmp_path: Path, extract: Extract) -> None:
    write_video(tmp_path / "media/loud.mp4")
    write_video(tmp_path / "media/mute.mp4", sound="none")
    summary = extract(make_segments(["loud", "mute"], 2))
    pictures, sound = summary.stores
    assert (pictures.n_done, sound.n_done, sound.n_failed, sound.n_silent) == (4, 4, 0, 2)
    store = open_store(Path(sound.path))
    assert store.read_array("has_audio").tolist() == [1, 1, 0, 0]
    assert np.isnan(store.read(["mute-0", "mute-1"], "pooled")).all()
    assert np.isfinite(store.read(["loud-0"], "pooled")).all()
    loudness = store.read_array("loudness_dbfs")
    np.testing.assert_allclose(loudness[:2], -20, atol=1)
    assert np.isneginf(loudness[2:]).all()
    np.testing.assert_allclose(store.read_array("times")[1, 0], [0.5, 1.7])
    assert store.read_array("frames")[1, 0].tolist() == [8000, 27200]
    assert verify_store(store) == []


def test_a_store_of_windows_grows_with_longer_segments(tmp_path: Path, extract: Extract) -> None:
    write_video(tmp_path / "media/v.mp4")
    overrides = ("clip.sampling=windows", "clip.n_clips=1", "clip.step=8", "clip.rate_hz=none", "clip.stride=1")
    short, long = Segment("short", "v", 0, 1.2, ("a",), "d", "train"), Segment("long", "v", 0, 3, ("a",), "d", "train")
    grown = [extract(s, encoders="slowfast_demo", overrides=overrides) for s in ((short,), (short, long))][1]
    store = open_store(Path(grown.stores[0].path))
    (tmp_path / "cache").rename(tmp_path / "grown")
    at_once = open_store(Path(extract((short, long), encoders="slowfast_demo", overrides=overrides).stores[0].path))
    grown_store = open_store(tmp_path / "grown" / Path(store.path).relative_to(tmp_path / "cache"))
    for segment_id, n in (("short", 2), ("long", 5)):
        np.testing.assert_array_equal(
            grown_store.read([segment_id], "pooled")[0, :n], at_once.read([segment_id], "pooled")[0, :n]
        )
    rows = [list(grown_store.segment_ids).index(segment_id) for segment_id in ("short", "long")]
    assert grown_store.read_array("n_valid")[rows].tolist() == [2, (45 - 8) // 8 + 1]
    times = grown_store.read_array("times")[rows]
    np.testing.assert_allclose(times[1, :5, 1], [8 / 15, 16 / 15, 24 / 15, 32 / 15, 40 / 15])
    assert np.isnan(times[0, 2:]).all()
    assert verify_store(grown_store) == []


def test_a_value_too_large_for_float16_fails_its_row(tmp_path, extract, monkeypatch):
    write_video(tmp_path / "media/v.mp4")
    network = load_network("slowfast_demo", resolve_weights("random:0", "slowfast_demo"), "cpu")
    forward = type(network).forward
    calls = iter(range(10**6))

    def explode(self: torch.nn.Module, x: torch.Tensor, outputs: list[str]) -> dict[str, torch.Tensor]:
        scale = np.inf if next(calls) == 7 else 1.0
        return {name: value * scale for name, value in forward(self, x, outputs).items()}

    monkeypatch.setattr(type(network), "forward", explode)
    summary = extract(make_segments(["v"]), encoders="slowfast_demo")
    assert summary.stores[0].n_failed == 1
    assert summary.stores[0].failures[0].segment_id == "v-1"
    assert "pooled of clip 2 is not finite in float32" in summary.stores[0].failures[0].reason


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip.n_clip=3", "clip has no field 'n_clip'"),
        ("clips.n_clips=3", "no part 'clips'; did you mean 'clip'?"),
        ("n_clips=3", "is not"),
        ("clip.n_clips=0", "greater than 0"),
        ("frame.crop=300", "can't be larger than `short_side`"),
        ("clip.n_views=2", "^slowfast_demo: .*views are all the same"),
        ("slowfast_demi.clip.n_clips=3", "did you mean 'slowfast_demo'"),
    ],
)
def test_impossible_overrides_are_refused_by_name(override: str, message: str) -> None:
    record = resolve_weights("random:0", "slowfast_demo")
    with pytest.raises(SpecError, match=message):
        make_feature_spec("slowfast_demo", record, StoreOptions(), overrides=[override])


@pytest.mark.shared
def test_every_odd_file_gives_features_or_one_clear_line(tmp_path: Path, extract: Extract, shared_data: Path) -> None:
    (tmp_path / "media").symlink_to(shared_data / "edge")
    names = sorted(p.stem for p in (shared_data / "edge").iterdir() if p.suffix in (".mp4", ".mov"))
    segments = tuple(
        Segment(f"{name}-{i}", name, start_s, start_s + 0.1, ("a",), "d", "train")
        for name in names
        for i, start_s in enumerate((0.0, 0.9, 4.9))
    )
    summary = extract(segments)
    for store in summary.stores:
        assert store.n_pending == 0
        assert verify_store(open_store(Path(store.path))) == []
    pictures, sound = summary.stores
    assert {f.segment_id: f.exception for f in pictures.failures} == {
        **{f"decord_{name}-{i}": "SegmentOutsideVideoError" for name in ("unordered", "video_90") for i in (1, 2)},
        "carphone_pristine-2": "SegmentOutsideVideoError",
        "decord_corrupted-2": "DecodeError",
    }
    assert sound.n_failed == 0
    store = open_store(Path(sound.path))
    silent = {s for s, heard in zip(store.segment_ids, store.read_array("has_audio"), strict=True) if not heard}
    without_track = ("carphone_pristine", "decord_corrupted", "decord_unordered", "decord_video_90")
    assert silent == {f"{name}-{i}" for name in without_track for i in range(3)} | {"video_with_failing_audio-2"}


def test_clips_matter_to_sound_only_where_it_is_centred_on_them() -> None:
    record = resolve_weights("random:0", "resnet_demo")
    segment = make_feature_spec("resnet_demo", record, StoreOptions(), overrides=["clip.n_clips=4"])
    clip = make_feature_spec("resnet_demo", record, StoreOptions(), overrides=["clip.n_clips=4", "audio.span=clip"])
    assert (segment.clip.n_clips, clip.clip.n_clips) == (1, 4)
