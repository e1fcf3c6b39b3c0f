"""Holds the readers of numbered images (folder, tar, flow) against what PIL reads."""

from __future__ import annotations

import contextlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from echoshift.extract.readers.images import open_flow_images, open_frame_images
from echoshift.pipeline.errors import DecodeError, MediaNotFoundError, SegmentOutsideVideoError

PATTERN = "frame_%010d.jpg"


@pytest.fixture(params=["folder", "tar", "tar with prefix"])
def open_images(request, tmp_path, media_factory):
    """Write frames by number, return (images by number, reader)."""

    def make(numbers, rate_hz=60.0, n_first=1, pattern=PATTERN):
        folder = tmp_path / "P08_01"
        images = media_factory.write_images(folder, numbers, pattern)
        (folder / "notes.txt").write_text("no frame")
        (folder / "frame_12.jpg").write_bytes(b"too few digits")
        if request.param == "folder":
            return images, open_frame_images(folder, pattern, rate_hz, n_first)
        prefix = "./rgb/P08_01/" if "prefix" in request.param else ""
        path = media_factory.pack_tar(tmp_path / "P08_01.tar", folder, prefix)
        return images, open_frame_images(path, pattern, rate_hz, n_first)

    return make


def test_frame_n_is_shown_from_its_time(open_images):
    images, reader = open_images(range(1, 41))
    with reader:
        assert reader.info.n_frames == 40
        assert (reader.info.height, reader.info.width) == (10, 20)
        assert reader.info.duration_s == pytest.approx(40 / 60)
        np.testing.assert_allclose(reader.frame_times_s, np.arange(40) / 60)
        shown = reader.read_frames([0.5, 0.0, 1 / 60, 1 / 60 - 0.002, 0.5, 40 / 60])
        assert shown.dtype == np.uint8 and shown.shape == (6, 10, 20, 3)
        assert np.array_equal(shown, [images[n] for n in (31, 1, 2, 1, 31, 40)])
        assert reader.read_frames([]).shape == (0, 10, 20, 3)
        with pytest.raises(SegmentOutsideVideoError, match=r"P08_01\S* ends at 0\.667 s"):
            reader.read_frames([0.67])


@pytest.mark.parametrize(("rate_hz", "n_first", "asked_s"), [(60.0, 0, 2 / 60), (30.0, 0.5, 0.05)])
def test_the_first_number_may_lie_elsewhere_as_in_epic(open_images, rate_hz, n_first, asked_s):
    images, reader = open_images(range(1, 11), rate_hz=rate_hz, n_first=n_first)
    with reader:
        np.testing.assert_allclose(reader.frame_times_s, (np.arange(1, 11) - n_first) / rate_hz)
        assert np.array_equal(reader.read_frames([0.0, asked_s]), [images[1], images[2]])


def test_a_missing_frame_fails_by_its_number_and_others_are_read(open_images):
    images, reader = open_images([1, 2, 3, 6, 7])
    with reader:
        assert reader.info.n_frames == 7
        assert np.array_equal(reader.read_frames([0, 6 / 60]), [images[1], images[7]])
        with pytest.raises(
            DecodeError, match=r"frame_0000000005\.jpg\]? is missing \(2 of 7 frames are, from number 4 on\)"
        ):
            reader.read_frames([4 / 60, 0])


def test_other_patterns(open_images):
    images, reader = open_images([1, 2, 12], pattern="a%%b-%d.png")
    with reader:
        assert np.array_equal(reader.read_frames([11 / 60])[0], images[12])


@pytest.mark.parametrize("pattern", ["frame.jpg", "%d_%d.jpg", "x/%d.jpg", "%s.jpg", "%5d.jpg"])
def test_a_pattern_has_one_number(tmp_path, pattern):
    with pytest.raises(DecodeError, match="needs exactly one number"):
        open_frame_images(tmp_path, pattern, 60.0)


