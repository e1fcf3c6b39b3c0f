"""Clips that are decoded and augmented in every epoch, bit for bit as extraction would, read ahead by processes."""

from __future__ import annotations

import math
import signal
import sys
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from echoshift.extract.frames import ClipAssembler
from echoshift.extract.media import MediaSurvey, Modality, OpenMedia, identify_sources
from echoshift.extract.readers.interface import FrameReader, VideoInfo, find_shown_frames
from echoshift.extract.rows import FrameClips, read_frames
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import ManifestError, MediaError, MediaMemoryError, MediaTimeoutError, SpecError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import compute_digest
from echoshift.train.stage1.clips import ClipFacts, derive_epoch_seed

TIMEOUT_S = 300.0
"""How long one segment may take before the run ends with its name; a decoder can hang on a damaged file."""
_LARGEST_PART = 8  # a segment may take an eighth of what is kept, or it is read each time
_PATH = "clips"
_CPU = torch.device("cpu")
_Decoder = Literal["pyav", "decord"]


@dataclass(frozen=True, slots=True)
class SegmentClips:
    """The network's inputs of one segment, entry by entry (entry number: FeatureSpec.n_entries_per_clip).

    Attributes:
        clips: normalised, float32 [n_entries, C, T, H, W].
        times_s: seconds that each covers, float64 [n_entries, 2].
        frames: first and last frame, index in the file, int64 [n_entries, 2].
    """

    clips: Tensor
    times_s: np.ndarray
    frames: np.ndarray


def read_clips(media: OpenMedia, segment: Segment, spec: FeatureSpec) -> SegmentClips:
    """Read the clips of a segment as `spec` says, bit for bit what extraction feeds the network; flow may be computed.

    The outputs, dtype, precision and weights of `spec` don't matter. Raises MediaError naming the segment.
    """
    taken: dict[int, Tensor] = {}
    assembler = ClipAssembler({_PATH: spec}, _CPU, lambda _path, entry, clip: taken.__setitem__(entry, clip))
    facts: FrameClips | None = None
    try:
        for item in read_frames(media, segment, {_PATH: spec}):
            if isinstance(item, FrameClips):
                facts = item
                assembler.begin(item)
            else:
                assembler.feed(item)
    except MediaError as error:
        raise type(error)(_explain(segment, str(error))) from error
    except MemoryError as error:
        raise MediaMemoryError(_explain(segment, f"reading it needs more memory than there is: {error}")) from error
    assert facts is not None and spec.frame is not None, "a row's facts come before its frames"
    clips = [taken[entry] for entry in range(len(taken))]
    n_crops = spec.frame.n_crops
    assert len(clips) == len(facts.times) * n_crops, "every clip is complete once all frames are read"
    return SegmentClips(
        clips[0][None] if len(clips) == 1 else torch.stack(clips),
        facts.times.repeat(n_crops, axis=0),
        facts.spans.repeat(n_crops, axis=0),
    )


def _explain(segment: Segment, reason: str) -> str:
    return (
        f"segment {segment.segment_id}: {' '.join(reason.split())}; mend its video {segment.video_id} and run the same "
        "command again, or take the segment out of the manifest"
    )


class KeptMedia(OpenMedia):
    """OpenMedia that keeps at most `n_kept_bytes` of decoded frames, those used last, so that epochs share decoding.

    A segment's frames are all decoded when the first of them is asked for, unless they are more than an eighth of what
    may be kept. Files must not be replaced meanwhile: that isn't noticed.
    """

    def __init__(self, root: Path, layout: MediaLayout, n_kept_bytes: int) -> None:
        super().__init__(root, layout)
        self._n_kept_bytes = n_kept_bytes
        self._n_bytes = 0
        self._kept: OrderedDict[tuple[str, Modality, str], _KeptFrames] = OrderedDict()
        self._videos: dict[tuple[str, ...], tuple[VideoInfo, npt.NDArray[np.float64]]] = {}

    def open_frames(self, segment: Segment, modality: Modality, decoder: _Decoder) -> FrameReader:
        """Return a reader of a segment's frames, which opens the media only for what isn't kept."""

        def open_media() -> FrameReader:
            return super(KeptMedia, self).open_frames(segment, modality, decoder)

        video = (segment.video_id, segment.domain, segment.split, modality, decoder)
        if video not in self._videos:
            opened = open_media()
            self._videos[video] = opened.info, opened.frame_times_s
        reader = _KeptReader(*self._videos[video], open_media)
        key = (segment.segment_id, modality, decoder)
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._keep(key, segment, reader, 2 if modality == "flow" else 3)
        reader.kept = self._kept.get(key)
        return reader

    def _keep(self, key: tuple[str, Modality, str], segment: Segment, reader: _KeptReader, n_channels: int) -> None:
        """Decode a segment's frames, and one more for flow, and make space for them."""
        n_frames = len(reader.frame_times_s)
        first, last = find_shown_frames(reader.frame_times_s, [segment.start_s, segment.stop_s]).tolist()
        n_bytes = (min(last + 2, n_frames) - first) * reader.info.height * reader.info.width * n_channels
        if n_bytes > self._n_kept_bytes // _LARGEST_PART:
            return
        frames = reader.read_frames(reader.frame_times_s[first : last + 2])
        self._kept[key] = _KeptFrames(first, frames)
        self._n_bytes += frames.nbytes
        while self._n_bytes > self._n_kept_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._n_bytes -= dropped.frames.nbytes


