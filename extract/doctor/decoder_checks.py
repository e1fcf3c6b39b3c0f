"""Tries each decoder on clips made here: does it open them, and does it return the pictures and the sound in them?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import av
import numpy as np

from echoshift.extract.doctor.findings import Finding
from echoshift.extract.doctor.trial_clips import (
    FORMATS,
    N_FRAMES,
    RATE_HZ,
    TONE,
    TONE_HZ,
    can_write,
    grey_of_frame,
    write_clip,
)
from echoshift.extract.readers.protocol import FrameReader
from echoshift.pipeline.errors import MediaError

TOLERATED_GREY = 7.0  # of 16 between two frames
TOLERATED_TONE = 0.1  # of the amplitude, relative
SOUND_READ_HZ = 16000
FLOW_SIDE_PX = 32
NEVER_OF_DECORD = ("av1",)  # its FFmpeg is older than AV1: decord_video.py
INSTALL = "pip install --force-reinstall {}, or make setup anew"


def check_decoders() -> Iterator[Finding]:
    """Make a clip of every format that can be written here, and tries PyAV's pictures and sound, and decord."""
    os.environ.setdefault("SVT_LOG", "1")  # or the AV1 encoder tells its life on stderr
    with tempfile.TemporaryDirectory(prefix="echoshift-doctor-") as folder:
        clips: dict[str, Path] = {}
        unwritten = []
        for form in FORMATS:
            if not can_write(form):
                unwritten.append(form.name)
                continue
            try:
                clips[form.name] = write_clip(form, Path(folder))
            except (av.FFmpegError, OSError, ValueError) as error:
                unwritten.append(f"{form.name} ({' '.join(str(error).split())})")
        if unwritten:
            yield Finding("ok", "decoders", f"not tried, as PyAV can't write them here: {', '.join(unwritten)}")
        from echoshift.extract.readers.decord_video import DecordFrameReader
        from echoshift.extract.readers.pyav_video import PyAvFrameReader

        yield _try_each("pyav", clips, lambda path: find_picture_fault(path, PyAvFrameReader), "fail", "av")
        yield _try_each("pyav sound", clips, find_sound_fault, "fail", "av")
        try:
            import decord
        except (ImportError, OSError) as error:
            yield Finding("warn", "decord", " ".join(str(error).split()), INSTALL.format("decord"))
            return
        del decord
        tried = {name: path for name, path in clips.items() if name not in NEVER_OF_DECORD}
        yield _try_each("decord", tried, lambda path: find_picture_fault(path, DecordFrameReader), "warn", "decord")


def find_picture_fault(path: Path, open_reader: Callable[[Path], FrameReader]) -> str:
    """Describe what is wrong with the pictures that a decoder returns of a trial clip; "" where they are right."""
    try:
        with open_reader(path) as reader:
            if reader.info.n_frames != N_FRAMES:
                return f"{reader.info.n_frames} frames of {N_FRAMES}"
            order = np.random.default_rng(0).permutation(N_FRAMES)  # so that it must seek
            pictures = reader.read_frames((np.sort(order[:5]) + 0.5) / RATE_HZ)
            wanted = [grey_of_frame(int(number)) for number in np.sort(order[:5])]
    except MediaError as error:
        return " ".join(str(error).removeprefix(f"{path}: ").split())
    greys = pictures.reshape(len(pictures), -1).mean(axis=1)
    wrong = np.abs(greys - wanted) > TOLERATED_GREY
    return f"{int(wrong.sum())} of {len(wanted)} frames are others" if wrong.any() else ""


def find_sound_fault(path: Path) -> str:
    """Describe what is wrong with the sound that PyAV returns of a trial clip, by its tone; "" where right."""
    from echoshift.extract.readers.pyav_audio import read_audio

    try:
        samples = read_audio(path, 0.25, 0.75, SOUND_READ_HZ)
    except MediaError as error:
        return " ".join(str(error).removeprefix(f"{path}: ").split())
    if len(samples) != SOUND_READ_HZ // 2:
        return f"{len(samples)} samples of {SOUND_READ_HZ // 2}"
    turns = np.exp(-2j * np.pi * TONE_HZ * np.arange(len(samples)) / SOUND_READ_HZ)
    strength = 2 * abs(np.mean(samples * turns))
    return "" if abs(strength / TONE - 1) <= TOLERATED_TONE else f"a tone of {strength:.2f}, not {TONE:.2f}"


def check_flow() -> Iterator[Finding]:
    """Look whether OpenCV has both ways of computing flow, and whether they run."""
    from echoshift.extract.optical_flow import FlowComputer, FlowMethod

    picture = np.random.default_rng(0).integers(0, 256, (FLOW_SIDE_PX, FLOW_SIDE_PX, 3), dtype=np.uint8)
    names: tuple[Literal["tvl1", "dis"], ...] = ("tvl1", "dis")
    for name in names:
        computer = FlowComputer(FlowMethod(name, FLOW_SIDE_PX, 20.0))
        gray = computer.shrink(picture)
        still = computer.compute(gray, gray)
        if not np.array_equal(still, np.full_like(still, 128)):
            remedy = INSTALL.format("opencv-contrib-python-headless")
            yield Finding("fail", "opencv", f"{name} finds motion between equal pictures", remedy)
            return
    yield Finding("ok", "opencv", "computes flow (TV-L1 and DIS); decodes nothing here")


def check_networks() -> Iterator[Finding]:
    """Look whether the packages import that networks and spectrograms are made of."""
    from echoshift.extract.torchvision_import import ensure_torchaudio, ensure_torchvision

    ensure_torchvision()
    ensure_torchaudio()
    import torch
    from torchaudio.functional import melscale_fbanks

    filters = melscale_fbanks(257, 0.0, 8000.0, 64, 16000, "slaney", "slaney")
    if filters.shape != (257, 64) or not torch.isfinite(filters).all():
        yield Finding("fail", "torchaudio", "its mel filters aren't numbers", INSTALL.format("torchaudio"))
    else:
        yield Finding("ok", "torchaudio", "makes mel filters; decodes nothing here")
    import pytorchvideo.models.slowfast
    import timm

    yield Finding("ok", "networks", f"timm {timm.__version__} and pytorchvideo import")
    del pytorchvideo


def _try_each(
    part: str, clips: Mapping[str, Path], find_fault: Callable[[Path], str], level: str, package: str
) -> Finding:
    faults = {name: fault for name, path in clips.items() if (fault := find_fault(path))}
    fine = ", ".join(name for name in clips if name not in faults) or "nothing"
    if not faults:
        return Finding("ok", part, f"opens {fine}")
    named = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    if level == "warn":
        return Finding("warn", part, f"opens {fine}; not {named}", "leave out --decoder decord for such files")
    return Finding("fail", part, f"opens {fine}; not {named}", INSTALL.format(package))
