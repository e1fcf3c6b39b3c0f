"""Checks a plan's counts and bytes against what extraction then does, its extrapolation, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echoshift.extract.plan import estimate_duration
from echoshift.extract.run import choose_spread


def measure(path: Path) -> tuple[int, int]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files), len(files)


def plan(tiny, *arguments):
    code, out, err = tiny.run("plan", "tiny", *tiny.places, "--device", "cpu", "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("backend", ["zarr", pytest.param("hdf5", marks=pytest.mark.slow)])
def test_planned_bytes_and_files_are_those_of_the_store_that_extraction_then_makes(tiny, backend: str) -> None:
    tiny.add_videos("v", "w")
    choices = ["--backend", backend, "--outputs", "slowfast_demo=pooled,trunk_slow", "--rows-per-shard", "3"]
    planned = plan(tiny, "--sample", "0", *choices)
    assert not tiny.cache.exists()
    assert planned["timed"] is None
    pictures, sound = planned["stores"]
    assert [pictures[n] for n in ("n_segments", "n_to_do", "n_done", "n_media_missing")] == [8, 8, 0, 0]
    assert (pictures["n_clips"], sound["n_clips"]) == (8 * 5, 8)
    assert (pictures["n_shards"], pictures["n_shards_to_do"]) == (3, 3)
    assert [(o["name"], o["level"]) for o in pictures["outputs"]] == [("pooled", "Stage 2"), ("trunk_slow", "Stage 1")]
    pooled, trunk = pictures["outputs"]
    assert pooled["n_bytes_a_row"] == 5 * pooled["shape"][0] * 2
    assert trunk["n_bytes_a_row"] > 10 * pooled["n_bytes_a_row"]
    assert planned["n_bytes_to_add"] == pictures["n_bytes"] + sound["n_bytes"]
    assert tiny.extract(*choices)[0] == 0
    for store in planned["stores"]:
        n_bytes, n_files = measure(Path(store["path"]))
        assert store["n_bytes"] == pytest.approx(n_bytes, rel=0.02)
        assert store["n_files"] == n_files
    again = plan(tiny, *choices)
    assert again["timed"] is None, "nothing is left to be timed"
    assert [(s["n_done"], s["n_to_do"], s["n_shards_to_do"]) for s in again["stores"]] == [(8, 0, 0)] * 2
    assert again["n_bytes_to_add"] < 0.02 * planned["n_bytes_to_add"]


def test_missing_media_failures_and_new_segments_are_counted_apart(tiny, tiny_dataset) -> None:
    tiny.add_videos("v")
    (tiny.media / "bad.mp4").write_text("no video")
    tiny.write_manifest(tiny_dataset.make_segments(["v", "bad"], 2))
    choices = ["--encoders", "slowfast_demo", "--rows-per-shard", "2"]
    assert tiny.extract(*choices)[0] == 3
    tiny.write_manifest(tiny_dataset.make_segments(["v", "bad", "absent"], 3))
    store = plan(tiny, "--sample", "0", *choices)["stores"][0]
    counts = {name: store[name] for name in ("n_segments", "n_done", "n_failed", "n_to_do", "n_media_missing")}
    assert counts == {"n_segments": 9, "n_done": 2, "n_failed": 2, "n_to_do": 5, "n_media_missing": 3}
    assert (store["n_shards"], store["n_shards_to_do"]) == (5, 3)
    retried = plan(tiny, "--sample", "0", "--retry-failed", *choices)["stores"][0]
    assert (retried["n_failed"], retried["n_to_do"]) == (0, 7)


def test_windows_are_counted_a_segment(tiny, tiny_dataset) -> None:
    tiny_dataset.write_video(tiny.media / "v.mp4")
    segment = tiny_dataset.Segment
    tiny.write_manifest(
        [segment("all", "v", 0, 3, ("a",), "d", "train"), segment("half", "v", 0, 1.5, ("a",), "d", "train")]
    )
    windows = ["clip.sampling=windows", "clip.n_clips=1", "clip.step=8", "clip.rate_hz=none", "clip.stride=1"]
    choices = ["--encoders", "slowfast_demo", *(word for w in windows for word in ("--set", w))]
    store = plan(tiny, "--sample", "0", *choices)["stores"][0]
    assert store["n_clips"] == ((45 - 8) // 8 + 1) + 2


def test_a_timed_sample_runs_on_throw_away_stores_and_says_where(tiny) -> None:
    tiny.add_videos("v", "w")
    planned = plan(tiny, "--sample", "3")
    timed = planned["timed"]
    assert not tiny.cache.exists()
    assert (timed["n_sampled"], timed["n_failed"], timed["duration"]["n_segments"]) == (3, 0, 8)
    assert timed["device"].startswith("cpu")
    duration = timed["duration"]
    assert 0 <= duration["low_s"] <= duration["expected_s"] <= duration["high_s"]
    assert duration["expected_s"] == pytest.approx(sum(timed["segments_s"]) / 3 * 8)
    code, out, _ = tiny.run("plan", "tiny", *tiny.places, "--sample", "1")
    assert code == 0
    assert "for 8 segments on" in out
    assert "for Stage 2:" in out


def test_encoders_may_be_named_one_by_one_or_with_commas(tiny) -> None:
    tiny.add_videos("v")
    for names in (["slowfast_demo", "resnet_demo"], ["slowfast_demo, resnet_demo slowfast_demo"]):
        named = [word for name in names for word in ("--encoders", name)]
        stores = plan(tiny, "--sample", "0", *named)["stores"]
        assert [store["encoder"] for store in stores] == ["slowfast_demo", "resnet_demo"]


def test_a_plan_that_does_not_fit_is_warned_of(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_videos("v")
    monkeypatch.setattr("echoshift.extract.plan.measure_free_bytes", lambda cache_dir: 1000)
    code, _, err = tiny.run("plan", "tiny", *tiny.places, "--sample", "0")
    assert code == 0
    assert "has not the room" in err


def test_seconds_are_extrapolated_with_two_standard_errors() -> None:
    found = estimate_duration([1.0, 2.0, 3.0, 2.0], 100)
    error = 2 * (2 / 3) ** 0.5 / 2
    assert (found.n_segments, found.expected_s) == (100, 200.0)
    assert (found.low_s, found.high_s) == pytest.approx((100 * (2 - error), 100 * (2 + error)))
    alone = estimate_duration([4.0], 10)
    assert (alone.low_s, alone.expected_s, alone.high_s) == (20.0, 40.0, 80.0)


def test_a_choice_is_spread_seeded_and_never_repeats() -> None:
    chosen = choose_spread(range(1000), 10, seed=3)
    assert [c // 100 for c in chosen] == list(range(10))
    assert choose_spread(range(1000), 10, seed=3) == chosen
    assert choose_spread(range(1000), 10, seed=4) != chosen
    assert choose_spread(range(5), 10, seed=0) == [0, 1, 2, 3, 4]
