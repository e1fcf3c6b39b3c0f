"""Explains why a segment's row is done, stale, failed or pending, in all stores of a cache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from echoshift.extract.media import UNREADABLE, MediaSurvey, identify_segments, list_modalities, locate_media
from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.errors import EchoshiftError, MediaError, StoreError, suggest
from echoshift.pipeline.manifest import locate_manifest, read_manifest
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE, FAILED, NO_MEDIA, compute_digest
from echoshift.pipeline.store.location import Place, locate
from echoshift.pipeline.store.open import open_store

Status = Literal["done", "stale", "failed", "pending", "absent", "unknown"]
N_CLIPS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class RowExplanation:
    """One segment in one store.

    Attributes:
        status: done and up to date; stale: made from other media or times, whether done or failed then; failed;
            pending; absent: in the manifest, not in the store; unknown: the store can't be read.
        row: None where the store has no such row.
        why: the reasons, a line each.
        start_s, stop_s: what the manifest says now; None when the segment is no longer in it.
        times_s: start and end of each clip of a done row.
        frames: first and last frame, or first sample and one past the last, of each clip.
        last_run: when a run last wrote to the store (UTC), "" when that isn't known.
    """

    store: str
    segment_id: str
    status: Status
    row: int | None
    why: tuple[str, ...]
    video_id: str = ""
    start_s: float | None = None
    stop_s: float | None = None
    times_s: tuple[tuple[float, float], ...] = ()
    frames: tuple[tuple[int, int], ...] = ()
    last_run: str = ""


def explain_everywhere(
    paths: Iterable[Place], segment_id: str, manifests_dir: Path, media_root: Path | None, dataset: str = ""
) -> list[RowExplanation]:
    """Explain a segment in every store that has its row, or whose dataset's manifest has the segment.

    `media_root` None means data/DATASET beside the manifests; `dataset` "" means all. Raises StoreError with the
    nearest ids when none knows the segment.
    """
    explanations: list[RowExplanation] = []
    known_ids: set[str] = set()
    n_stores = 0
    manifests: dict[str, dict[str, Segment]] = {}
    for path in paths:
        store = open_store(path)
        name = str(store.attributes["dataset"])
        if dataset and name != dataset:
            continue
        n_stores += 1
        if name not in manifests:
            manifests[name] = _read_segments(name, manifests_dir)
        try:
            ids = list(store.segment_ids)
        except (StoreError, UnicodeDecodeError) as error:
            why = f"its segment ids can't be read: {error}; run `echoshift store verify {path}`"
            explanations.append(RowExplanation(store.path, segment_id, "unknown", None, (why,)))
            continue
        known_ids.update(ids, manifests[name])
        if segment_id in manifests[name] or segment_id in ids:
            root = media_root or manifests_dir.parent / name
            explanations.append(explain_segment(store, segment_id, manifests[name], manifests_dir, root))
    if not n_stores:
        raise StoreError("there is no store to look at; give --cache or a store's path")
    if not any(explanation.status != "unknown" for explanation in explanations) and segment_id not in known_ids:
        hint = suggest(segment_id, sorted(known_ids), there="they have")
        raise StoreError(f"no segment {segment_id!r} in {n_stores} stores, nor in their manifests; {hint}")
    return explanations


def explain_segment(
    store: FeatureStore, segment_id: str, segments: dict[str, Segment], manifests_dir: Path, media_root: Path
) -> RowExplanation:
    """Explain one row; `segments` are those of the dataset's manifest by id."""
    segment = segments.get(segment_id)
    row = next((row for row, known in enumerate(store.segment_ids) if known == segment_id), None)
    bare = RowExplanation(store.path, segment_id, "absent", row, (), last_run=_read_last_run(store))
    if segment is not None:
        bare = replace(bare, video_id=segment.video_id, start_s=segment.start_s, stop_s=segment.stop_s)
    if row is None:
        return replace(bare, why=("in the manifest but not yet in the store: run `echoshift extract`",))
    state = int(store.read_array("state", row, row + 1)[0])
    if state == DONE:
        found = _describe_done(store, row, bare)
    elif state == FAILED:
        found = replace(bare, status="failed", why=_explain_failure(store, segment_id))
    else:
        return replace(bare, status="pending", why=_explain_pending(store, row))
    if segment is None:
        gone = "the segment is no longer in the manifest; the row stays as it is"
        return replace(found, why=(*found.why, gone))
    if not media_root.is_dir():
        unseen = f"whether it is up to date can't be said without the media: there is no folder {media_root}"
        return replace(found, why=(*found.why, unseen))
    survey = MediaSurvey(media_root, read_dataset_card(str(store.attributes["dataset"]), manifests_dir).media)
    stale = _explain_staleness(store, row, segment, segments, survey)
    if stale:
        return replace(found, status="stale", why=(*found.why, *stale))
    return replace(found, why=(*found.why, "up to date: video and times are those the row was made from"))