@dataclass(frozen=True, slots=True)
class _KeptFrames:
    """All frames of a segment, uint8 [n, H, W, C], from number `first` on."""

    first: int
    frames: npt.NDArray[np.uint8]


class _KeptReader(FrameReader):
    """A reader that takes what is kept, and opens the media for the rest."""

    def __init__(self, info: VideoInfo, frame_times_s: npt.NDArray[np.float64], open_media: Any) -> None:
        self.info, self.frame_times_s, self._open_media = info, frame_times_s, open_media
        self.kept: _KeptFrames | None = None

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times."""
        if self.kept is not None:
            places = find_shown_frames(self.frame_times_s, times_s).reshape(-1) - self.kept.first
            if len(places) and places.min() >= 0 and places.max() < len(self.kept.frames):
                return self.kept.frames[places]
        read: npt.NDArray[np.uint8] = self._open_media().read_frames(times_s)
        return read


@dataclass(frozen=True, slots=True)
class _Request:
    """Request for a segment's clips; those of training may come from frames that are kept, those of a test not."""

    segment: Segment
    spec: FeatureSpec
    is_test: bool


_Reply = tuple[SegmentClips, np.ndarray]
"""Clips and, of a test, the digest of what they are made from, uint8 [16]; of training, [0]."""


class _ClipDataset(Dataset[Any]):
    """Clips read by the media that this process has open; an error is returned as what it is.

    In a reader process a segment that takes longer than `timeout_s` ends the process: nothing else stops a decoder.
    """

    def __init__(self, root: Path, layout: MediaLayout, n_kept_bytes: int, timeout_s: float) -> None:
        self._root, self._layout, self._n_kept_bytes, self._timeout_s = root, layout, n_kept_bytes, timeout_s
        self._kept: KeptMedia | None = None
        self._plain: OpenMedia | None = None
        self._survey: MediaSurvey | None = None

    def __getitem__(self, request: _Request) -> _Reply | MediaError:
        is_apart = get_worker_info() is not None
        if is_apart:
            signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        try:
            return self._read_test(request) if request.is_test else self._read_training(request)
        except MediaError as error:
            return error
        finally:
            if is_apart:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _read_training(self, request: _Request) -> _Reply:
        if self._kept is None:
            self._kept = KeptMedia(self._root, self._layout, self._n_kept_bytes)
        return read_clips(self._kept, request.segment, request.spec), np.zeros(0, np.uint8)

    def _read_test(self, request: _Request) -> _Reply:
        if self._plain is None or self._survey is None:
            self._plain, self._survey = OpenMedia(self._root, self._layout), MediaSurvey(self._root, self._layout)
        segment = request.segment
        identity = identify_sources(self._survey.identify, segment, request.spec)
        digest = np.frombuffer(compute_digest(identity, segment.start_s, segment.stop_s), dtype=np.uint8)
        clips = read_clips(self._plain, segment, request.spec)
        self._plain.check_unchanged(segment, request.spec, digest)
        return clips, digest


class _Requests(Sampler[Any]):
    """What a loader reads next; exchanged between two iterations."""

    def __init__(self) -> None:
        self.requests: Sequence[_Request] = ()

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.requests)


