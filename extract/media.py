"""Finds, identifies and opens a segment's media, and looks through those of a data set before a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from echoshift.extract.clips import plan_clips
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.readers.interface import FrameReader
from echoshift.pipeline.cards import DatasetCard, MediaLayout
from echoshift.pipeline.errors import MediaChangedError, MediaError, MediaNotFoundError
from echoshift.pipeline.importers.folder import VIDEO_ENDINGS
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import NO_MEDIA, compute_digest

if TYPE_CHECKING:
    from echoshift.extract.readers.audio import AudioReader

UNREADABLE = "unreadable media"
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".m4a", ".mp3", ".opus")
N_IDENTITY_BLOCKS = 16
N_BLOCK_BYTES = 64 * 1024

Modality = Literal["rgb", "flow", "audio"]


@dataclass(frozen=True, slots=True)
class MediaLocation:
    """Where a segment's frames or audio lie.

    Attributes:
        kind: a media file; a folder or a tar of numbered images; or none: frames that lie loose have no audio.
        rate_hz, pattern, n_first: of numbered images (MediaLayout).
    """

    kind: Literal["file", "folder", "tar", "none"]
    path: Path
    modality: Modality = "rgb"
    rate_hz: float = 0.0
    pattern: str = ""
    n_first: float = 1

    @classmethod
    def of_file(cls, path: Path) -> MediaLocation:
        """Make the location of one media file."""
        return cls("file", path)


def locate_media(root: Path, layout: MediaLayout, segment: Segment, modality: Modality) -> MediaLocation:
    """Find a segment's media by the card's templates, tried in order.

    For each template: the file itself, a file with a known ending, a tar, a folder of frames. Audio without templates
    of its own is an audio file beside the video, or the track in it. Raises MediaNotFoundError listing what was tried,
    MediaError where two files differ in their endings only, or a path leads out of the root.
    """
    tried: list[str] = []
    templates = {"rgb": layout.rgb, "flow": layout.flow, "audio": layout.audio or layout.rgb}[modality]
    endings = VIDEO_ENDINGS if modality != "audio" else (*AUDIO_ENDINGS, *VIDEO_ENDINGS)
    has_frames = False
    for template in templates:
        relative = template.format(
            video_id=segment.video_id,
            domain=segment.domain,
            split=segment.split,
            participant=PurePosixPath(segment.video_id).name.partition("_")[0],
        )
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise MediaError(f"video {segment.video_id}: {relative} leads out of the media root; correct the manifest")
        tried.append(relative)
        stem = root / relative
        file = stem if stem.is_file() and stem.suffix != ".tar" else _find_file(stem, endings)
        if file is not None:
            return MediaLocation("file", file, modality)
        tar = stem if stem.suffix == ".tar" else stem.with_name(f"{stem.name}.tar")
        kind: Literal["tar", "folder"] = "tar" if tar.is_file() else "folder"
        place = tar if kind == "tar" else stem
        if place.exists():
            has_frames = True
            if modality != "audio":
                return _locate_frames(kind, place, layout, segment, modality)
    if has_frames:
        return MediaLocation("none", root, modality)
    looked_for = f"tried {', '.join(tried)}" if tried else f"the card has no {modality} template in [media]"
    for folder in (root / (relative + ending) for relative in tried for ending in endings):
        if folder.is_dir():
            looked_for += f"; {folder} is a folder, not a media file"
    raise MediaNotFoundError(f"no {modality} of video {segment.video_id} below {root}; {looked_for}")


def _find_file(stem: Path, endings: tuple[str, ...]) -> Path | None:
    """Find the file with a known ending (lower, upper or capitalised); audio endings go before video endings."""
    found: dict[tuple[int, int], Path] = {}  # by inode: some file systems take .mp4 and .MP4 for one name
    for ending in endings:  # not by listing the folder, which may hold every video of the dataset
        for written in (ending, ending.upper(), f".{ending[1:].capitalize()}"):
            path = stem.with_name(stem.name + written)
            if path.is_file():
                found.setdefault((path.stat().st_dev, path.stat().st_ino), path)
    files = sorted(found.values())
    of_audio = [path for path in files if path.suffix.lower() in AUDIO_ENDINGS]
    files = of_audio or files
    if len(files) > 1:
        raise MediaError(f"{files[0]} and {files[1]} differ only in their endings; keep one, or rename the other")
    return files[0] if files else None


def _locate_frames(
    kind: Literal["tar", "folder"], place: Path, layout: MediaLayout, segment: Segment, modality: Modality
) -> MediaLocation:
    flow = modality == "flow"
    rate_hz = layout.flow_rate_hz if flow else layout.frame_rate_hz
    if rate_hz is None:
        raise MediaError(
            f"{place} holds loose frames, but the card says no {'flow' if flow else 'frame'}_rate_hz; add it to [media]"
        )
    pattern = layout.flow_pattern if flow else layout.frame_pattern
    return MediaLocation(
        kind,
        place,
        modality,
        rate_hz=rate_hz,
        pattern=pattern.replace("{video_id}", PurePosixPath(segment.video_id).name),
        n_first=layout.n_first_flow if flow else layout.n_first_frame,
    )


def identify_media(location: MediaLocation) -> str:
    """Compute the identity of media by content, 32 hex digits: neither path nor clock has a part in it (FORMAT.md)."""
    digest = hashlib.blake2b(digest_size=16)
    if location.kind == "folder":
        files = sorted(_list_files(location.path))
        for file in files:
            digest.update(f"{file.relative_to(location.path).as_posix()} {file.stat().st_size}\n".encode())
        for i in sorted(
            {i * (len(files) - 1) // (N_IDENTITY_BLOCKS - 1) for i in range(N_IDENTITY_BLOCKS)} if files else ()
        ):
            digest.update(files[i].read_bytes())
    else:
        for block in _sample_blocks(location.path):
            digest.update(block)
    if location.kind in ("folder", "tar"):
        digest.update(f"{location.pattern} {location.rate_hz!r} {location.n_first!r}".encode())
    return digest.hexdigest()


def _list_files(folder: Path) -> Iterator[Path]:
    """List the files of a folder and those below it; raises OSError for one that can't be read (rglob skips it)."""

    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (path for path in (Path(place, name) for name in names) if path.is_file())


