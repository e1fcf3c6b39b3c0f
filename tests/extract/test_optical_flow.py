"""Checks computed flow: known shifts, quantisation, and what a flow store holds where there are no flow images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from echoshift.extract.flow import FlowComputer, FlowMaker, FlowMethod, pair_frames, quantise_flow
from echoshift.extract.readers.images import open_frame_images


def draw_texture(shift_x: int, shift_y: int, size: int = 96) -> np.ndarray:
    """Draw a smooth random texture moved by whole pixels, uint8 RGB [size, size, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (size + 32, size + 32), dtype=np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    smooth = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX)
    cut = smooth[16 - shift_y : 16 - shift_y + size, 16 - shift_x : 16 - shift_x + size]
    return np.repeat(cut[..., None], 3, axis=2)


@pytest.mark.parametrize("name", ["tvl1", "dis"])
@pytest.mark.parametrize(("x", "y"), [(3, 0), (-2, 4), (0, 0)])
def test_flow_of_a_known_shift(name, x, y):
    computer = FlowComputer(FlowMethod(name, short_side=96, bound_px=20))
    before, after = computer.shrink(draw_texture(0, 0)), computer.shrink(draw_texture(x, y))
    flow = computer.compute(before, after)[16:-16, 16:-16].astype(float)
    assert flow.shape == (64, 64, 2)
    found = (np.median(flow, axis=(0, 1)) - 127.5) * 20 / 127.5
    np.testing.assert_allclose(found, [x, y], atol=0.25)


def test_flow_is_clipped_and_quantised_evenly():
    flow = np.array([-50, -20, -10, 0, 10, 20, 50], dtype=np.float32)
    assert quantise_flow(flow, 20).tolist() == [0, 0, 64, 128, 191, 255, 255]
    steps = quantise_flow(np.linspace(-20, 20, 2551, dtype=np.float32), 20)
    assert np.unique(steps).size == 256 and np.diff(steps.astype(int)).max() == 1


def test_pairs_are_one_step_apart_and_the_last_one_steps_back(tmp_path, media_factory):
    media_factory.write_images(tmp_path / "v", range(1, 31))
    with open_frame_images(tmp_path / "v", "frame_%010d.jpg", rate_hz=60) as reader:
        times = np.array([[0, 4 / 60, 29 / 60, 29.9 / 60]])
        shown = np.array([[0, 4, 29, 29]])
        before, after = pair_frames(reader, times, shown, rate_hz=30)
        assert before.tolist() == [[0, 4, 28, 28]] and after.tolist() == [[2, 6, 29, 29]]
        before, after = pair_frames(reader, times, shown, rate_hz=None)
        assert before.tolist() == [[0, 4, 28, 28]] and after.tolist() == [[1, 5, 29, 29]]
        before, after = pair_frames(reader, times, shown, rate_hz=240)
        assert after.tolist() == [[1, 5, 29, 29]]  # never a picture with itself


def test_a_pair_is_computed_once_whatever_the_stretches():
    frames = np.stack([draw_texture(i, 0) for i in range(6)])
    expected = {}
    for n_at_once in (6, 2, 1):
        maker = FlowMaker(FlowMethod("dis", 96, 20))
        numbers = maker.add(np.array([[0, 2], [0, 3]]), np.array([[1, 4], [1, 5]]))
        assert numbers[0, 0] == numbers[1, 0] and maker.needed.tolist() == [0, 1, 2, 3, 4, 5]
        found = {}
        for start in range(0, 6, n_at_once):
            indices = np.arange(start, start + n_at_once)
            made = maker.feed(frames[indices], indices)
            if made is not None:
                found.update(dict(zip(made[1].tolist(), made[0], strict=True)))
        assert sorted(found) == sorted(np.unique(numbers))
        expected = expected or found
        for number, flow in found.items():
            np.testing.assert_array_equal(flow, expected[number])
