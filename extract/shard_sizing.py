"""Chooses how many rows the shards of a run's new stores have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoshift.extract.media_survey import MediaSurvey, count_clips_at_most
from echoshift.pipeline.store.layout import plan_rows_per_shard
from echoshift.pipeline.store.open import has_store, name_store, open_store

if TYPE_CHECKING:
    from echoshift.extract.extraction import ExtractionRequest

# A shard is the most that a kill costs, and on a CPU each of its rows takes seconds.
MAX_ROWS_PER_SHARD_ON_CPU = 64


def choose_rows_per_shard(request: ExtractionRequest, survey: MediaSurvey) -> int:
    """Choose the rows a shard: what the request says, else those of its stores that are there already.

    Stores of one run share each decode only where their shards are the same. Where there is no store yet, it is what
    the one with the smallest rows wants; on a CPU at most MAX_ROWS_PER_SHARD_ON_CPU.
    """
    from echoshift.pipeline.devices import resolve_device

    if request.n_rows_per_shard is not None:
        return request.n_rows_per_shard
    wanted = 1
    segments = request.manifest.segments
    for spec, _ in request.encoders:
        path = name_store(request.cache_dir, request.card.name, spec, request.backend)
        if has_store(path):
            return open_store(path).layout.n_rows_per_shard
        wanted = max(wanted, plan_rows_per_shard(spec, len(segments), count_clips_at_most(survey, segments, spec)))
    on_cpu = resolve_device(request.options.device).type == "cpu"
    return min(wanted, MAX_ROWS_PER_SHARD_ON_CPU) if on_cpu else wanted
