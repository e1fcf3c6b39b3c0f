"""Checks that training sees what extraction sees, whoever reads it, and that readers neither leak nor hide a fault."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from echoshift.extract import shard as shard_module
from echoshift.extract.clips import draw_integer
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaSurvey, OpenMedia, count_clips_at_most, identify_segments
from echoshift.extract.weights.load import resolve_weights
from echoshift.extract.work import ExtractionPlan, RunOptions, ShardWork, StoreTarget
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import DecodeError, ManifestError, MediaError, MediaTimeoutError, SpecError, StoreError
from echoshift.pipeline.execution import ShardTask, commit_report
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import compute_digests, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.train.stage1 import frames as frames_module
from echoshift.train.stage1.clips import TrunkClips, derive_epoch_seed
from echoshift.train.stage1.frames import DecodedClips, KeptMedia, read_clips

TINY = runpy.run_path(str(Path(__file__).parents[1] / "extract" / "tiny_dataset.py"))
LAYOUT = MediaLayout()
N_MB = 100


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    for seed, name in enumerate(("a", "b")):
        TINY["write_video"](root / f"{name}.mp4", seed=seed, sound="none")
    return root


@pytest.fixture
def segments():
    return list(TINY["make_segments"](["a", "b"]))


def make_spec(preset: str, *overrides: str, encoder: str = "slowfast_demo", outputs: str = "trunk") -> FeatureSpec:
    record = resolve_weights("random:0", encoder if encoder.endswith("demo") else "slowfast_demo")
    return make_feature_spec(
        encoder, record, StoreOptions(dtype="float32"), preset=preset, overrides=overrides, outputs=(outputs,)
    )


def extract_store(
    path: Path,
    media: Path,
    segments: list[Segment],
    spec: FeatureSpec,
    fed: dict[tuple[str, int], Tensor] | None = None,
) -> FeatureStore:
    """Extract one shard as `echoshift extract` does; with `fed` the network is not run, what it is fed is kept."""
    survey = MediaSurvey(media, LAYOUT)
    store = create_store(
        path / f"{spec.encoder}.zarr",
        "d",
        spec,
        [s.segment_id for s in segments],
        n_clips=count_clips_at_most(survey, segments, spec),
        manifest_sha256="m",
        weights_source="t",
        n_rows_per_shard=len(segments),
    )
    target = StoreTarget(store.path, spec, resolve_weights("random:0", "slowfast_demo"))
    plan = ExtractionPlan(media, LAYOUT, {store.path: target}, RunOptions(device="cpu"))
    digests = {store.path: compute_digests(segments, identify_segments(survey, segments, spec))}
    work = ShardWork(ShardTask(plan_shards(store.layout)[0], (store.path,)), tuple(segments), digests)

    class Capturing:
        def __init__(self, _target: object, rows: shard_module.ShardRows, *_: object) -> None:
            self._rows = rows

        def add(self, row: int, entry: int, clip: Tensor) -> None:
            fed[segments[row].segment_id, entry] = clip
            self._rows.put(row, entry, {o.name: np.zeros(o.shape, np.float32) for o in spec.outputs})

        def run(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        if fed is not None:
            patch.setattr(shard_module, "ShardEncoder", Capturing)
        commit_report({store.path: store}, shard_module.process_shard(plan, work, {store.path: store}))
    return open_store(store.path)


CASES = {
    "train": make_spec("zhang-stage1-train", "clip.seed=7"),
    "views": make_spec("zhang-stage2-train", "clip.n_views=2"),
    "three crops": make_spec("zhang-encoder-test"),
    "flow": make_spec(
        "zhang-stage1-train",
        "frame.flow=dis",
        "frame.short_side=64",
        "frame.crop=56",
        encoder="slowonly_r50_flow",
        outputs="pooled",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_clips_are_bit_for_bit_what_extraction_feeds_the_network(case, media, segments, tmp_path):
    spec, fed = CASES[case], {}
    segments = [*segments[1::2], Segment("brief", "a", 0.2, 0.5, ("a",), "d", "train")]
    store = extract_store(tmp_path, media, segments, spec, fed)
    rows = {name: i for i, name in enumerate(store.segment_ids)}
    n = spec.clip.n_clips * spec.n_entries_per_clip
    with OpenMedia(media, LAYOUT) as plain, KeptMedia(media, LAYOUT, N_MB << 20) as kept:
        for reader in (plain, kept, kept):
            for segment in segments:
                found = read_clips(reader, segment, spec)
                row = rows[segment.segment_id]
                assert len(found.clips) == n
                for entry in range(n):
                    assert torch.equal(found.clips[entry], fed[segment.segment_id, entry]), (segment, entry)
                np.testing.assert_array_equal(found.times_s, store.read_array("times")[row, :n])
                np.testing.assert_array_equal(found.frames, store.read_array("frames")[row, :n])


def test_pictures_are_decoded_once_while_they_fit(media, segments, monkeypatch):
    spec = CASES["train"]
    n_opened = []
    open_frames = OpenMedia.open_frames

    def count(self: OpenMedia, segment: Segment, *arguments: object) -> object:
        n_opened.append(segment.segment_id)
        return open_frames(self, segment, *arguments)

    monkeypatch.setattr(OpenMedia, "open_frames", count)
    n_segment_bytes = 20 * 96 * 72 * 3  # 1.2 s at 15 Hz, the frames at both ends, and one more
    for n_fitting, n_expected in ((len(segments), 0), (8, 0), (7, len(segments))):
        with KeptMedia(media, LAYOUT, n_fitting * n_segment_bytes) as kept:
            for epoch in range(2):
                n_opened.clear()
                for segment in segments:
                    read_clips(kept, segment, spec)
                assert len(set(n_opened)) == (len(segments) if epoch == 0 else n_expected)
                assert kept._n_bytes <= n_fitting * n_segment_bytes


def make_inputs(media: Path, segments: list[Segment], n_readers: int = 0, **options: object) -> DecodedClips:
    arguments = {"spec": CASES["train"], "seed": 3, "n_cached_mb": N_MB, **options}
    return DecodedClips(media, LAYOUT, segments, n_readers=n_readers, **arguments)


def batch_ids(segments: list[Segment], size: int = 3) -> list[list[str]]:
    ids = [s.segment_id for s in segments]
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@pytest.fixture
def no_process_left():
    yield
    assert [p for p in multiprocessing.active_children() if p.is_alive()] == []


def test_draws_depend_on_seed_epoch_and_segment_alone(media, segments, no_process_left):
    batches = batch_ids(segments)
    with make_inputs(media, segments) as here, make_inputs(media, segments, n_readers=2) as apart:
        first = list(here.iterate_batches(batches, epoch=0))
        assert [b["clip"].shape for b in first] == [(3, 3, 8, 56, 56), (3, 3, 8, 56, 56), (2, 3, 8, 56, 56)]
        clips = dict(zip([s.segment_id for s in segments], torch.cat([b["clip"] for b in first]), strict=True))
        for inputs in (apart, apart, here):  # twice by the same processes
            found = list(inputs.iterate_batches(batches, epoch=0))
            assert all(torch.equal(a["clip"], b["clip"]) for a, b in zip(found, first, strict=True))
        assert len(multiprocessing.active_children()) == 2
        left = apart.iterate_batches(batches, epoch=0)
        next(left)
        left.close()
        (alone,) = apart.iterate_batches([["b-2", "a-1"]], epoch=0)
        assert torch.equal(alone["clip"], torch.stack([clips["b-2"], clips["a-1"]]))
        (later,) = apart.iterate_batches([["b-2", "a-1"]], epoch=1)
        assert not torch.equal(alone["clip"][0], later["clip"][0]) and not torch.equal(
            alone["clip"][1], later["clip"][1]
        )
        spec = CASES["train"]
        clip = spec.clip.model_copy(update={"seed": derive_epoch_seed(3, 1)})
        with OpenMedia(media, LAYOUT) as plain:
            by_hand = read_clips(plain, segments[6], spec.model_copy(update={"clip": clip}))
        assert torch.equal(later["clip"][0], by_hand.clips[0])
    with make_inputs(media, segments, seed=4) as other:
        (found,) = other.iterate_batches([["b-2"]], epoch=0)
    assert not torch.equal(found["clip"][0], clips["b-2"])


@pytest.mark.parametrize("n_readers", [0, 1])
def test_a_segment_that_cannot_be_read_is_named(n_readers, media, segments, tmp_path, no_process_left):
    broken = tmp_path / "media"
    broken.mkdir()
    (broken / "a.mp4").symlink_to(media / "a.mp4")
    (broken / "b.mp4").write_bytes((media / "b.mp4").read_bytes()[:3000])
    with make_inputs(broken, segments, n_readers=n_readers) as inputs:
        for found in (
            inputs.iterate_batches([["a-0"], ["a-1", "b-1"]], epoch=0),
            inputs.iterate_clips(["a-0", "b-1"], make_spec("zhang-stage2-test")),
        ):
            next(found)
            with pytest.raises(DecodeError) as caught:
                next(found)
            text = str(caught.value)
            assert text.startswith("segment b-1: ") and "\n" not in text
            assert text.endswith("or take the segment out of the manifest")
        with pytest.raises(ManifestError, match="segment c-9 is not among those"):
            next(inputs.iterate_batches([["c-9"]], epoch=0))


@pytest.mark.slow
def test_a_reader_process_that_dies_or_hangs_is_told(media, segments, monkeypatch, no_process_left):
    with make_inputs(media, segments, n_readers=1) as inputs:
        found = inputs.iterate_batches([[s.segment_id] for s in segments * 20], epoch=0)
        next(found)
        (process,) = multiprocessing.active_children()
        process.kill()
        with pytest.raises(MediaError, match=r"a reader process ended before it gave segment .*visual\.n_readers"):
            list(found)
    monkeypatch.setattr(frames_module, "TIMEOUT_S", 0.001)
    with (
        make_inputs(media, segments, n_readers=1) as inputs,
        pytest.raises(
            MediaTimeoutError, match=r"segment a-0, or one of the next: reading its video a takes longer than 0\.001 s"
        ),
    ):
        next(inputs.iterate_batches([["a-0"]], epoch=0))


SCRIPT = """
import sys, time, multiprocessing
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_visual_inputs as t
if __name__ == "__main__":
    segments = t.TINY["make_segments"](["a", "b"])
    inputs = t.make_inputs(Path({media!r}), segments, n_readers=2)
    for batch in inputs.iterate_batches(t.batch_ids(segments) * 100000, 0):
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGINT", "SIGKILL"])
def test_readers_end_with_the_run(media, tmp_path, end):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), media=str(media)))
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    if end == "SIGINT":
        os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    else:
        run.kill()
    _, errors = run.communicate(timeout=60)
    if end == "SIGINT":
        assert errors.rstrip().endswith("KeyboardInterrupt") and errors.count("Traceback") == 1
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_only_one_view_a_segment_can_be_trained_from_frames(media, segments):
    for spec in (make_spec("zhang-stage1-train", "clip.n_views=2"), make_spec("zhang-encoder-test")):
        with pytest.raises(SpecError, match="slowfast_demo: training from frames takes one clip and one view"):
            make_inputs(media, segments, spec=spec)


