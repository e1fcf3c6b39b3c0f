"""Says why a row of a store is done, stale, failed or pending."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.media_survey import MediaSurvey, identify_segments
from pipeline.cards import read_dataset_card
from pipeline.errors import StoreError
from pipeline.manifest_csv import read_manifest
from pipeline.rows import NO_MEDIA, compute_digest
from pipeline.segments import Segment
from pipeline.store.interface import FeatureStore
from pipeline.store.layout import DONE, FAILED
from pipeline.store.ledger import read_failures
from pipeline.store.reading import index_segments


def explain_segment(store: FeatureStore, segment_id: str, manifests_dir: Path, media_root: Path) -> list[str]:
    """Explains one row in a few lines; raises StoreError when neither store nor manifest knows the segment."""
    card = read_dataset_card(str(store.attributes["dataset"]), manifests_dir)
    manifest = read_manifest(manifests_dir / f"{card.name}.csv", card)
    segment = next((s for s in manifest if s.segment_id == segment_id), None)
    row = index_segments(store).get(segment_id)
    if row is None:
        if segment is None:
            raise StoreError(f"no segment {segment_id} in {store.path}, nor in the manifest of {card.name}")
        return [f"segment {segment_id} is in the manifest but not yet in {store.path}: run `echoshift extract`"]
    state = int(store.read_array("state", row, row + 1)[0])
    lines = [f"segment {segment_id} is row {row} of {store.path}"]
    if segment is not None:
        lines.append(f"manifest: {segment.video_id}, {segment.start_s} s to {segment.stop_s} s")
    else:
        lines.append("manifest: the segment is no longer in it; the row stays until its shard is computed again")
    lines += _explain_state(store, row, state, segment_id)
    if segment is not None and state in (DONE, FAILED):
        lines.append(_compare_digest(store, row, segment, MediaSurvey(media_root, card.media)))
    return lines


def _explain_state(store: FeatureStore, row: int, state: int, segment_id: str) -> list[str]:
    if state == FAILED:
        failure = read_failures(store.path).get(segment_id)
        if failure is None:
            return ["failed: the failure ledger has no line for it; run `echoshift extract --retry-failed`"]
        retry = "a retry can help: --retry-failed" if failure.retryable else "trying again won't help"
        return [f"failed: {failure.exception}: {failure.reason} ({retry})"]
    if state != DONE:
        return ["pending: not computed yet, or a run was killed while its shard was under way; run `echoshift extract`"]
    n_valid = int(store.read_array("n_valid", row, row + 1)[0])
    times = store.read_array("times", row, row + 1)[0, :n_valid]
    spans = ", ".join(f"{start:.3f}-{stop:.3f} s" for start, stop in times.tolist()[:10])
    lines = [f"done: {n_valid} clips: {spans}{' …' if n_valid > 10 else ''}"]
    if store.spec.audio is not None:
        loudness = float(store.read_array("loudness_dbfs", row, row + 1)[0])
        heard = bool(store.read_array("has_audio", row, row + 1)[0])
        lines.append(f"sound: {loudness:.1f} dBFS" if heard else "sound: none; its features are NaN")
    return lines


def _compare_digest(store: FeatureStore, row: int, segment: Segment, survey: MediaSurvey) -> str:
    imported = store.spec.imported is not None  # then the source's content stands for the media's
    identity = store.spec.weights if imported else identify_segments(survey, [segment], store.spec)[segment.segment_id]
    expected = np.frombuffer(compute_digest(identity, segment.start_s, segment.stop_s), dtype=np.uint8)
    if (store.read_array("digest", row, row + 1)[0] == expected).all():
        return "up to date: video and times are those the row was made from"
    if identity == NO_MEDIA:
        return f"stale: the row was made from media that are no longer below {survey.root}"
    return "stale: the video's content or the segment's times have changed since; the next extract computes it anew"
