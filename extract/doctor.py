"""Looks over an installation: what commands run on, what they read and write, and whether the decoders are right."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echoshift.extract.readers.interface import FrameReader
from echoshift.pipeline.errors import CardError, EchoshiftError, ManifestError, MediaError, StoreError
from echoshift.pipeline.places import list_cards
from echoshift.pipeline.store.location import locate

Level = Literal["ok", "warn", "fail"]
Check = Callable[[], Iterable["Finding"]]

DISTRIBUTION = "echoshift"
FIRST_PYTHON, FIRST_UNTRIED_PYTHON = (3, 11), (3, 14)
GIB = 2**30
LEAST_MEMORY_GIB = 4.0
GB = 1e9
LEAST_FREE_GB = 10.0
# Of the clips on which decoders are tried.
GREYS = range(40, 217, 16)  # of the frames: far enough apart to tell them by after any coding
RATE_HZ = 12
AUDIO_HZ = 48000
SIDE_PX = 64
TONE_HZ = 440.0
TONE = 0.3
TOLERATED_GREY = 7.0  # of 16 between two frames
TOLERATED_TONE = 0.1  # of the amplitude, relative
AUDIO_READ_HZ = 16000
FLOW_SIDE_PX = 32
NEVER_OF_DECORD = ("av1",)  # its FFmpeg is older than AV1: decord_video.py
INSTALL = "pip install --force-reinstall {}, or run make setup again"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: `ok`; `warn`, where something works less well or isn't there yet; `fail`, where a command would end.
        part: what was looked at, in a word or two.
        message: what was found.
        remedy: what to do about it, "" where nothing is to be done.
    """

    level: Level
    part: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return it as one line: level, part, message and remedy."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<4}  {self.part:<13}  {self.message}{remedy}"


