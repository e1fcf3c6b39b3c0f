"""Gives clips that are decoded and augmented anew in every epoch, read ahead by processes of PyTorch's DataLoader."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from echoshift.extract.media import MediaSurvey, OpenMedia, identify_sources
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import ManifestError, MediaError, MediaTimeoutError, SpecError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import compute_digest
from echoshift.train.stage1.clip_reading import SegmentClips, read_clips
from echoshift.train.stage1.kept_media import KeptMedia
from echoshift.train.stage1.visual_inputs import ClipFacts, derive_epoch_seed

TIMEOUT_S = 300.0
"""How long one segment may take before the run ends with its name; a decoder can hang on a damaged file."""


@dataclass(frozen=True, slots=True)
class _Request:
    """Asks for a segment's clips; those of training come from the pictures kept, those of a test say what they are."""

    segment: Segment
    spec: FeatureSpec
    is_test: bool


@dataclass(frozen=True, slots=True)
class _Reply:
    clips: SegmentClips
    digest: np.ndarray | None


class _ClipDataset(Dataset[Any]):
    """Reads what it is asked for by the media that this process has open; an error comes back as what it is.

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
        return _Reply(read_clips(self._kept, request.segment, request.spec), None)

    def _read_test(self, request: _Request) -> _Reply:
        if self._plain is None or self._survey is None:
            self._plain, self._survey = OpenMedia(self._root, self._layout), MediaSurvey(self._root, self._layout)
        segment = request.segment
        identity = identify_sources(self._survey.identify, segment, request.spec)
        digest = np.frombuffer(compute_digest(identity, segment.start_s, segment.stop_s), dtype=np.uint8)
        clips = read_clips(self._plain, segment, request.spec)
        self._plain.check_unchanged(segment, request.spec, digest)
        return _Reply(clips, digest)


class _Requests(Sampler[Any]):
    """What a loader reads next; exchanged between two iterations."""

    def __init__(self) -> None:
        self.requests: Sequence[_Request] = ()

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.requests)


class FrameInputs:
    """Clips of segments as VisualInputs says, under the name `clip`, by the reading of extraction.

    `spec` is that of training and has one entry a segment; its clip seed is replaced by one of (seed, epoch).
    `n_readers` processes read ahead, each about its share of a batch, and stay from epoch to epoch; 0 reads in this
    process when asked. Each process keeps up to `n_cached_mb` MB of decoded pictures of training for the next epochs.
    Iterations that are under way at the same time have readers of their own.
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
        _check_training_spec(spec)
        self._segments = {segment.segment_id: segment for segment in segments}
        self._spec = spec
        self._seed = seed
        self._n_readers = n_readers
        self._dataset = _ClipDataset(media_root, layout, n_cached_mb * 10**6, TIMEOUT_S)
        self._idle: dict[int, list[DataLoader[Any]]] = {}

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        """Return {"clip": float32 [B, C, T, H, W]} of each batch; raises MediaError naming the segment that fails."""
        clip = self._spec.clip.model_copy(update={"seed": derive_epoch_seed(self._seed, epoch)})
        spec = self._spec.model_copy(update={"clip": clip})
        requests = [_Request(self._find(name), spec, False) for batch in batches for name in batch]
        replies = self._read(requests, n_ahead=max((len(batch) for batch in batches), default=1))
        try:
            for batch in batches:
                yield {"clip": _join([next(replies).clips.clips for _ in batch])}
        finally:
            replies.close()

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Return {"clip": float32 [n_entries, C, T, H, W]} of each segment, with what it is made from."""
        requests = [_Request(self._find(name), spec, True) for name in segment_ids]
        replies = self._read(requests, n_ahead=1)
        try:
            for name, reply in zip(segment_ids, replies, strict=True):
                assert reply.digest is not None, "a test says what it was made from"
                read = reply.clips
                yield name, {"clip": _join([read.clips])}, ClipFacts(read.times_s, read.frames, reply.digest)
        finally:
            replies.close()

    def close(self) -> None:
        """End the reader processes that wait."""
        for loaders in self._idle.values():
            for loader in loaders:
                _end_processes(loader)
        self._idle.clear()

    def __enter__(self) -> FrameInputs:
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
                    is_through = next(replies, None) is None  # the loader sees its end, and can begin anew
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


def _check_training_spec(spec: FeatureSpec) -> None:
    if spec.frame is None or spec.clip.sampling == "windows" or spec.clip.n_clips * spec.n_entries_per_clip != 1:
        raise SpecError(
            f"{spec.encoder}: training from frames takes pictures, one clip and one view a segment (preset "
            "zhang-stage1-train), since it draws anew in each epoch"
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
            "short, use fewer readers or keep fewer pictures (visual.n_readers, 0 reads in this process; "
            "visual.n_cached_mb)"
        ) from error
    return reply


def _join(clips: Sequence[Tensor]) -> Tensor:
    """Join tensors [n, ...] along their first axis, in pinned memory where there is CUDA."""
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
