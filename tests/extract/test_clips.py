from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoshift.extract.clips import ClipPlan, plan_audio_windows, plan_clips
from echoshift.extract.readers.interface import find_shown_frames
from echoshift.extract.recipes import PLANAMENTE2021, ZHANG2022
from echoshift.pipeline.errors import DecodeError, ManifestError, SegmentOutsideVideoError, SpecError
from echoshift.pipeline.specs import ClipSpec

EPIC = ClipSpec(n_frames=32, stride=2, rate_hz=60, n_clips=5)


def steady_times(n: int, rate_hz: float) -> tuple[np.ndarray, float]:
    return np.arange(n) / rate_hz, n / rate_hz


def frames_taken(plan: ClipPlan, start_s: float, rate_hz: float) -> list[list[int]]:
    return np.rint((plan.frame_times_s - start_s) * rate_hz).astype(int).tolist()


def test_uniform_offsets_are_the_released_codes():
    """n = 200, span = 64: a = 137 / 5 = 27.4, offsets int(13.7 + 27.4 i)."""
    plan = plan_clips(EPIC, 10, 10 + 200 / 60, *steady_times(6000, 60))
    taken = frames_taken(plan, 10, 60)
    assert [clip[0] for clip in taken] == [13, 41, 68, 95, 123]
    assert taken[0] == list(range(13, 13 + 64, 2))
    np.testing.assert_allclose(plan.times_s[0], [10 + 13 / 60, 10 + 77 / 60])
    assert plan.times_s[:, 1] - plan.times_s[:, 0] == pytest.approx(np.full(5, 64 / 60))


def test_a_short_segment_wraps_and_covers_itself_once():
    plan = plan_clips(EPIC, 4.0, 4.0 + 40 / 60, *steady_times(6000, 60))
    taken = frames_taken(plan, 4.0, 60)
    assert taken == [[(2 * i) % 40 for i in range(32)]] * 5
    np.testing.assert_allclose(plan.times_s, [[4.0, 4.0 + 40 / 60]] * 5)


def test_windows_keep_whole_windows_and_wrap_when_none_fits():
    spec = ClipSpec(n_frames=8, stride=2, rate_hz=10, sampling="windows", step=5)
    video = steady_times(1000, 25)
    plan = plan_clips(spec, 2.0, 5.0, *video)  # 30 frames, span 16: offsets 0, 5, 10
    assert [clip[0] for clip in frames_taken(plan, 2.0, 10)] == [0, 5, 10]
    np.testing.assert_allclose(plan.times_s, [[2.0, 3.6], [2.5, 4.1], [3.0, 4.6]])
    short = plan_clips(spec, 2.0, 3.05, *video)  # 10 frames
    assert frames_taken(short, 2.0, 10) == [[0, 2, 4, 6, 8, 0, 2, 4]]
    np.testing.assert_allclose(short.times_s, [[2.0, 3.0]])


def test_own_frames_are_those_on_the_screen():
    spec = ClipSpec(n_frames=1, sampling="windows", step=1)
    times_s, end_s = np.array([0.0, 0.1, 0.3, 0.35, 0.8]), 1.0
    plan = plan_clips(spec, 0.2, 0.8, times_s, end_s)  # the frame of 0.1 is still on at 0.2; that of 0.8 begins at stop
    np.testing.assert_allclose(plan.frame_times_s[:, 0], [0.1, 0.3, 0.35])
    np.testing.assert_allclose(plan.times_s, [[0.2, 0.3], [0.3, 0.35], [0.35, 0.8]])
    whole = plan_clips(spec, 0, 1.0, times_s, end_s)
    np.testing.assert_allclose(whole.times_s[-1], [0.8, 1.0])
    # Time stamps rounded to milliseconds still count as beginning where the segment does.
    rounded = plan_clips(spec, 0.3334, 0.3504, times_s + 0.0006, end_s)
    np.testing.assert_allclose(rounded.frame_times_s[:, 0], [0.3006])
    late = plan_clips(spec, 0, 0.05, times_s + 0.083, end_s)
    np.testing.assert_allclose(late.times_s, [[0, 0.05]])


def test_a_stop_just_beyond_the_end_is_moved_to_the_end():
    video = steady_times(100, 25)
    plan = plan_clips(ClipSpec(n_frames=10, rate_hz=10), 3.0, 4.5, *video)
    np.testing.assert_allclose(plan.times_s, [[3.0, 4.0]])
    assert plan.frame_times_s.max() < 4.0
    own = plan_clips(ClipSpec(n_frames=25), 3.0, 4.4, *video)
    np.testing.assert_allclose(own.times_s, [[3.0, 4.0]])


@pytest.mark.parametrize(
    ("start_s", "stop_s", "error", "message"),
    [
        (3.0, 4.51, SegmentOutsideVideoError, r"stops at 4\.510 s, 0\.510 s after the video has ended"),
        (4.0, 4.3, SegmentOutsideVideoError, r"starts at 4\.000 s, the video runs from"),
        (-0.1, 4.3, SegmentOutsideVideoError, r"starts at -0\.100 s, the video runs from"),
        (2, 2, ManifestError, "stop after it starts, this one runs from 2 to 2 s"),
        (2, float("nan"), ManifestError, "stop after it starts"),
    ],
)
def test_segments_outside_the_video_are_refused(start_s, stop_s, error, message):
    with pytest.raises(error, match=message):
        plan_clips(EPIC, start_s, stop_s, *steady_times(100, 25))