class DecodedClips:
    """A ClipSource that decodes, under the name `clip`.

    `spec` is that of training and has one entry a segment; its clip seed is replaced by one of (seed, epoch).
    `n_readers` processes read ahead, each about its share of a batch, and stay from epoch to epoch; 0 reads in this
    process when asked. Each process keeps up to `n_cached_mb` MB of decoded frames of training for the next epochs.
    Iterations that run at the same time have readers of their own.
    """

    def __init__(
        self,
        media_root: Path,
        layout: MediaLayout,
        segments: Sequence[Segment],
        spec: FeatureSpec,
        *,
        seed: int,
        n_readers: int,
        n_cached_mb: int,
    ) -> None:
        if spec.frame is None or spec.clip.sampling == "windows" or spec.clip.n_clips * spec.n_entries_per_clip != 1:
            raise SpecError(
                f"{spec.encoder}: training from frames takes one clip and one view a segment (preset "
                "zhang-stage1-train), since it draws them in each epoch"
            )
        self._segments = {segment.segment_id: segment for segment in segments}
        self._spec = spec
        self._seed = seed
        self._n_readers = n_readers
        self._dataset = _ClipDataset(media_root, layout, n_cached_mb * 10**6, TIMEOUT_S)
        self._idle: dict[int, list[DataLoader[Any]]] = {}

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield {"clip": float32 [B, C, T, H, W]} of each batch; raises MediaError naming the segment that fails."""
        clip = self._spec.clip.model_copy(update={"seed": derive_epoch_seed(self._seed, epoch)})
        spec = self._spec.model_copy(update={"clip": clip})
        requests = [_Request(self._find(name), spec, False) for batch in batches for name in batch]
        replies = self._read(requests, n_ahead=max((len(batch) for batch in batches), default=1))
        try:
            for batch in batches:
                yield {"clip": _join([next(replies)[0].clips for _ in batch])}
        finally:
            replies.close()

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Yield {"clip": float32 [n_entries, C, T, H, W]} of each segment, with its origin."""
        requests = [_Request(self._find(name), spec, True) for name in segment_ids]
        replies = self._read(requests, n_ahead=1)
        try:
            for name, (read, digest) in zip(segment_ids, replies, strict=True):
                yield name, {"clip": _join([read.clips])}, ClipFacts(read.times_s, read.frames, digest)
        finally:
            replies.close()

    def close(self) -> None:
        """End the reader processes that wait."""
        for loaders in self._idle.values():
            for loader in loaders:
                _end_processes(loader)
        self._idle.clear()

    def __enter__(self) -> DecodedClips:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _find(self, segment_id: str) -> Segment:
        try:
            return self._segments[segment_id]
        except KeyError as error:
            raise ManifestError(f"segment {segment_id} is not among those that can be trained on") from error

    def _read(self, requests: Sequence[_Request], n_ahead: int) -> Generator[_Reply, None, None]:
        """Read in order, about `n_ahead` requests ahead; whatever ends it early ends its processes."""
        if not requests:
            return
        n_each = max(2, math.ceil(n_ahead / max(self._n_readers, 1))) if n_ahead > 1 else 1
        idle = self._idle.setdefault(n_each, [])
        loader = idle.pop() if idle else self._make_loader(n_each)
        sampler: Any = loader.sampler
        sampler.requests = requests
        is_through = False
        try:
            replies = iter(loader)
            for n_left, request in zip(range(len(requests) - 1, -1, -1), requests, strict=True):
                reply = _get_reply(loader, replies, request)
                if isinstance(reply, MediaError):
                    raise reply
                if not n_left:
                    is_through = next(replies, None) is None  # the loader sees its end, and can begin again
                yield reply
        finally:
            if is_through:
                idle.append(loader)
            else:
                _end_processes(loader)

    def _make_loader(self, n_each: int) -> DataLoader[Any]:
        if not self._n_readers:
            return DataLoader(self._dataset, sampler=_Requests(), batch_size=None, collate_fn=_pass_on)
        # Not `fork`: this process has threads, of which a forked one would have the locks but not the owners. Not
        # `forkserver`: its children outlive a run that is killed, since they watch the server, and the server them.
        return DataLoader(
            self._dataset,
            sampler=_Requests(),
            batch_size=None,
            collate_fn=_pass_on,
            num_workers=self._n_readers,
            prefetch_factor=n_each,
            persistent_workers=True,
            multiprocessing_context="spawn",
            worker_init_fn=_prepare_process,
        )


def _get_reply(loader: DataLoader[Any], replies: Iterator[Any], request: _Request) -> _Reply | MediaError:
    """Get the next reply; a reader process that has ended is a MediaError that names what is waited for."""
    try:
        reply: _Reply | MediaError = next(replies)
    except RuntimeError as error:
        reason = (str(error).strip() or "no reason").splitlines()[0]
        if not reason.startswith("DataLoader"):
            raise
        segment = request.segment
        processes: Any = getattr(getattr(loader, "_iterator", None), "_workers", ())
        if any(process.exitcode == -signal.SIGALRM for process in processes):
            raise MediaTimeoutError(
                f"segment {segment.segment_id}, or one of the next: reading its video {segment.video_id} takes longer "
                f"than {TIMEOUT_S:g} s; fetch the video again, or take the segment out of the manifest"
            ) from error
        raise MediaError(
            f"a reader process ended before it gave segment {segment.segment_id} ({reason}); if memory or /dev/shm is "
            "short, use fewer readers or keep fewer frames (visual.n_readers, 0 reads in this process; "
            "visual.n_cached_mb)"
        ) from error
    return reply


def _join(clips: Sequence[Tensor]) -> Tensor:
    """Join tensors [n, ...] along their first axis, in pinned memory where CUDA is available."""
    is_pinned = torch.cuda.is_available()
    if len(clips) == 1 and not is_pinned:
        return clips[0]
    joined = torch.empty((sum(map(len, clips)), *clips[0].shape[1:]), pin_memory=is_pinned)
    return torch.cat(list(clips), out=joined)


def _pass_on(reply: Any) -> Any:
    return reply


def _prepare_process(_worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the run, which ends its readers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
    sys.excepthook = _report_error


def _report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Stay silent where the run hangs up while a thread of multiprocessing hands a clip over: it has been stopped."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_processes(loader: DataLoader[Any]) -> None:
    """End a loader's processes now; otherwise they last until nothing refers to it, such as an error's traceback."""
    shutdown: Any = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()
