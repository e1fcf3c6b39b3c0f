"""Makes a small data set with a card, a manifest and videos, and runs the command line on it in this process."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from echoshift.pipeline.cards import DatasetCard, write_card
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.open import open_store

N_FRAMES, RATE_HZ, SOUND_HZ = 45, 15, 16000
CARD = DatasetCard(
    name="tiny", title="Tiny", task="single-label", metric="top1", classes=("a", "b"), domains=("d",),
    splits=("train",), encoders=("slowfast_demo", "resnet_demo"),
)  # fmt: skip


def read_every_array(path) -> dict[str, bytes]:
    """Read the bytes of all that a store holds, by array."""
    store = open_store(path)
    names = [f"outputs/{o.name}" for o in store.spec.outputs]
    names += ["times", "frames", "n_valid", "digest", "state", "segment_id"]
    names += ["has_audio", "loudness_dbfs"] if store.spec.audio is not None else []
    return {name: store.read_array(name).tobytes() for name in names}


def write_video(path: Path, *, seed=0, sound="noise"):
    """Write 3 s of moving noise at 15 Hz, 96 x 72, with sound: noise or none; another seed, another content."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=RATE_HZ, options={"threads": "1", "bf": "0"})
        video.width, video.height, video.pix_fmt = 96, 72, "yuv420p"
        audio = container.add_stream("aac", rate=SOUND_HZ, layout="mono") if sound != "none" else None
        base = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for i in range(N_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 2 * i, axis=1), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            samples = rng.standard_normal(3 * SOUND_HZ).astype(np.float32) * 0.1
            for start in range(0, len(samples), 1024):
                block = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = SOUND_HZ, start, Fraction(1, SOUND_HZ)
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))


def make_segments(video_ids, n_each=4):
    """Make overlapping segments of 1.2 s, half a second apart."""
    return [
        Segment(f"{video_id}-{i}", video_id, 0.5 * i, 0.5 * i + 1.2, ("a",), "d", "train")
        for video_id in video_ids
        for i in range(n_each)
    ]


class TinyDataset:
    """A data set `tiny` below one folder; `run` runs a command and gives (exit code, stdout, stderr)."""

    def __init__(self, root: Path, capture):
        self.root, self.media, self.cache = root, root / "media", root / "cache"
        self._capture = capture
        self.media.mkdir(exist_ok=True)
        write_card(root / "tiny.toml", CARD)

    def write_manifest(self, segments):
        (self.root / "tiny.csv").unlink(missing_ok=True)
        write_manifest(self.root / "tiny.csv", segments)

    def add_videos(self, *names, n_each=4):
        """Write videos of different content and a manifest of their segments."""
        for seed, name in enumerate(names):
            write_video(self.media / f"{name}.mp4", seed=seed)
        self.write_manifest(make_segments(names, n_each))

    def run(self, *arguments):
        """Run `echoshift ARGUMENTS` as the console script does."""
        from echoshift.cli.app import main

        before, sys.argv = sys.argv, ["echoshift", *map(str, arguments)]
        self._capture.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.argv = before
        return code, *self._capture.readouterr()

    @property
    def places(self):
        """The options that say where everything lies."""
        return ["--media", self.media, "--cache", self.cache, "--manifests", self.root]

    def extract(self, *arguments):
        return self.run("extract", "tiny", *self.places, "--device", "cpu", *arguments)

    def verify(self, store, *arguments):
        places = ["--media", self.media, "--manifests", self.root, "--device", "cpu"]
        return self.run("store", "verify", store, *places, *arguments)