def test_a_video_without_frames_is_refused():
    with pytest.raises(DecodeError, match="no frames"):
        plan_clips(EPIC, 2, 3, np.array([]), 4.0)


@st.composite
def segments(draw):
    rate_hz = draw(st.sampled_from([10.0, 23.976, 25.0, 30.0, 59.94]))
    n_video = draw(st.integers(1, 400))
    jitter = draw(st.sampled_from([0.0, 0.4]))
    gaps = np.random.default_rng(draw(st.integers(0, 99))).uniform(1 - jitter, 1 + jitter, n_video) / rate_hz
    times_s = np.concatenate([[0.0], np.cumsum(gaps)])
    start_s = draw(st.floats(0, 0.99)) * times_s[-1]
    stop_s = start_s + draw(st.floats(0.001, 1)) * (times_s[-1] - start_s) + draw(st.sampled_from([0, 0.3]))
    uniform = draw(st.booleans())
    spec = ClipSpec(
        n_frames=draw(st.integers(1, 40)),
        stride=draw(st.integers(1, 4)),
        rate_hz=draw(st.sampled_from([None, 8.0, 25.0, 60.0])),
        sampling="uniform" if uniform else "windows",
        n_clips=draw(st.integers(1, 7)) if uniform else 1,
        step=None if uniform else draw(st.integers(1, 30)),
    )
    return spec, float(start_s), float(stop_s), times_s[:-1], float(times_s[-1])


@given(segments())
def test_every_plan_stays_in_its_segment_in_order(case):
    spec, start_s, stop_s, times_s, end_s = case
    plan = plan_clips(spec, start_s, stop_s, times_s, end_s)
    stop_s = min(stop_s, end_s)
    assert plan.frame_times_s.shape == (plan.n_clips, spec.n_frames) and plan.times_s.shape == (plan.n_clips, 2)
    if spec.sampling == "uniform":
        assert plan.n_clips == spec.n_clips
    begins, ends = plan.times_s.T
    assert (begins >= start_s).all() and (ends <= stop_s).all() and (begins < ends).all()
    assert (np.diff(begins) >= 0).all() and (np.diff(ends) >= 0).all()
    shown = find_shown_frames(times_s, plan.frame_times_s)
    first, last = find_shown_frames(times_s, [start_s, stop_s])
    assert (shown >= first).all() and (shown <= last).all()
    assert (plan.frame_times_s < end_s).all()
    if spec.rate_hz is not None:
        n = max(1, int((stop_s - start_s) * spec.rate_hz + 1e-6))
        places = np.rint((plan.frame_times_s - start_s) * spec.rate_hz).astype(int)
        assert (places < n).all()
        steps = np.diff(places, axis=1)
        assert ((steps % n) == (spec.stride % n)).all()
        if n >= spec.span:
            assert (steps == spec.stride).all()
        else:
            assert (places[:, 0] == 0).all()


def read_frame_times(path) -> tuple[np.ndarray, float]:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        zero_s = (container.start_time or 0) / av.time_base
        times_s = sorted(float(frame.pts * stream.time_base) - zero_s for frame in container.decode(stream))
        end_s = float((stream.start_time + stream.duration) * stream.time_base) - zero_s
    return np.array(times_s), end_s


@pytest.mark.shared
@pytest.mark.parametrize(
    ("spec", "stored", "n_windows"),
    [
        (ClipSpec(n_frames=64, sampling="windows", step=64), "i3d/None_raft_None_None_None", 5),
        (ClipSpec(n_frames=24, rate_hz=25, sampling="windows", step=24), "i3d/None_raft_24_24_25", 18),
        (ClipSpec(n_frames=24, rate_hz=15, sampling="windows", step=12), "i3d/None_raft_24_12_15", 21),
    ],
)
def test_windows_end_where_another_extractors_do(shared_data, spec, stored, n_windows):
    folder = shared_data / "activitynet"
    references = np.load(folder / "video_features_refs.npz")
    stamps_s = references[f"{stored}_timestamps_ms"] / 1000
    times_s, end_s = read_frame_times(folder / "v_GGSY1Qvo990.mp4")
    plan = plan_clips(spec, 0, end_s, times_s, end_s)
    assert plan.n_clips == n_windows == len(references[f"{stored}_rgb"])
    np.testing.assert_allclose(plan.times_s[:, 1], stamps_s, rtol=0, atol=0.5e-3)
    rate_hz = spec.rate_hz or 981 / 50
    np.testing.assert_allclose(plan.times_s[:, 0], stamps_s - spec.span / rate_hz, rtol=0, atol=0.5e-3)


def test_windows_of_sound():
    np.testing.assert_allclose(plan_audio_windows(ZHANG2022, 3, 5.5, None), [[3, 5.5]])
    np.testing.assert_allclose(plan_audio_windows(ZHANG2022, 3, 55, None), [[3, 13]])
    clips = ClipPlan(np.zeros((2, 1)), np.array([[0.0, 1.0], [4.0, 6.0]]))
    np.testing.assert_allclose(
        plan_audio_windows(PLANAMENTE2021, 0, 6, clips), [[0.5 - 0.6395, 0.5 + 0.6395], [5 - 0.6395, 5 + 0.6395]]
    )
    with pytest.raises(SpecError, match="needs a clip plan"):
        plan_audio_windows(PLANAMENTE2021, 0, 6, None)
    with pytest.raises(ManifestError, match="stop after it starts"):
        plan_audio_windows(ZHANG2022, 5, 5, None)
