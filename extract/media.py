"""Finds a segment's media below the media root, says what their content is, and opens them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from echoshift.extract.readers.protocol import FrameReader
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import MediaError, MediaNotFoundError
from echoshift.pipeline.importers.folder import VIDEO_ENDINGS
from echoshift.pipeline.segments import Segment

SOUND_ENDINGS = (".wav", ".flac", ".ogg", ".m4a", ".mp3", ".opus")
N_IDENTITY_BLOCKS = 16
N_BLOCK_BYTES = 64 * 1024

Modality = Literal["rgb", "flow", "audio"]


@dataclass(frozen=True, slots=True)
class MediaLocation:
    """Where a segment's pictures or sound lie.

    Attributes:
        kind: a media file; a folder or a tar of numbered images; or none: pictures that lie loose have no sound.
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

    For each template: the file itself, a file with a known ending, a tar, a folder of frames. Sound without templates
    of its own is a sound file beside the pictures, or the track in their file. Raises MediaNotFoundError listing what
    was tried, MediaError where two files differ in their endings only, or a path leads out of the root.
    """
    tried: list[str] = []
    templates = {"rgb": layout.rgb, "flow": layout.flow, "audio": layout.audio or layout.rgb}[modality]
    endings = VIDEO_ENDINGS if modality != "audio" else (*SOUND_ENDINGS, *VIDEO_ENDINGS)
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
    """Find the file with a known ending (lower, upper or capitalised); sound endings go before video endings."""
    found: dict[tuple[int, int], Path] = {}  # by inode: some file systems take .mp4 and .MP4 for one name
    for ending in endings:  # not by listing the folder, which may hold every video of the dataset
        for written in (ending, ending.upper(), f".{ending[1:].capitalize()}"):
            path = stem.with_name(stem.name + written)
            if path.is_file():
                found.setdefault((path.stat().st_dev, path.stat().st_ino), path)
    files = sorted(found.values())
    sounds = [path for path in files if path.suffix.lower() in SOUND_ENDINGS]
    files = sounds or files
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
    """Open a reader of a location's pictures; the decoder matters for media files only."""
    if location.kind == "none":
        raise MediaNotFoundError(f"{location.path} holds no pictures")
    if location.kind != "file":
        return _open_images(location)
    if location.modality == "flow":
        raise MediaError(f"{location.path} is a video file; flow is read from u/ and v/ images")
    if decoder == "decord":
        from echoshift.extract.readers.decord_video import DecordFrameReader

        return DecordFrameReader(location.path)
    from echoshift.extract.readers.pyav_video import PyAvFrameReader

    return PyAvFrameReader(location.path)


def _open_images(location: MediaLocation) -> FrameReader:
    place, pattern, rate_hz, n_first = location.path, location.pattern, location.rate_hz, location.n_first
    if location.modality == "flow":
        from echoshift.extract.readers.flow_images import FlowImageReader

        return FlowImageReader(place, pattern, rate_hz, n_first)
    if location.kind == "tar":
        from echoshift.extract.readers.frame_tar import FrameTarReader

        return FrameTarReader(place, pattern, rate_hz, n_first)
    from echoshift.extract.readers.frame_folder import FrameFolderReader

    return FrameFolderReader(place, pattern, rate_hz, n_first)


def probe_duration_s(location: MediaLocation) -> float:
    """Measure when the pictures end, or the sound of a file without pictures, in seconds."""
    if location.modality == "audio" or location.path.suffix.lower() in SOUND_ENDINGS:
        from echoshift.extract.readers.pyav_audio import probe_audio_end_s

        return probe_audio_end_s(location.path)
    with open_frames(location) as reader:
        return reader.info.duration_s
