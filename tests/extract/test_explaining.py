"""Checks that a segment is explained in every store, and that the reason named is the true one."""

from __future__ import annotations

import json
from dataclasses import replace

from echoshift.pipeline.store.layout import Shard
from echoshift.pipeline.store.open import hold_store, list_stores, open_store


def explain(tiny, segment_id: str, *arguments):
    """Return the explanation in the store of pictures."""
    code, out, err = tiny.run("store", "explain", segment_id, *tiny.places, "--json", *arguments)
    assert code == 0, err
    return next(e for e in json.loads(out) if "slowfast_demo" in e["store"])


def test_a_done_row_is_told_in_every_store_with_its_clips(tiny) -> None:
    tiny.add_videos("v", "w")
    tiny.extract()
    code, out, _ = tiny.run("store", "explain", "w-1", *tiny.places)
    assert code == 0
    assert out.count("segment w-1: done; row 5 of") == 2
    assert out.count("manifest: w, 0.5 s to 1.7 s") == 2
    assert out.count("up to date: video and times are those the row was made from") == 2
    assert "audio: -20" in out
    assert "5 clips: 0.5" in out
    found = explain(tiny, "w-1")
    store = open_store(next(path for path in list_stores(tiny.cache) if "slowfast_demo" in path.name))
    assert found["times_s"] == store.read_array("times", 5, 6)[0].tolist()
    assert found["frames"] == store.read_array("frames", 5, 6)[0].tolist()
    assert found["last_run"]
    one = tiny.run("store", "explain", "w-1", store.path, *tiny.places)[1]
    assert one.count("segment w-1") == 1


def test_a_replaced_video_and_changed_times_are_told_apart(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    tiny.extract("--set", "slowfast_demo.clip.stride=1")
    moved = tiny_dataset.make_segments(["v", "w"])
    moved[1] = replace(moved[1], start_s=0.75, stop_s=1.75)
    tiny.write_manifest(moved)
    found = explain(tiny, "v-1")
    assert found["status"] == "stale"
    assert "its times changed: 3 other rows of the video still match its content" in found["why"][0]
    assert "the manifest says 0.75 s to 1.75 s" in found["why"][0]
    assert "from 0.5 s to 1.7 s, to 0.75 s to 1.75 s" in tiny.run("store", "explain", "v-1", *tiny.places)[1]
    tiny_dataset.write_video(tiny.media / "w.mp4", seed=9)
    found = explain(tiny, "w-2")
    assert found["status"] == "stale"
    assert "the video's content changed: none of its 4 rows matches it any more" in found["why"][0]
    assert "w.mp4 was last written at" in found["why"][0]
    (tiny.media / "w.mp4").unlink()
    assert "are no longer below" in explain(tiny, "w-2")["why"][0]


def test_failed_pending_and_absent_rows_say_why(tiny, tiny_dataset) -> None:
    (tiny.media / "bad.mp4").write_text("no video")
    tiny_dataset.write_video(tiny.media / "v.mp4")
    tiny.write_manifest(tiny_dataset.make_segments(["bad", "gone", "v"], 2))
    assert tiny.extract("--rows-per-shard", "2")[0] == 3
    failed = explain(tiny, "bad-0")
    assert failed["status"] == "failed"
    assert failed["why"][0].startswith("DecodeError: ")
    assert "bad.mp4" in failed["why"][0]
    assert "trying again won't help" in failed["why"][0]
    missing = explain(tiny, "gone-0")
    assert missing["why"][0].startswith("MediaNotFoundError: ")
    assert "a retry can help: --retry-failed" in missing["why"][0]
    path = next(path for path in list_stores(tiny.cache) if "slowfast_demo" in path.name)
    open_store(path).begin_shard(Shard(2, 4, 6))
    pending = explain(tiny, "v-0")
    assert pending["status"] == "pending"
    assert pending["why"][0].startswith("it was computed once, and then re-queued")
    assert pending["why"][1].startswith("no run holds the store")
    with hold_store(path):
        assert "the store is held by" in explain(tiny, "v-0")["why"][1]
    tiny.write_manifest(tiny_dataset.make_segments(["bad", "gone", "v"], 3))
    assert explain(tiny, "v-2")["status"] == "absent"
    assert explain(tiny, "v-2")["why"] == ["in the manifest but not yet in the store: run `echoshift extract`"]


def test_an_unknown_segment_is_answered_with_the_nearest(tiny) -> None:
    tiny.add_videos("kitchen")
    tiny.extract("--encoders", "resnet_demo")
    code, _, err = tiny.run("store", "explain", "kichen-1", *tiny.places)
    assert code == 2
    assert "no segment 'kichen-1' in 1 stores, nor in their manifests; did you mean 'kitchen-1'" in err
    code, _, err = tiny.run("store", "explain", "kitchen-1", *tiny.places, "--dataset", "other")
    assert code == 2
    assert "there is no store to look at" in err


def test_a_row_is_explained_without_manifest_or_media(tiny) -> None:
    tiny.add_videos("v")
    tiny.extract("--encoders", "slowfast_demo")
    (tiny.root / "tiny.csv").unlink()
    found = explain(tiny, "v-1")
    assert (found["status"], found["row"], found["start_s"]) == ("done", 1, None)
    assert "no longer in the manifest" in found["why"][0]