def list_checks(cache: str, weights_dir: Path | None, manifests: Path) -> list[tuple[str, Check]]:
    """List all checks by the part that they look at; each imports what it tries, so that its absence is a finding."""
    return [
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("cores", check_cores),
        ("decoders", check_decoders),
        ("opencv", check_flow),
        ("networks", check_networks),
        ("cache", lambda: check_cache(cache)),
        ("weights", lambda: check_weights(weights_dir)),
        ("datasets", lambda: check_datasets(manifests)),
    ]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run checks by the part that they look at; one that can't be run is itself a finding, and the others go on."""
    for part, check in checks:
        try:
            yield from check()
        except (EchoshiftError, ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            yield Finding("fail", part, f"{type(error).__name__}: {words}", "mend what it names, then run doctor again")


def check_python() -> Iterator[Finding]:
    """Look at the Python that runs: its version among those that were tried, and whether it is an environment."""
    version = platform.python_version()
    where = f"{version} at {sys.executable}"
    if not FIRST_PYTHON <= sys.version_info[:2] < FIRST_UNTRIED_PYTHON:
        yield Finding("fail", "python", where, "use 3.11 to 3.13: make setup PYTHON=python3.11")
    elif sys.prefix == sys.base_prefix:
        yield Finding("warn", "python", f"{where}, outside of any environment", "make setup makes .venv")
    else:
        yield Finding("ok", "python", where)


def check_packages() -> Iterator[Finding]:
    """Look at every package that echoshift needs: is it installed, in a version that was tried?"""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    n_fine = 0
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("fail", "packages", f"{requirement.name} isn't installed", "run make setup")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            n_fine += 1
        else:
            wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            message = f"{requirement.name} {version} was never tried; tried: {wanted}"
            yield Finding("warn", "packages", message, f"pip install '{requirement.name}{wanted}'")
    if n_fine == len(needed):
        yield Finding("ok", "packages", f"{n_fine} packages in the tried versions")


def check_torch() -> Iterator[Finding]:
    """Look at torch's build, and at each GPU: its memory, and whether it computes."""
    import torch

    cuda = torch.version.cuda
    build = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU'} build"
    has_nvidia = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available():
        yield Finding("ok", "torch", build)
    elif cuda is None and has_nvidia:
        remedy = "install a CUDA build of torch to use the GPU"
        yield Finding("warn", "torch", f"{build}, though this machine has an NVIDIA driver", remedy)
    elif cuda is not None and has_nvidia:
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; until then everything runs on the CPU"
        yield Finding("warn", "torch", f"{build}, but it finds no GPU", remedy)
    else:
        yield Finding("ok", "torch", f"{build}; no GPU here, so everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        yield _check_gpu(index)


def _check_gpu(index: int) -> Finding:
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        right = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        words = " ".join(str(error).split())
        return Finding("fail", "gpu", f"cuda:{index} {name}: {words}", "free it, or use --device cpu")
    memory = f"cuda:{index} {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not right:
        return Finding("fail", "gpu", f"{memory}; it computes wrongly", "use another GPU, or --device cpu")
    if free < total / 2:
        return Finding("warn", "gpu", memory, "another process has over half of it: see nvidia-smi")
    return Finding("ok", "gpu", memory)


def check_cores() -> Iterator[Finding]:
    """Look at the cores that this process may use, torch's threads, and memory."""
    import torch

    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = torch.get_num_threads()
    cores = f"{n_cores} of {os.cpu_count()} cores may be used; torch takes {n_threads} threads"
    if n_threads > n_cores:
        yield Finding("warn", "cores", cores, f"set OMP_NUM_THREADS={n_cores}: threads that wait for a core cost time")
    else:
        yield Finding("ok", "cores", cores)
    available = read_available_memory()
    if available is None:
        return
    memory = f"{available / GIB:.1f} GiB available"
    if available < LEAST_MEMORY_GIB * GIB:
        yield Finding("warn", "memory", memory, "use fewer --readers, a smaller --batch, and one worker")
    else:
        yield Finding("ok", "memory", memory)


def read_available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Read how many bytes of memory are available; None where Linux' file about it isn't there."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def check_cache(cache: str) -> Iterator[Finding]:
    """Look at the cache: can it be written, how much is free, what is in it, and can each store be opened?"""
    place = locate(cache)
    if place.is_remote:
        yield Finding("ok", "cache", f"{cache} is a URL; whether it can be written shows at the first write")
    else:
        yield _check_folder(Path(cache))
    yield from _check_stores(cache)


def _check_folder(folder: Path) -> Finding:
    from echoshift.pipeline.store.location import count_free_bytes

    remedy = "choose another with --cache or ECHOSHIFT_CACHE, or change its owner"
    if folder.exists() and not folder.is_dir():
        return Finding("fail", "cache", f"{folder} is a file, not a folder", remedy)
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    try:
        with tempfile.NamedTemporaryFile(dir=above, prefix=".echoshift-doctor-"):
            pass
    except OSError as error:
        return Finding("fail", "cache", f"{above} can't be written: {error.strerror}", remedy)
    free_gb = count_free_bytes(str(folder)) / GB
    is_new = "" if folder.exists() else ", not made yet"
    message = f"{folder.absolute()}{is_new}, can be written, {free_gb:.1f} GB free"
    if free_gb < LEAST_FREE_GB:
        return Finding("warn", "cache", message, "`echoshift plan` says how much a run needs")
    return Finding("ok", "cache", message)


def _check_stores(cache: str) -> Iterator[Finding]:
    from echoshift.pipeline.store.layout import DONE, FAILED
    from echoshift.pipeline.store.open import list_stores, open_store

    n_stores, n_bytes = Counter[str](), 0
    for path in list_stores(cache):
        try:
            store = open_store(path)
            state = store.read_array("state")
        except StoreError as error:
            yield Finding("fail", "stores", str(error), "run `echoshift store verify` on it, or delete it")
            continue
        dataset = str(store.attributes["dataset"])
        n_stores[dataset] += 1
        n_bytes += path.measure_bytes()
        n_failed, n_pending = int((state == FAILED).sum()), int(((state != DONE) & (state != FAILED)).sum())
        if n_failed:
            remedy = f"{path}.failures.jsonl says why; `echoshift extract {dataset} --retry-failed` tries them again"
            yield Finding("warn", "stores", f"{path}: {n_failed} of {len(state)} rows failed", remedy)
        if n_pending:
            remedy = "the same `echoshift extract` goes on"
            yield Finding("warn", "stores", f"{path}: {n_pending} of {len(state)} rows are still to do", remedy)
    listed = ", ".join(f"{n} of {dataset}" for dataset, n in sorted(n_stores.items())) or "none yet"
    yield Finding("ok", "stores", f"{listed}; {n_bytes / 1e6:.1f} MB")


def check_weights(weights_dir: Path | None) -> Iterator[Finding]:
    """Look at which weights of the catalogue are installed; what isn't is no fault until a command needs it."""
    from echoshift.extract.weights.load import find_weights_dir, list_weights

    folder = find_weights_dir(weights_dir)
    rows = list_weights(weights_dir)
    installed = [row.name for row in rows if row.installed]
    message = f"{len(installed)} of {len(rows)} in {folder}{': ' if installed else ''}{', '.join(installed)}"
    if installed:
        yield Finding("ok", "weights", message)
    else:
        yield Finding("warn", "weights", message, "make weights gets I3D's; `echoshift weights ls` names all")


def check_datasets(manifests: Path) -> Iterator[Finding]:
    """Look at every card and manifest: can they be read, and are the videos where commands look first?"""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import locate_manifest, read_manifest

    names = list_cards(manifests)
    without = []
    for name in names:
        try:
            card = read_dataset_card(name, manifests)
            path = locate_manifest(name, manifests)
            if not path.is_file():
                without.append(name)
                continue
            n_segments = len(read_manifest(path, card))
        except CardError as error:
            yield Finding("fail", "datasets", _in_one_line(error), "correct the card")
            continue
        except ManifestError as error:
            remedy = f"`echoshift manifest check {name}` names every fault"
            yield Finding("fail", "datasets", _in_one_line(error), remedy)
            continue
        media = manifests.parent / name
        where = f"videos in {media}" if media.is_dir() else f"no folder {media}: name that of the videos with --media"
        yield Finding("ok", "datasets", f"{name}: {n_segments:,} segments; {where}")
    if without:
        remedy = "`echoshift manifest import --help`, `echoshift demo generate`, or --manifests (ECHOSHIFT_MANIFESTS)"
        message = f"{', '.join(without)}: card, but no manifest"
        is_fine = len(without) < len(names)
        yield Finding("ok", "datasets", message) if is_fine else Finding("warn", "datasets", message, remedy)


def _in_one_line(error: EchoshiftError) -> str:
    first, *others = str(error).splitlines()
    return f"{first} (and {len(others)} lines more)" if others else first


@dataclass(frozen=True, slots=True)
class ClipFormat:
    """A format of trial clips: encoder and pixels of the frames, encoder of the audio, ending of the file."""

    name: str
    video: str
    pixels: str
    audio: str
    ending: str
    options: tuple[tuple[str, str], ...] = ()


FORMATS = (
    ClipFormat("h264", "libx264", "yuv420p", "aac", ".mp4"),
    ClipFormat("hevc", "libx265", "yuv420p", "aac", ".mp4", (("x265-params", "log-level=none"),)),
    ClipFormat("vp9", "libvpx-vp9", "yuv420p", "libopus", ".webm"),
    ClipFormat("av1", "libsvtav1", "yuv420p", "libopus", ".mkv", (("preset", "12"),)),
    ClipFormat("mpeg4", "mpeg4", "yuv420p", "libmp3lame", ".mp4"),
    ClipFormat("mjpeg", "mjpeg", "yuvj420p", "pcm_s16le", ".mkv"),
)


def can_write(form: ClipFormat) -> bool:
    """Return whether the FFmpeg in PyAV has the encoders of a format."""
    import av
    from av.codec.codec import UnknownCodecError

    for name in (form.video, form.audio):
        try:
            av.Codec(name, "w")
        except UnknownCodecError:
            return False
    return True


def write_clip(form: ClipFormat, folder: Path) -> Path:
    """Write a second of grey frames, each of its own grey, with a tone; raises av.FFmpegError where that fails."""
    import av

    path = folder / f"{form.name}{form.ending}"
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(form.video, rate=RATE_HZ, options=dict(form.options))
        video.width = video.height = SIDE_PX
        video.pix_fmt = form.pixels
        audio: Any = container.add_stream(form.audio, rate=AUDIO_HZ, layout="mono")
        for number, grey in enumerate(GREYS):
            frame = av.VideoFrame.from_ndarray(np.full((SIDE_PX, SIDE_PX, 3), grey, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE_HZ)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        times_s = np.arange(AUDIO_HZ) / AUDIO_HZ
        tone = (TONE * np.sin(2 * np.pi * TONE_HZ * times_s)).astype(np.float32)
        whole = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        whole.sample_rate, whole.pts, whole.time_base = AUDIO_HZ, 0, Fraction(1, AUDIO_HZ)
        container.mux(audio.encode(whole))
        container.mux(audio.encode(None))
    return path


def check_decoders() -> Iterator[Finding]:
    """Make a clip of every format that can be written here, and try PyAV's frames and audio, and decord."""
    import av

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
        from echoshift.extract.readers.decord_video import DecordReader
        from echoshift.extract.readers.video import VideoReader

        remedy = INSTALL.format("av")
        yield _try_each("pyav", clips, lambda path: find_frame_fault(path, VideoReader), "fail", remedy)
        yield _try_each("pyav audio", clips, find_audio_fault, "fail", remedy)
        try:
            import_module("decord")
        except (ImportError, OSError) as error:
            yield Finding("warn", "decord", " ".join(str(error).split()), INSTALL.format("decord"))
            return
        tried = {name: path for name, path in clips.items() if name not in NEVER_OF_DECORD}
        remedy = "leave out --decoder decord for such files"
        yield _try_each("decord", tried, lambda path: find_frame_fault(path, DecordReader), "warn", remedy)


def find_frame_fault(path: Path, open_reader: Callable[[Path], FrameReader]) -> str:
    """Describe what is wrong with the frames that a decoder returns of a trial clip; "" where they are right."""
    try:
        with open_reader(path) as reader:
            if reader.info.n_frames != len(GREYS):
                return f"{reader.info.n_frames} frames of {len(GREYS)}"
            numbers = np.sort(np.random.default_rng(0).permutation(len(GREYS))[:5])  # so that it must seek
            frames = reader.read_frames((numbers + 0.5) / RATE_HZ)
    except MediaError as error:
        return " ".join(str(error).removeprefix(f"{path}: ").split())
    greys = frames.reshape(len(frames), -1).mean(axis=1)
    wrong = np.abs(greys - np.take(GREYS, numbers)) > TOLERATED_GREY
    return f"{int(wrong.sum())} of {len(numbers)} frames are others" if wrong.any() else ""


def find_audio_fault(path: Path) -> str:
    """Describe what is wrong with the audio that PyAV returns of a trial clip, by its tone; "" where right."""
    from echoshift.extract.readers.audio import read_audio

    try:
        samples = read_audio(path, 0.25, 0.75, AUDIO_READ_HZ)
    except MediaError as error:
        return " ".join(str(error).removeprefix(f"{path}: ").split())
    if len(samples) != AUDIO_READ_HZ // 2:
        return f"{len(samples)} samples of {AUDIO_READ_HZ // 2}"
    turns = np.exp(-2j * np.pi * TONE_HZ * np.arange(len(samples)) / AUDIO_READ_HZ)
    strength = 2 * abs(np.mean(samples * turns))
    return "" if abs(strength / TONE - 1) <= TOLERATED_TONE else f"a tone of {strength:.2f}, not {TONE:.2f}"


def check_flow() -> Iterator[Finding]:
    """Look whether OpenCV has both ways of computing flow, and whether they run."""
    from echoshift.extract.flow import FlowComputer, FlowMethod

    frame = np.random.default_rng(0).integers(0, 256, (FLOW_SIDE_PX, FLOW_SIDE_PX, 3), dtype=np.uint8)
    methods = (FlowMethod("tvl1", FLOW_SIDE_PX, 20.0), FlowMethod("dis", FLOW_SIDE_PX, 20.0))
    for method in methods:
        computer = FlowComputer(method)
        gray = computer.shrink(frame)
        if (computer.compute(gray, gray) != 128).any():
            remedy = INSTALL.format("opencv-contrib-python-headless")
            yield Finding("fail", "opencv", f"{method.name} finds motion between equal frames", remedy)
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
    import_module("pytorchvideo.models.slowfast")
    yield Finding("ok", "networks", f"timm {import_module('timm').__version__} and pytorchvideo import")


def _try_each(
    part: str, clips: Mapping[str, Path], find_fault: Callable[[Path], str], level: Level, remedy: str
) -> Finding:
    faults = {name: fault for name, path in clips.items() if (fault := find_fault(path))}
    fine = ", ".join(name for name in clips if name not in faults) or "nothing"
    if not faults:
        return Finding("ok", part, f"opens {fine}")
    named = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    return Finding(level, part, f"opens {fine}; not {named}", remedy)