def test_damaged_and_odd_images_are_named(tmp_path, media_factory):
    media_factory.write_images(tmp_path / "v", [1, 2, 3])
    data = (tmp_path / "v" / (PATTERN % 2)).read_bytes()
    (tmp_path / "v" / (PATTERN % 2)).write_bytes(data[: len(data) // 2])
    media_factory.write_images(tmp_path / "v", [4], width=22)
    with open_frame_images(tmp_path / "v", PATTERN, 1.0) as reader:
        with pytest.raises(
            DecodeError, match=rf"frame_0000000002\.jpg \({len(data) // 2} bytes\) can't be decoded: .*[Tt]runc"
        ):
            reader.read_frames([1.0])
        with pytest.raises(DecodeError, match=r"frame_0000000004\.jpg is 22x10, others are 20x10"):
            reader.read_frames([0.0, 3.0])


def test_nothing_there_and_no_tar(tmp_path, media_factory):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DecodeError, match=r"holds no file called like .*frame_0000000001\.jpg"):
        open_frame_images(tmp_path / "empty", PATTERN, 60.0)
    with pytest.raises(MediaNotFoundError, match="no such folder"):
        open_frame_images(tmp_path / "nothing", PATTERN, 60.0)
    folder = tmp_path / "v"
    media_factory.write_images(folder, range(1, 30))
    with tarfile.open(tmp_path / "v.tar.gz", "w:gz") as tar:
        tar.add(folder)
    (tmp_path / "text.tar").write_text("no tar" * 999)
    whole = media_factory.pack_tar(tmp_path / "whole.tar", folder).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    for name in ("v.tar.gz", "text.tar", "cut.tar"):
        with pytest.raises(DecodeError, match=r"is no whole, uncompressed tar: .*; fetch or make it again"):
            open_frame_images(tmp_path / name, PATTERN, 60.0)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        tar.add(folder, arcname="a")
        tar.add(folder, arcname="b")
    with pytest.raises(DecodeError, match=r"twice\.tar holds frame_\d+\.jpg twice"):
        open_frame_images(tmp_path / "twice.tar", PATTERN, 60.0)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_flow_is_u_and_v(tmp_path, media_factory, kind):
    folder = tmp_path / "flow"
    u = media_factory.write_images(folder / "u", range(1, 7), mode="L")
    v = media_factory.write_images(folder / "v", range(1, 7), mode="L", width=20)
    for number in v:  # other values than u's
        (folder / "v" / (PATTERN % number)).write_bytes((folder / "u" / (PATTERN % (7 - number))).read_bytes())
    path = folder if kind == "folder" else media_factory.pack_tar(tmp_path / "flow.tar", folder, "P08_01/")
    with open_flow_images(path, PATTERN, 30.0) as reader:
        flow = reader.read_frames([0.0, 4 / 30])
        assert flow.shape == (2, 10, 20, 2)
        assert np.array_equal(flow[..., 0], [u[1], u[5]]) and np.array_equal(flow[..., 1], [u[6], u[2]])
        assert reader.read_frames([]).shape == (0, 10, 20, 2)


def test_flow_whose_channels_differ_in_count_is_refused(tmp_path, media_factory):
    media_factory.write_images(tmp_path / "u", range(1, 7), mode="L")
    media_factory.write_images(tmp_path / "v", [1, 2, 3, 5, 6], mode="L")
    with pytest.raises(DecodeError, match=r"6 frames of u and 5 of v; .* partner is \S*/v/frame_0000000004\.jpg"):
        open_flow_images(tmp_path, PATTERN, 30.0)


def test_a_frame_that_is_postscript_is_refused_whatever_is_installed(tmp_path, media_factory, monkeypatch):
    """PIL would have Ghostscript run it: a stand-in for `gs` leaves a mark where it is started."""
    media_factory.write_images(tmp_path / "P08_01", range(1, 4), PATTERN)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\n{} loop\n%%EOF\n"
    (tmp_path / "P08_01" / (PATTERN % 2)).write_bytes(script)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with Image.open(io.BytesIO(script)) as image, contextlib.suppress(OSError):
        image.load()
    assert (tmp_path / "was-run").exists(), "the stand-in shows nothing: PIL no longer runs Ghostscript"
    (tmp_path / "was-run").unlink()
    with open_frame_images(tmp_path / "P08_01", PATTERN, 60.0, 1) as reader:
        with pytest.raises(DecodeError, match=r"frame_0000000002\.jpg \(\d+ bytes\) can't be decoded: cannot identify"):
            reader.read_frames([1 / 60])
        assert reader.read_frames([0, 2 / 60]).shape == (2, 10, 20, 3)
    assert not (tmp_path / "was-run").exists()