def format_explanation(explanation: RowExplanation) -> list[str]:
    """Write an explanation as lines for people."""
    where = f"row {explanation.row} of {explanation.store}" if explanation.row is not None else explanation.store
    lines = [f"segment {explanation.segment_id}: {explanation.status}; {where}"]
    if explanation.start_s is not None:
        lines.append(f"  manifest: {explanation.video_id}, {explanation.start_s} s to {explanation.stop_s} s")
    if explanation.times_s:
        n = len(explanation.times_s)
        spans = ", ".join(f"{start:.3f}-{stop:.3f} s" for start, stop in explanation.times_s[:N_CLIPS_SHOWN])
        lines.append(f"  {n} clips: {spans}{' …' if n > N_CLIPS_SHOWN else ''}")
    lines += [f"  {line}" for line in explanation.why]
    if explanation.last_run:
        lines.append(f"  a run last wrote to the store at {explanation.last_run}")
    return lines


def _describe_done(store: FeatureStore, row: int, bare: RowExplanation) -> RowExplanation:
    n_valid = int(store.read_array("n_valid", row, row + 1)[0])
    times = store.read_array("times", row, row + 1)[0, :n_valid]
    frames = store.read_array("frames", row, row + 1)[0, :n_valid]
    why: list[str] = []
    audio = store.spec.audio
    if audio is not None:
        loudness = float(store.read_array("loudness_dbfs", row, row + 1)[0])
        is_heard = bool(store.read_array("has_audio", row, row + 1)[0])
        why.append(f"audio: {loudness:.1f} dBFS" if is_heard else "audio: none; its features are NaN")
        if audio.n_views > 1:
            why.append(
                f"{audio.n_views} views of each window of audio, one after the other: the first as it is, the others "
                f"with noise of +-{audio.noise:g} and {audio.n_masked_bins} bands masked"
            )
    return replace(
        bare,
        status="done",
        why=tuple(why),
        times_s=tuple((start, stop) for start, stop in times.tolist()),
        frames=tuple((first, last) for first, last in frames.tolist()),
    )


def _explain_failure(store: FeatureStore, segment_id: str) -> tuple[str, ...]:
    failure = read_failures(store.path).get(segment_id)
    if failure is None:
        return ("the failure ledger has no line for it; `echoshift store verify --repair` re-queues it",)
    retry = "a retry can help: --retry-failed" if failure.retryable else "trying again won't help"
    return (f"{failure.exception}: {failure.reason} ({retry})",)


def _explain_pending(store: FeatureStore, row: int) -> tuple[str, ...]:
    why = "never computed"
    if store.read_array("digest", row, row + 1).any():
        why = "it was computed once, and then re-queued: by --repair, or its shard is being computed again"
    holder = locate(store.path).beside(".holder.json").read_text()
    if holder is not None:
        held = f"its shard may be under way: the store is held by {holder.strip()}"
        return (why, f"{held}, unless that process has died")
    return (why, "no run holds the store: run `echoshift extract`")


