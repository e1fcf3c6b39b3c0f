"""Makes a small data set of two domains, on which Stage 1 runs in seconds, and runs the command line on it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from echoshift.extract.demo.generating import write_mp4
from echoshift.pipeline.cards import DatasetCard, MediaLayout, Shift, write_card
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment

NAME, CLASSES, DOMAINS = "tiny", ("low", "high", "never"), ("s", "t")
RATE_HZ, SOUND_HZ, SIDE_PX = 12, 16000, 32
N_TRAIN, N_TEST = 8, 4

# One batch norm after another on a handful of tiny clips: nothing here is about what is learned.
SETTINGS = (
    "visual.test_preset=zhang-encoder-test",
    "export.label_preset=zhang-encoder-test",
    "export.train_preset=",
    'visual.overrides=["frame.short_side=36", "frame.crop=32", "clip.n_frames=4"]',
    'sound.overrides=["audio.duration_s=1.0"]',
    "audio_classifier.n_epochs=2",
    "audio_classifier.lr=1e-3",
    "attention.width=16",
    "attention.n_layers=1",
    "attention.n_heads=2",
    "attention.head_width=8",
    "attention.mlp_width=16",
    "absent.n_absent=1",
    "training.n_epochs=2",
    "training.lr=1e-3",
    "training.n_source=4",
    "training.n_target=4",
    "training.n_labelled=2",
    "training.trainable_from=stem",
    "clusters.max_clusters=3",
    "clusters.n_init=2",
)

STAGE2_SETTINGS = (
    "recogniser.width=8",
    "recogniser.n_heads=2",
    "recogniser.head_width=4",
    "recogniser.mlp_width=8",
    "recogniser.visual_width=4",
    "schedule.n_source=4",
    "schedule.n_target=4",
    "schedule.n_epochs=3",
)


def write_video(path: Path, labels: Iterable[int], *, seed: int, has_track: bool = True) -> None:
    """Write one second an entry of `labels`: a picture of its own, and for 0 a low tone, for 1 a high one."""
    rng = np.random.default_rng(seed)
    labels = list(labels)
    pictures = []
    for label in labels:
        still = rng.integers(0, 256, (SIDE_PX // 4, SIDE_PX // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        still[..., label] //= 4
        pictures.append(np.stack([np.roll(still, 2 * i, axis=1) for i in range(RATE_HZ)]))
    times_s = np.arange(SOUND_HZ) / SOUND_HZ
    tones = [np.sin(2 * np.pi * (300, 1900)[label] * times_s) for label in labels]
    samples = (0.2 * np.concatenate(tones) + 0.02 * rng.standard_normal(len(labels) * SOUND_HZ)).astype(np.float32)
    write_mp4(path, pictures, RATE_HZ, samples if has_track else None, SOUND_HZ)


def make_segments(domain: str, split: str, n: int, *, pairs: bool = False) -> list[Segment]:
    """Make n segments of a second, one after the other in one video, of the first two classes in turn."""
    return [
        Segment(
            segment_id=f"{domain}-{split}-{i}",
            video_id=f"{domain}-{split}",
            start_s=float(i),
            stop_s=float(i + 1),
            labels=(CLASSES[i % 2],),
            domain=domain,
            split=split,
            pair_id=f"{split}-{i}" if pairs else "",
        )
        for i in range(n)
    ]


@dataclass(frozen=True, slots=True)
class TinyShift:
    """The data set below one folder; `run` runs a command in this process, `start` in one of its own."""

    root: Path
    runs: Path

    @property
    def media(self) -> Path:
        """Where the videos lie."""
        return self.root / "media"

    @property
    def steps(self) -> Path:
        """Where steps lie."""
        return self.runs / NAME / "steps"

    def write_card(self, **changes: object) -> None:
        """Write the card; `changes` are fields that differ."""
        fields: dict[str, object] = {
            "name": NAME,
            "title": "Tiny",
            "synthetic": True,
            "task": "single-label",
            "metric": "top1",
            "classes": CLASSES,
            "domains": DOMAINS,
            "shifts": (Shift(source=("s",), target="t"), Shift(source=("t",), target="s")),
            "encoders": ("slowfast_demo", "resnet_demo"),
            "media": MediaLayout(),
        }
        write_card(self.root / f"{NAME}.toml", DatasetCard.model_validate(fields | changes))

    def write_manifest(self, segments: Iterable[Segment]) -> None:
        """Replace the manifest."""
        (self.root / f"{NAME}.csv").unlink(missing_ok=True)
        write_manifest(self.root / f"{NAME}.csv", list(segments))

    def make(self, *, without_track: tuple[str, ...] = ()) -> list[Segment]:
        """Write card, manifest and a video for each domain and split; return the segments."""
        segments = []
        for i, domain in enumerate(DOMAINS):
            for j, (split, n) in enumerate((("train", N_TRAIN), ("test", N_TEST))):
                made = make_segments(domain, split, n)
                segments += made
                video, labels = made[0].video_id, [CLASSES.index(s.labels[0]) for s in made]
                path = self.media / f"{video}.mp4"
                write_video(path, labels, seed=2 * i + j, has_track=video not in without_track)
        self.write_card()
        self.write_manifest(segments)
        return segments

    def with_runs(self, runs: Path) -> TinyShift:
        """Return the same data with runs elsewhere."""
        return replace(self, runs=runs)

    def list_arguments(self, command: str, *arguments: object, settings: Iterable[str] = ()) -> list[str]:
        """List a command's arguments: places, small settings, and what is given."""
        places = ["--media", self.media, "--cache", self.root / "cache", "--manifests", self.root, "--runs", self.runs]
        chosen = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        return [command, *map(str, [*places, "--device", "cpu", *chosen, *arguments])]

    def stage1(self, *arguments: object, settings: Iterable[str] = (), dataset: str = NAME) -> tuple[int, str, str]:
        """Run `echoshift stage1 tiny --shift s-t`."""
        named = [dataset] if dataset else []
        return run(*self.list_arguments("stage1", *named, "--shift", "s-t", *arguments, settings=settings))

    def stage2(self, *arguments: object, settings: Iterable[str] = ()) -> tuple[int, str, str]:
        """Run `echoshift stage2 tiny --shift s-t`."""
        return run(*self.list_stage2(*arguments, settings=settings))

    def list_stage2(self, *arguments: object, settings: Iterable[str] = ()) -> list[str]:
        """List the arguments of `echoshift stage2 tiny --shift s-t`."""
        chosen = (*STAGE2_SETTINGS, *settings)
        return self.list_arguments("stage2", NAME, "--shift", "s-t", *arguments, settings=chosen)

    def start(self, *arguments: object, settings: Iterable[str] = ()) -> subprocess.Popen[bytes]:
        """Start `echoshift stage1 tiny --shift s-t` in a process of its own."""
        return self.start_command(self.list_arguments("stage1", NAME, "--shift", "s-t", *arguments, settings=settings))

    def start_command(self, command: Iterable[str]) -> subprocess.Popen[bytes]:
        """Start `echoshift COMMAND` in a process of its own."""
        code = "from echoshift.cli.app import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *command],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def find_step(self, name: str) -> Path:
        """Return the folder of the only step of a name."""
        (record,) = self.steps.glob(f"{name}-????????????/record.json")
        return record.parent

    def list_records(self) -> dict[str, int]:
        """List which steps have a record, with the time it was written."""
        return {path.parent.name: path.stat().st_mtime_ns for path in sorted(self.steps.glob("*/record.json"))}


def run(*arguments: object) -> tuple[int, str, str]:
    """Run `echoshift ARGUMENTS` as the console script does; return exit code, stdout and stderr."""
    from echoshift.cli.app import main

    before, sys.argv = sys.argv, ["echoshift", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool], timeout_s: float = 120) -> None:
    """Kill a process with SIGKILL as soon as something is there; fail where it ends before."""
    deadline = time.monotonic() + timeout_s
    try:
        while not is_time():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "what was waited for never came"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
