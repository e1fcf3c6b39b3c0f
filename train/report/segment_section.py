"""Makes the page's section on segments: pictures, sound, spectrogram, gate and predictions of a few of each split."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

from echoshift.train.data_places import DataPlaces
from echoshift.train.report.blocks import (
    Bar,
    Block,
    MissingBlock,
    Picture,
    ProbabilityLine,
    Section,
    SegmentCard,
    SegmentsBlock,
)
from echoshift.train.report.segment_choice import choose_segments
from echoshift.train.segment_view.reading import SegmentViews, ViewOptions
from echoshift.train.segment_view.view import SegmentGate, SegmentPrediction, SegmentView

MAX_PREDICTIONS = 8
N_FRAMES, N_CLASSES, N_CHANNELS = 4, 3, 3
_SPEAKERS = {
    "sound": "sound (p_a)",
    "pictures": "pictures (p_v)",
    "recogniser": "recogniser",
    "alignment": "alignment",
}


def make_segment_section(
    places: DataPlaces,
    runs_dir: Path,
    n_per_split: int,
    named: Sequence[str] = (),
    start: Callable[[int], None] = lambda n: None,
    advance: Callable[[], None] = lambda: None,
) -> Section:
    """Make the section; `start` is told how many segments are read, `advance` of each."""
    title = "Segments"
    chosen = choose_segments(places.manifest, n_per_split, named)
    if not chosen:
        command = f'make report DATASET={places.card.name} ARGS="--segments 2"'
        missing = MissingBlock("No segment was asked for.", command)
        return Section("segments", title, "", (missing,))
    start(len(chosen))
    cards = []
    with SegmentViews(places, runs_dir, ViewOptions(n_frames=N_FRAMES, n_top=N_CLASSES)) as views:
        for segment in chosen:
            cards.append(make_segment_card(views.read(segment.segment_id)))
            advance()
    lead = (
        f"{len(chosen)} of {len(places.manifest):,} segments: {n_per_split} of each domain's split, of different "
        f"classes where there are, chosen by a hash of their ids. `--segments N` shows more, `--segment ID` any one."
    )
    blocks: tuple[Block, ...] = (SegmentsBlock(tuple(cards)),)
    return Section("segments", title, lead, blocks)


def make_segment_card(view: SegmentView) -> SegmentCard:
    """Lay out what is known of one segment; what isn't there is the view's own sentence."""
    segment = view.segment
    spectrogram = None
    if view.spectrogram is not None:
        shown = view.spectrogram
        scale = "mel" if shown.is_mel else "linear"
        whose = f"as {shown.encoder} hears it" if shown.encoder else "by the recipe's own settings"
        span = f"{shown.start_s:.2f} to {shown.stop_s:.2f} s, up to {shown.top_hz / 1000:g} kHz ({scale})"
        caption = f"Log spectrogram, {span}, {whose}."
        alternative = f"Spectrogram of the sound of {segment.segment_id}"
        spectrogram = Picture(make_data_url("image/png", shown.png), alternative, caption)
    frames = tuple(
        Picture(
            make_data_url("image/jpeg", frame.jpeg),
            f"{segment.segment_id} at {frame.time_s:.2f} seconds",
            f"{frame.time_s:.2f} s",
        )
        for frame in view.frames
    )
    predictions = _choose_predictions(view.predictions)
    sentences = list(view.missing.values())
    if len(predictions) < len(view.predictions):
        sentences.append(
            f"{len(predictions)} of {len(view.predictions)} predictions are shown, one seed a variant; "
            f"`echoshift show {segment.segment_id}` shows all."
        )
    facts = f"{segment.domain}, {segment.split}, {segment.start_s:.2f} to {segment.stop_s:.2f} s of {segment.video_id}"
    return SegmentCard(
        segment_id=segment.segment_id,
        facts=facts,
        labels=segment.labels,
        frames=frames,
        spectrogram=spectrogram,
        sound_url="" if view.sound is None else make_data_url("audio/wav", view.sound.wav),
        gate=() if view.gate is None else _make_gate_bars(view.gate),
        gate_words="" if view.gate is None else _describe_gate(view.gate),
        predictions=tuple(
            ProbabilityLine(
                f"{_SPEAKERS[said.speaker]}, {said.run}",
                tuple((top.name, top.probability, top.is_true) for top in said.top),
            )
            for said in predictions
        ),
        sentences=tuple(sentences),
    )


def make_data_url(kind: str, data: bytes) -> str:
    """Make a data URL of bytes, such as those of an image."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _choose_predictions(predictions: Sequence[SegmentPrediction]) -> list[SegmentPrediction]:
    """Keep the first seed of each variant, and no more than MAX_PREDICTIONS."""
    first: dict[tuple[str, ...], SegmentPrediction] = {}
    for said in sorted(predictions, key=lambda said: said.seed):
        first.setdefault((said.stage, said.row, said.shift, said.speaker, said.selection), said)
    kept = {id(said) for said in first.values()}
    return [said for said in predictions if id(said) in kept][:MAX_PREDICTIONS]


def _make_gate_bars(gate: SegmentGate) -> tuple[Bar, ...]:
    """Make a bar a path: the mean of its channels' gates, the span one standard deviation to either side."""
    return tuple(
        Bar(
            group.name,
            100 * group.mean,
            100 * max(group.mean - group.spread, 0),
            100 * min(group.mean + group.spread, 1),
            f"{group.mean:.2f} ±{group.spread:.2f}",
        )
        for group in gate.groups
    )


def _describe_gate(gate: SegmentGate) -> str:
    hears = "" if gate.hears else " The segment is silent: this is the gate that all silent segments share."
    open_, closed = (
        "; ".join(
            f"{group.name} " + ", ".join(str(channel.number) for channel in getattr(group, side)[:N_CHANNELS])
            for group in gate.groups
        )
        for side in ("most_open", "most_closed")
    )
    return f"Gate by {gate.run}: most open channels {open_}; most closed {closed}.{hears}"