def test_trunk_mode_gives_stored_views_and_tests_and_agrees_with_the_frames(media, segments, tmp_path):
    segments, n_views = segments[::2], 3
    train = extract_store(
        tmp_path / "train", media, segments, make_spec("zhang-stage1-train", f"clip.n_views={n_views}")
    )
    test_spec = make_spec("zhang-stage2-test")
    test = extract_store(tmp_path / "test", media, segments, test_spec)
    batches = batch_ids(segments)
    with TrunkClips(train, [test], seed=3) as inputs:
        drawn: dict[str, set[int]] = {}
        for epoch in range(10):
            seed = derive_epoch_seed(3, epoch)
            for batch, found in zip(batches, inputs.iterate_batches(batches, epoch), strict=True):
                assert set(found) == {"trunk_slow", "trunk_fast"}
                for name, values in found.items():
                    assert values.dtype == torch.float32
                    for segment_id, value in zip(batch, values, strict=True):
                        view = draw_integer(0, n_views - 1, seed, segment_id, 0, 0, "view")
                        drawn.setdefault(segment_id, set()).add(view)
                        np.testing.assert_array_equal(value.numpy(), train.read([segment_id], name)[0, view])
        assert set().union(*drawn.values()) == {0, 1, 2} and all(len(views) > 1 for views in drawn.values())
        ids = [s.segment_id for s in segments]
        adapted = make_spec("zhang-stage2-test", outputs="pooled").model_copy(update={"weights": "another"})
        cached = list(inputs.iterate_clips(ids, adapted))
        assert [name for name, _, _ in cached] == ids
        with make_inputs(media, segments) as frames:
            from echoshift.extract.shard import load_network

            network = load_network("slowfast_demo", resolve_weights("random:0", "slowfast_demo"), "cpu")
            for (name, clips, facts), (_, trunk, stored) in zip(
                frames.iterate_clips(ids, test_spec), cached, strict=True
            ):
                row = list(test.segment_ids).index(name)
                np.testing.assert_array_equal(facts.times_s, stored.times_s)
                np.testing.assert_array_equal(facts.frames, stored.frames)
                np.testing.assert_array_equal(facts.digest, stored.digest)
                np.testing.assert_array_equal(facts.digest, test.read_array("digest")[row])
                assert len(clips["clip"]) == 5
                with torch.inference_mode():
                    for key, value in network.trunk(clips["clip"][:2]).items():
                        torch.testing.assert_close(trunk[key][:2], value, rtol=1e-4, atol=1e-4)
        with pytest.raises(StoreError, match="no level-2 store of slowfast_demo holds the clips asked for"):
            next(inputs.iterate_clips(ids, make_spec("zhang-stage1-val")))
        left = inputs.iterate_batches(batches, 0)
        next(left)
        left.close()
        with pytest.raises(StoreError, match="segment c-9 is not in"):
            next(inputs.iterate_batches([["c-9"]], 0))
    assert not [t for t in threading.enumerate() if t.name.startswith("trunk-reader")]
    with pytest.raises(StoreError, match=r"doesn't hold views of one clip; extract with --preset zhang-stage1-train"):
        TrunkClips(test, [], seed=0)
    pooled = extract_store(tmp_path / "pooled", media, segments, make_spec("zhang-stage1-train", outputs="pooled"), {})
    with pytest.raises(StoreError, match="holds nothing of the trunk"):
        TrunkClips(pooled, [], seed=0)
    with pytest.raises(StoreError, match="holds nothing of the trunk"):
        TrunkClips(train, [pooled], seed=0)


def test_a_narrow_store_comes_back_in_float32(media, segments, tmp_path):
    spec = make_spec("zhang-stage1-train", "clip.n_views=2").model_copy(update={"dtype": "float16"})
    store = extract_store(tmp_path, media, segments[:2], spec)
    (found,) = TrunkClips(store, [], seed=0).iterate_batches([["a-0", "a-1"]], 0)
    stored = store.read(["a-0", "a-1"], "trunk_slow")
    assert stored.dtype == np.float16 and found["trunk_slow"].dtype == torch.float32
    assert all(
        any(np.array_equal(value.numpy(), view.astype(np.float32)) for view in views)
        for value, views in zip(found["trunk_slow"], stored, strict=True)
    )