def _sample_blocks(path: Path) -> Iterator[bytes]:
    n_bytes = path.stat().st_size
    yield str(n_bytes).encode()
    last = max(0, n_bytes - N_BLOCK_BYTES)
    with path.open("rb") as file:
        for offset in sorted({i * last // (N_IDENTITY_BLOCKS - 1) for i in range(N_IDENTITY_BLOCKS)}):
            file.seek(offset)
            yield file.read(N_BLOCK_BYTES)


def open_frames(location: MediaLocation, decoder: Literal["pyav", "decord"] = "pyav") -> FrameReader:
    """Open a reader of a location's frames; the decoder matters for media files only."""
    if location.kind == "none":
        raise MediaNotFoundError(f"{location.path} holds no frames")
    if location.kind != "file":
        from echoshift.extract.readers.images import open_flow_images, open_frame_images

        open_images = open_flow_images if location.modality == "flow" else open_frame_images
        return open_images(location.path, location.pattern, location.rate_hz, location.n_first)
    if location.modality == "flow":
        raise MediaError(f"{location.path} is a video file; flow is read from u/ and v/ images")
    if decoder == "decord":
        from echoshift.extract.readers.decord_video import DecordReader

        return DecordReader(location.path)
    from echoshift.extract.readers.video import VideoReader

    return VideoReader(location.path)


def probe_duration_s(location: MediaLocation) -> float:
    """Measure when the frames end, or the audio of a file without frames, in seconds."""
    if location.modality == "audio" or location.path.suffix.lower() in AUDIO_ENDINGS:
        from echoshift.extract.readers.audio import probe_audio_end_s

        return probe_audio_end_s(location.path)
    with open_frames(location) as reader:
        return reader.info.duration_s


class OpenMedia:
    """Media below one root that one thread keeps open from row to row: the last used reader of each kind."""

    def __init__(self, root: Path, layout: MediaLayout) -> None:
        self._root, self._layout = root, layout
        self._readers: dict[tuple[Modality, str], tuple[MediaLocation, FrameReader]] = {}
        self._audio: tuple[MediaLocation, AudioReader] | None = None
        self._identities: dict[MediaLocation, tuple[tuple[int, ...], str]] = {}

    def locate(self, segment: Segment, modality: Modality) -> MediaLocation:
        """Find a segment's media; raises MediaNotFoundError or MediaError."""
        return locate_media(self._root, self._layout, segment, modality)

    def open_frames(self, segment: Segment, modality: Modality, decoder: Literal["pyav", "decord"]) -> FrameReader:
        """Open a segment's frames, or return the reader that is open on them already."""
        location = self.locate(segment, modality)
        key = (modality, decoder)
        if key in self._readers:
            if self._readers[key][0] == location:
                return self._readers[key][1]
            self._readers.pop(key)[1].close()
        reader = open_frames(location, decoder)
        self._readers[key] = (location, reader)
        return reader

    def open_audio(self, location: MediaLocation) -> AudioReader | None:
        """Open audio, or return the reader that is open on it already; None where `location` is none."""
        from echoshift.extract.readers.audio import AudioReader

        if location.kind == "none":
            return None
        if self._audio is not None:
            if self._audio[0] == location:
                return self._audio[1]
            self._audio[1].close()
            self._audio = None
        self._audio = (location, AudioReader(location.path))
        return self._audio[1]

    def check_unchanged(self, segment: Segment, spec: FeatureSpec, digest: np.ndarray) -> None:
        """Check, after a row was read, that its media are still those that `digest`, uint8 [16], was computed from.

        A file's content is hashed once, and again only where what the system says of it (device, inode, size, time of
        change) has changed: a touched file passes, a replaced one raises MediaChangedError. Of a folder of frames the
        folder alone is asked: files added, removed or renamed are noticed, one overwritten in place is not.
        """
        identity = identify_sources(self._identify, segment, spec)
        if compute_digest(identity, segment.start_s, segment.stop_s) != digest.tobytes():
            raise MediaChangedError(
                f"the video {segment.video_id} changed while it was read; run the same command again"
            )

    def _identify(self, segment: Segment, modality: Modality) -> str:
        try:
            location = self.locate(segment, modality)
            if location.kind == "none":
                return NO_MEDIA
            found = location.path.stat()
            signature = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            known = self._identities.get(location)
            if known is None or known[0] != signature:
                known = self._identities[location] = (signature, identify_media(location))
            return known[1]
        except (MediaNotFoundError, FileNotFoundError):
            return NO_MEDIA
        except (MediaError, OSError):
            return UNREADABLE

    def __enter__(self) -> OpenMedia:
        return self

    def __exit__(self, *exc: object) -> None:
        for _, reader in self._readers.values():
            reader.close()
        if self._audio is not None:
            self._audio[1].close()


@dataclass(slots=True)
class MediaSurvey:
    """What is known of the media below one root; the disk is asked once a file."""

    root: Path
    layout: MediaLayout
    _found: dict[tuple[str, ...], tuple[str, str]] = field(default_factory=dict)
    _frame_times: dict[MediaLocation, tuple[np.ndarray, float]] = field(default_factory=dict)
    _durations: dict[MediaLocation, float] = field(default_factory=dict)

    def identify(self, segment: Segment, modality: Modality) -> str:
        """Return the identity of a segment's media, NO_MEDIA when there are none, UNREADABLE when they can't be read.

        Such a row fails when it is extracted, with the reason, and turns stale when its media can be read; one that is
        done stays as it is meanwhile.
        """
        return self._look(segment, modality)[0]

    def explain_missing(self, segment: Segment, spec: FeatureSpec) -> str | None:
        """Explain why media that a row is made from aren't there; None where they are.

        Loose frames without an audio file miss nothing.
        """
        return self._explain(segment, spec, NO_MEDIA)

    def explain_unreadable(self, segment: Segment, spec: FeatureSpec) -> str | None:
        """Explain why media that a row is made from can't be read; None where they can, or aren't there."""
        return self._explain(segment, spec, UNREADABLE)

    def _explain(self, segment: Segment, spec: FeatureSpec, wanted: str) -> str | None:
        found = (self._look(segment, modality) for modality in list_modalities(spec))
        return next((why for identity, why in found if identity == wanted and why), None)

    def _look(self, segment: Segment, modality: Modality) -> tuple[str, str]:
        """Return the identity of a segment's media, and why there is none, "" where nothing is wrong."""
        key = (modality, segment.video_id, segment.domain, segment.split)
        if key not in self._found:
            try:
                location = locate_media(self.root, self.layout, segment, modality)
                self._found[key] = (NO_MEDIA if location.kind == "none" else identify_media(location), "")
            except MediaNotFoundError as error:
                self._found[key] = (NO_MEDIA, str(error))
            except (MediaError, OSError) as error:
                self._found[key] = (UNREADABLE, " ".join(str(error).split()))
        return self._found[key]

    def probe_duration_s(self, segment: Segment, modality: Modality = "rgb") -> float:
        """Measure how long a segment's video is, in seconds; raises MediaNotFoundError or DecodeError."""
        location = locate_media(self.root, self.layout, segment, modality)
        if location.kind == "none":
            raise MediaNotFoundError(
                f"no {modality} of video {segment.video_id} below {self.root}; only loose frames are there"
            )
        if location not in self._durations:
            self._durations[location] = probe_duration_s(location)
        return self._durations[location]

    def count_clips(self, spec: FeatureSpec, segment: Segment) -> int:
        """Count a segment's clips and their views under windows; 1 where its media can't say (extraction will)."""
        try:
            location = locate_media(self.root, self.layout, segment, "rgb" if spec.frame is None else spec.frame.source)
            if location not in self._frame_times:
                with open_frames(location, spec.decoder) as reader:
                    self._frame_times[location] = (reader.frame_times_s, reader.info.duration_s)
            plan = plan_clips(spec.clip, segment.start_s, segment.stop_s, *self._frame_times[location])
        except MediaError:
            return 1
        return plan.n_clips


def list_modalities(spec: FeatureSpec) -> tuple[Modality, ...]:
    """List the media that a row is made from: its own, and the video whose clips audio is centred on."""
    if spec.frame is not None:
        return (spec.frame.source,)
    return ("audio", "rgb") if spec.audio is not None and spec.audio.span == "clip" else ("audio",)


def identify_sources(identify: Callable[[Segment, Modality], str], segment: Segment, spec: FeatureSpec) -> str:
    """Return the identity of all media that a row is made from."""
    return "".join(identify(segment, modality) for modality in list_modalities(spec))


def identify_segments(
    survey: MediaSurvey, segments: Iterable[Segment], spec: FeatureSpec, notify: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Map each segment's id to the identity of what its row is made from."""
    identities = {}
    for segment in segments:
        identities[segment.segment_id] = identify_sources(survey.identify, segment, spec)
        notify()
    return identities


def count_clips_at_most(survey: MediaSurvey, segments: Iterable[Segment], spec: FeatureSpec) -> int:
    """Return the length of a store's clip axis."""
    if spec.audio is not None and spec.audio.span == "segment":
        return spec.n_sound_views
    if spec.clip.sampling != "windows":
        return spec.clip.n_clips * spec.n_entries_per_clip
    n_of_view = spec.n_entries_per_clip // spec.clip.n_views  # crops, or views of the same audio
    return n_of_view * max((survey.count_clips(spec, segment) for segment in segments), default=1)


def require_some_media(survey: MediaSurvey, segments: Collection[Segment], spec: FeatureSpec) -> None:
    """Raise MediaNotFoundError where not one segment has its media below the root."""
    why = None
    for segment in segments:
        missing = survey.explain_missing(segment, spec)
        if missing is None:
            return
        why = why or missing
    raise MediaNotFoundError(
        f"none of {len(segments)} segments has its media below {survey.root}: {why}; name the folder with --media, or "
        "mount its disk"
    )


def require_media_of_done(
    survey: MediaSurvey, rows: Sequence[Segment | None], spec: FeatureSpec, done_again: np.ndarray, path: str
) -> None:
    """Raise MediaNotFoundError where rows that are done, bool [row], would be computed again from media that are gone.

    They would fail, and the features they have would be lost.
    """
    again = (rows[row] for row in np.flatnonzero(done_again).tolist())
    lost = [why for s in again if s is not None and (why := survey.explain_missing(s, spec)) is not None]
    if lost:
        raise MediaNotFoundError(
            f"{len(lost)} rows of {path} are done, and their media are gone: {lost[0]}; put them back, or take their "
            "segments out of the manifest, which leaves the rows as they are"
        )


def find_unchecked_rows(
    survey: MediaSurvey, rows: Sequence[Segment | None], spec: FeatureSpec, done: np.ndarray
) -> tuple[np.ndarray, str]:
    """Find the done rows, `done` bool [row], whose media can't be read now, bool [row], and the first one's reason.

    Nobody can say whether they are up to date; computed again they would fail, and their features would be lost.
    """
    unchecked = np.zeros(len(rows), dtype=bool)
    reason = ""
    for row in np.flatnonzero(done).tolist():
        segment = rows[row]
        error = None if segment is None else survey.explain_unreadable(segment, spec)
        if segment is not None and error is not None:
            unchecked[row] = True
            reason = reason or f"video {segment.video_id}: {error}"
    return unchecked, reason


@dataclass(slots=True)
class NeededMediaProbe:
    """The lengths of videos by the media that are needed, and which videos are there.

    Attributes:
        modalities: tried in order; the first whose media are there says how long the video is.
        asked, found: ids of videos; one that can't be read is found.
    """

    survey: MediaSurvey
    modalities: tuple[Modality, ...]
    asked: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)

    def probe_duration_s(self, segment: Segment) -> float:
        """Return the length in seconds; raises MediaNotFoundError of the last modality, or another MediaError."""
        self.asked.add(segment.video_id)
        for modality in self.modalities:
            try:
                locate_media(self.survey.root, self.survey.layout, segment, modality)
            except MediaNotFoundError:
                if modality == self.modalities[-1]:
                    raise
                continue
            break
        self.found.add(segment.video_id)
        return self.survey.probe_duration_s(segment, modality)


def find_needed_modalities(card: DatasetCard) -> tuple[Modality, ...]:
    """Find by which media a card's videos are looked for: frames, unless no encoder of the card reads them.

    Audio that is centred on clips needs the frames' times. Flow is read from its images, else computed from frames.
    Audio beside frames isn't asked for, because a segment may be silent. Raises SpecError for an unknown encoder.
    """
    entries = [find_encoder(name) for name in card.encoders]
    others = [entry for entry in entries if entry.audio is None or entry.audio.span != "segment"]
    if entries and not others:
        return ("audio",)
    if others and all(entry.modality == "flow" for entry in others):
        return ("flow", "rgb")
    return ("rgb",)
