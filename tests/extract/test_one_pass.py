"""Checks the road inside a shard: one decode for all, stretches, views, flow, time limits, memory, replaced files."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from echoshift.extract import rows as rows_module
from echoshift.extract.clips import plan_clips
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.flow import FlowComputer, FlowMethod
from echoshift.extract.frames import prepare_clips
from echoshift.extract.media import MediaSurvey, count_clips_at_most, identify_segments
from echoshift.extract.readers.video import VideoReader
from echoshift.extract.shard import load_network, process_shard
from echoshift.extract.weights.load import resolve_weights
from echoshift.extract.work import ExtractionPlan, RunOptions, ShardWork, StoreTarget
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.execution import ShardTask, commit_report
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store import layout
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import compute_digests, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.pipeline.store.verify import verify_store


@pytest.fixture
def video(tmp_path, media_factory):
    """Write 4 s at 25 Hz, 64 x 48, with sound that begins after 2 s."""
    sound = np.zeros((1, 4 * 16000), np.float32)
    sound[:, 32000:] = np.random.default_rng(0).normal(0, 0.1, 32000)
    (tmp_path / "media").mkdir()
    return media_factory.write_video(
        tmp_path / "media/v.mp4", n_frames=100, sound=sound, sound_rate=16000, width=96, height=72
    )


def run(tmp_path, segments, encoders, name="s", run_options=None, **spec_options):
    """Extract one shard into stores of its own, by encoder."""
    root = tmp_path / "media"
    survey = MediaSurvey(root, MediaLayout())
    stores: dict[str, FeatureStore] = {}
    targets, digests = {}, {}
    for encoder in encoders:
        record = resolve_weights("random:0", encoder)
        spec = make_feature_spec(encoder, record, StoreOptions(dtype="float32"), **spec_options)
        store = create_store(
            tmp_path / name / "d" / f"{encoder}.zarr",
            "d",
            spec,
            [s.segment_id for s in segments],
            n_clips=count_clips_at_most(survey, segments, spec),
            manifest_sha256="m",
            weights_source="test",
            n_rows_per_shard=len(segments),
        )
        stores[store.path] = store
        targets[store.path] = StoreTarget(store.path, spec, record)
        digests[store.path] = compute_digests(segments, identify_segments(survey, segments, spec))
    plan = ExtractionPlan(root, MediaLayout(), targets, run_options or RunOptions(device="cpu"))
    task = ShardTask(plan_shards(next(iter(stores.values())).layout)[0], tuple(stores))
    report = process_shard(plan, ShardWork(task, tuple(segments), digests), stores)
    commit_report(stores, report)
    for path in stores:
        assert verify_store(open_store(Path(path))) == []
    failures = {f.segment_id: f for index in report.indices.values() for f in index.failures}
    return {Path(path).stem: open_store(Path(path)) for path in stores}, failures


def segments_of(video_id: str, *spans: tuple[float, float]) -> list[Segment]:
    return [Segment(f"{video_id}-{i}", video_id, a, b, ("a",), "d", "train") for i, (a, b) in enumerate(spans)]


def test_one_decode_serves_every_encoder(tmp_path, video, monkeypatch):
    decoded = []
    read_frames = VideoReader.read_frames

    def count(self, times_s):
        decoded.extend(np.asarray(times_s).tolist())
        return read_frames(self, times_s)

    monkeypatch.setattr(VideoReader, "read_frames", count)
    segments = segments_of("v", (0, 1.5), (1, 3))
    overrides = ["i3d_flow.frame.flow=dis", "i3d_flow.frame.short_side=64", "i3d_flow.frame.crop=64"]
    overrides += ["clip.n_clips=2", "i3d_flow.clip.n_frames=9", "i3d_flow.clip.rate_hz=12.5"]
    together, _ = run(tmp_path, segments, ["slowfast_demo", "i3d_flow", "resnet_demo"], overrides=overrides)
    n_together = len(decoded)
    assert n_together <= 50 + 52  # no picture of a segment twice
    decoded.clear()
    alone, _ = run(tmp_path, segments, ["slowfast_demo"], name="alone", overrides=overrides)
    assert len(decoded) <= n_together
    same = [s["slowfast_demo"].read_all("pooled").tobytes() for s in (together, alone)]
    assert same[0] == same[1]


def test_stretches_of_any_size_give_the_same_bytes(tmp_path, video, monkeypatch):
    segments = segments_of("v", (0, 4), (0.2, 0.4))
    wanted, _ = run(tmp_path, segments, ["slowfast_demo"])
    monkeypatch.setattr(rows_module, "MAX_STRETCH_BYTES", 3 * 72 * 96 * 3)
    small, _ = run(tmp_path, segments, ["slowfast_demo"], name="small")
    readers = RunOptions(device="cpu", n_readers=3)
    many, _ = run(tmp_path, segments, ["slowfast_demo"], name="many", run_options=readers)
    for other in (small, many):
        assert (
            other["slowfast_demo"].read_all("pooled").tobytes() == wanted["slowfast_demo"].read_all("pooled").tobytes()
        )


def test_views_are_the_same_in_any_batch_and_company(tmp_path, video):
    segments = segments_of("v", (0, 2), (1, 3.5), (0.5, 4))
    options = {"preset": "zhang-stage1-train", "overrides": ["clip.n_views=3"]}
    together, _ = run(tmp_path, segments, ["slowfast_demo"], **options)
    alone, _ = run(tmp_path, segments[1:2], ["slowfast_demo"], name="alone", **options)
    found = together["slowfast_demo"].read_all("pooled")
    assert found.shape[:2] == (3, 3)
    np.testing.assert_array_equal(found[1], alone["slowfast_demo"].read_all("pooled")[0])
    assert (np.abs(found[1, 0] - found[1, 1]).max() > 1e-3) and (np.abs(found[1, 0] - found[1, 2]).max() > 1e-3)
    other, _ = run(tmp_path, segments[1:2], ["slowfast_demo"], name="seed", preset="zhang-stage1-train",
                   overrides=["clip.n_views=3", "clip.seed=1"])  # fmt: skip
    assert np.abs(found[1] - other["slowfast_demo"].read_all("pooled")[0]).max() > 1e-3


def test_three_crops_stand_beside_each_other(tmp_path, video):
    segments = segments_of("v", (0, 3))
    three, _ = run(tmp_path, segments, ["slowfast_demo"], overrides=["frame.crops=three", "frame.crop=56"])
    one, _ = run(tmp_path, segments, ["slowfast_demo"], name="one", overrides=["frame.crop=56"])
    store = three["slowfast_demo"]
    assert store.layout.n_clips == 15
    np.testing.assert_allclose(store.read_all("pooled")[0, 1::3], one["slowfast_demo"].read_all("pooled")[0], rtol=1e-5)
    times = store.read_array("times")[0].reshape(5, 3, 2)
    assert (times == times[:, :1]).all()
    assert (store.read_array("n_valid") == 15).all()


def test_computed_flow_equals_the_plain_computation(tmp_path, video):
    segments = segments_of("v", (0.5, 2.5))
    overrides = ["frame.flow=dis", "frame.short_side=64", "frame.crop=64", "clip.n_clips=1", "clip.n_frames=9"]
    stores, _ = run(tmp_path, segments, ["i3d_flow"], overrides=[*overrides, "clip.rate_hz=25"])
    spec = stores["i3d_flow"].spec
    with VideoReader(video) as reader:
        plan = plan_clips(spec.clip, 0.5, 2.5, reader.frame_times_s, reader.info.duration_s)
        computer = FlowComputer(FlowMethod("dis", 64, 20))
        flows = []
        for t in plan.frame_times_s[0]:
            before, after = (computer.shrink(reader.read_frames([x])[0]) for x in (t, t + 1 / 25))
            flows.append(computer.compute(before, after))
    network = load_network("i3d_flow", resolve_weights("random:0", "i3d_flow"), "cpu")
    with torch.inference_mode():
        expected = network(prepare_clips(torch.from_numpy(np.stack(flows))[None], spec.frame), ["pooled"])["pooled"]
    np.testing.assert_allclose(stores["i3d_flow"].read_all("pooled")[0, 0], expected[0].numpy(), rtol=1e-4, atol=1e-6)


def test_long_rows_are_written_in_blocks_and_windows_that_do_not_exist_take_no_space(tmp_path, video, monkeypatch):
    monkeypatch.setattr(layout, "N_WINDOWS_PER_CHUNK", 8)
    overrides = ["clip.sampling=windows", "clip.n_clips=1", "clip.n_frames=4", "clip.stride=1", "clip.step=4"]
    segments = segments_of("v", (0, 4), (0, 0.3))
    stores, _ = run(tmp_path, segments, ["slowfast_demo"], overrides=[*overrides, "clip.rate_hz=none"])
    store = stores["slowfast_demo"]
    assert store.read_array("n_valid").tolist() == [25, 2]
    values = store.read_all("pooled")
    assert values[0].any(axis=-1).all() and values[1, :2].any(axis=-1).all() and not values[1, 2:].any()
    plain, _ = run(tmp_path, segments[:1], ["slowfast_demo"], name="p", overrides=[*overrides, "clip.rate_hz=none"])
    np.testing.assert_array_equal(plain["slowfast_demo"].read_all("pooled")[0], values[0])


def test_sound_around_clips_streams_and_knows_silence(tmp_path, video):
    segments = segments_of("v", (0, 1), (0, 4), (1.0, 3.9))
    overrides = ["audio.span=clip", "audio.duration_s=0.5", "clip.n_clips=3"]
    store = run(tmp_path, segments, ["resnet_demo"], overrides=overrides)[0]["resnet_demo"]
    assert store.read_array("has_audio").tolist() == [0, 1, 1]
    assert np.isnan(store.read_all("pooled")[0]).all() and np.isfinite(store.read_all("pooled")[1:]).all()
    assert np.isneginf(store.read_array("loudness_dbfs")[0])
    times = store.read_array("times")
    np.testing.assert_allclose(times[..., 1] - times[..., 0], 0.5)
    assert (times[1:, 1] > times[1:, 0]).all()


@pytest.mark.alone
def test_a_decoder_that_hangs_fails_its_segment_alone(tmp_path, video, monkeypatch, media_factory):
    media_factory.write_video(tmp_path / "media/w.mp4", n_frames=50, width=96, height=72)
    release = threading.Event()
    read_frames = VideoReader.read_frames

    def hang(self, times_s):
        if self._path.stem == "w":
            release.wait(60)
        return read_frames(self, times_s)

    monkeypatch.setattr(VideoReader, "read_frames", hang)
    segments = [*segments_of("v", (0, 2)), *segments_of("w", (0, 1.5)), *segments_of("x", (0, 1))]
    (tmp_path / "media/x.mp4").write_bytes((tmp_path / "media/v.mp4").read_bytes())
    options = RunOptions(device="cpu", segment_timeout_s=3)
    stores, failures = run(tmp_path, segments, ["slowfast_demo"], run_options=options)
    release.set()
    assert list(failures) == ["w-0"]
    assert failures["w-0"].exception == "MediaTimeoutError" and failures["w-0"].retryable
    assert "reading video w gave nothing for 3 s" in failures["w-0"].reason
    assert stores["slowfast_demo"].read_array("state").tolist() == [1, 2, 1]


def test_a_video_replaced_while_it_is_read_fails_its_segments(tmp_path, video, monkeypatch, media_factory):
    read_frames = VideoReader.read_frames

    def replace(self, times_s):
        frames = read_frames(self, times_s)
        if not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            media_factory.write_video(tmp_path / "media/fresh.mp4", n_frames=90, width=96, height=72)
            (tmp_path / "media/fresh.mp4").replace(video)
        return frames

    monkeypatch.setattr(VideoReader, "read_frames", replace)
    _, failures = run(tmp_path, segments_of("v", (0, 1)), ["slowfast_demo"])
    assert failures["v-0"].exception == "MediaChangedError" and failures["v-0"].retryable
    assert "changed while it was read" in failures["v-0"].reason


def test_a_clip_that_needs_more_memory_than_there_is_fails_alone(tmp_path, video):
    """Gives the process 6 GB of address space and asks for a clip of which one copy takes 12 GB."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2] / "src")!r})
import importlib.util
spec = importlib.util.spec_from_file_location("t", {__file__!r}); t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
from pathlib import Path
t.load_network("slowfast_demo", t.resolve_weights("random:0", "slowfast_demo"), "cpu")
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
segments = t.segments_of("v", (0, 3))
options = ["clip.n_frames=1024", "clip.n_clips=1", "frame.short_side=1024", "frame.crop=1024"]
stores, failures = t.run(Path({str(tmp_path)!r}), segments, ["slowfast_demo"], overrides=options)
print(failures["v-0"].exception, "|", failures["v-0"].reason)
"""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("MediaMemoryError | preparing [")
    assert "frames needs more memory than there is" in found.stdout