def _explain_staleness(
    store: FeatureStore, row: int, segment: Segment, segments: dict[str, Segment], survey: MediaSurvey
) -> tuple[str, ...]:
    """Explain why a row's digest isn't the expected one, () if it is; the digest alone can't tell media from times.

    What proves that the times changed: the digest is that of today's video with the times the row covers; or other
    rows of the video still match. What suggests that the video changed: no row of it matches.
    """
    imported = store.spec.imported is not None  # then the content of its source is its identity
    identity = store.spec.weights if imported else identify_segments(survey, [segment], store.spec)[segment.segment_id]
    digest = store.read_array("digest", row, row + 1)[0].tobytes()
    if digest == compute_digest(identity, segment.start_s, segment.stop_s):
        return ()
    again = "the next extract computes it again"
    if identity == NO_MEDIA:
        return (f"the row was made from media that are no longer below {survey.root}",)
    if identity == UNREADABLE:
        return ("its media can't be read now; until they can the row stays as it is",)
    n_valid = int(store.read_array("n_valid", row, row + 1)[0])
    times = store.read_array("times", row, row + 1)[0, :n_valid]
    now = f"{segment.start_s} s to {segment.stop_s} s"
    if n_valid:
        was = (float(times[:, 0].min()), float(times[:, 1].max()))
        if digest == compute_digest(identity, *was):
            return (f"its times changed: from {was[0]} s to {was[1]} s, to {now}; {again}",)
    matching, others = _match_siblings(store, row, segment, segments, survey)
    covers = f"; the row covers {was[0]:.3f} s to {was[1]:.3f} s, the manifest says {now}" if n_valid else ""
    if matching:
        return (f"its times changed: {matching} other rows of the video still match its content{covers}; {again}",)
    changed = _describe_change(survey, segment, store)
    if others:
        return (f"the video's content changed: none of its {others + 1} rows matches it any more{changed}; {again}",)
    if n_valid and (was[0] < segment.start_s - 1e-6 or was[1] > segment.stop_s + 1e-6):
        return (f"its times changed, and perhaps the video{covers}; {again}",)
    return (f"the video's content changed, or the times did{changed}; {again}",)


def _match_siblings(
    store: FeatureStore, row: int, segment: Segment, segments: dict[str, Segment], survey: MediaSurvey
) -> tuple[int, int]:
    """Count the other rows of the video that are up to date, and all of them that were ever computed."""
    state = store.read_array("state")
    siblings = [
        (i, segments[known])
        for i, known in enumerate(store.segment_ids)
        if i != row and state[i] in (DONE, FAILED) and known in segments
        if segments[known].video_id == segment.video_id
    ]
    identities = identify_segments(survey, [other for _, other in siblings], store.spec)
    matching = sum(
        store.read_array("digest", i, i + 1)[0].tobytes()
        == compute_digest(identities[other.segment_id], other.start_s, other.stop_s)
        for i, other in siblings
    )
    return matching, len(siblings)


def _describe_change(survey: MediaSurvey, segment: Segment, store: FeatureStore) -> str:
    try:
        location = locate_media(survey.root, survey.layout, segment, list_modalities(store.spec)[0])
    except MediaError:
        return ""
    if location.kind == "none":
        return ""
    when = datetime.fromtimestamp(location.path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return f" ({location.path} was last written at {when})"


def _read_segments(dataset: str, manifests_dir: Path) -> dict[str, Segment]:
    try:
        card = read_dataset_card(dataset, manifests_dir)
        return {s.segment_id: s for s in read_manifest(locate_manifest(dataset, manifests_dir), card)}
    except EchoshiftError:
        return {}  # a store can be explained without its manifest; its rows then say that they are not in one


def _read_last_run(store: FeatureStore) -> str:
    lines = (locate(store.path).beside(".runs.jsonl").read_text() or "").splitlines()
    try:
        return str(json.loads(lines[-1]).get("when", "")) if lines else ""
    except json.JSONDecodeError:
        return ""
