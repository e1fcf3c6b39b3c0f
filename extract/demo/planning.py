"""The demo data set as planned: its three domains, which video holds which segments, and what happens in each.

Nothing is drawn or heard here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.segments import Segment

Colour = tuple[float, float, float]
Timbre = Literal["harmonic", "fm", "noise", "pluck"]

HEIGHT, WIDTH = 72, 96
FRAME_RATE_HZ = 15
SAMPLE_RATE_HZ = 22050

ACTIVITIES = ("circle", "bounce", "slide", "pulse", "zigzag", "spin")
"""What the actor does; each is a motion, no single frame shows it."""

TIMBRES: dict[str, tuple[Timbre, ...]] = {
    "circle": ("harmonic", "fm", "noise"),
    "bounce": ("pluck", "noise", "harmonic"),
    "pulse": ("fm", "harmonic", "noise"),
    "zigzag": ("pluck", "fm", "noise"),
}
"""The interactions of an audible activity: the same rhythm and register on different things."""

SILENT_ACTIVITIES = tuple(activity for activity in ACTIVITIES if activity not in TIMBRES)

PITCHES_HZ = {"circle": (220, 330), "bounce": (90, 140), "pulse": (600, 900), "zigzag": (1800, 2600)}

PROPS = ("lamp", "crate", "ladder", "barrel", "plant", "flag")
"""Things in the background; in each domain most frames of an activity show that domain's prop for it."""

PROP_COLOURS: dict[str, Colour] = {
    "lamp": (250, 235, 120),
    "crate": (150, 90, 40),
    "ladder": (120, 60, 150),
    "barrel": (40, 80, 190),
    "plant": (30, 150, 60),
    "flag": (210, 40, 60),
}

PROP_BIAS = 0.75
"""How often an activity has its domain's prop; the others get any prop."""

TIMBRE_SHARES = (0.6, 0.3, 0.1)
"""How the interactions of an activity are distributed; which is the common one changes with the domain."""


@dataclass(frozen=True, slots=True)
class World:
    """One domain.

    Attributes:
        class_shares: how frequent each activity is, in the order of ACTIVITIES.
        n_prop_shift: activity i goes with prop (i + n_prop_shift) modulo 6.
        backdrop, backdrop_tone: the backdrop's pattern and its two colours, 0..255.
        actor: the actor's shape; actor_colours: those it comes in; mark_colour: of the bar on it.
        contrast, brightness: applied to the finished frame, around 128.
        n_blurs: how many times the frame is smoothed; noise: its standard deviation; jitter_px: of the camera.
        sway_px: how far the backdrop moves to and fro; mirrored: whether the frame is flipped.
        tempo: factor on the speed of every motion.
        room: the room tone's kind; room_dbfs: its level; gain_db: of the activities' sounds; echo: of them, 0..1;
            cutoff_hz: above it the activities' sounds are muffled.
    """

    name: str
    class_shares: tuple[float, ...]
    n_prop_shift: int
    backdrop: Literal["gradient", "planks", "foliage"]
    backdrop_tone: tuple[Colour, Colour]
    actor: Literal["disc", "square", "triangle"]
    actor_colours: tuple[Colour, ...]
    mark_colour: Colour
    contrast: float
    brightness: float
    n_blurs: int
    noise: float
    jitter_px: float
    sway_px: float
    mirrored: bool
    tempo: float
    room: Literal["quiet", "hum", "wind"]
    room_dbfs: float
    gain_db: float
    echo: float
    cutoff_hz: float


WORLDS = (
    World(
        name="studio",
        class_shares=(0.30, 0.22, 0.18, 0.14, 0.10, 0.06),
        n_prop_shift=0,
        backdrop="gradient",
        backdrop_tone=((225, 228, 235), (180, 186, 200)),
        actor="disc",
        actor_colours=((220, 60, 40), (235, 130, 30), (200, 40, 110)),
        mark_colour=(250, 250, 250),
        contrast=1.0,
        brightness=0,
        n_blurs=0,
        noise=2,
        jitter_px=0,
        sway_px=0,
        mirrored=False,
        tempo=1.0,
        room="quiet",
        room_dbfs=-56,
        gain_db=0,
        echo=0,
        cutoff_hz=11000,
    ),
    World(
        name="workshop",
        class_shares=(0.08, 0.12, 0.28, 0.08, 0.26, 0.18),
        n_prop_shift=2,
        backdrop="planks",
        backdrop_tone=((96, 66, 44), (58, 40, 30)),
        actor="square",
        actor_colours=((90, 150, 190), (120, 190, 180), (150, 160, 210)),
        mark_colour=(20, 20, 30),
        contrast=0.65,
        brightness=-20,
        n_blurs=1,
        noise=6,
        jitter_px=0.7,
        sway_px=0,
        mirrored=False,
        tempo=1.25,
        room="hum",
        room_dbfs=-46,
        gain_db=-3,
        echo=0.4,
        cutoff_hz=8000,
    ),
    World(
        name="garden",
        class_shares=(0.14, 0.08, 0.08, 0.30, 0.12, 0.28),
        n_prop_shift=4,
        backdrop="foliage",
        backdrop_tone=((70, 130, 60), (150, 190, 90)),
        actor="triangle",
        actor_colours=((240, 220, 70), (230, 120, 220), (250, 250, 240)),
        mark_colour=(60, 20, 80),
        contrast=0.8,
        brightness=15,
        n_blurs=2,
        noise=3,
        jitter_px=0.4,
        sway_px=1.5,
        mirrored=True,
        tempo=0.8,
        room="wind",
        room_dbfs=-48,
        gain_db=-6,
        echo=0.1,
        cutoff_hz=4000,
    ),
)

SPLITS = ("train", "test")
N_SEGMENTS_A_VIDEO = 15
N_WITHOUT_TRACK = 4
OVERLAP_SHARE = 0.1
OVERLAP_S = 0.1


@dataclass(frozen=True, slots=True)
class Motion:
    """How one action moves: cycles a second, phase in cycles, pixels, radians; drift is a slow wandering."""

    rate_hz: float
    phase: float
    direction: int
    amplitude_px: float
    centre_x_px: float
    centre_y_px: float
    radius_px: float
    tilt: float
    drift_phase: float


@dataclass(frozen=True, slots=True)
class Shot:
    """One action of a video with its setting.

    The action moves and sounds in [start_s, stop_s); the segment is [label_start_s, label_stop_s), which is the same
    but where two annotations overlap by OVERLAP_S; the camera shows this setting in [cut_from_s, cut_until_s).
    `timbre` is None for a silent activity, `pitch` is a place in 0..1 of its range.
    """

    activity: str
    start_s: float
    stop_s: float
    label_start_s: float
    label_stop_s: float
    cut_from_s: float
    cut_until_s: float
    motion: Motion
    i_colour: int
    prop: str
    prop_x_px: float
    prop_y_px: float
    timbre: Timbre | None
    pitch: float
    level_db: float


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """One video file to be made: `n_frames` frames, its shots in time order, and the seed of what is random."""

    video_id: str
    world: World
    split: str
    n_frames: int
    has_track: bool
    shots: tuple[Shot, ...]
    seed: tuple[int, ...]

    @property
    def duration_s(self) -> float:
        """The length in seconds, of frames and audio alike."""
        return self.n_frames / FRAME_RATE_HZ


def plan_demo(seed: int = 0, n_train: int = 120, n_test: int = 60) -> tuple[VideoPlan, ...]:
    """Plan every video of the demo; n_train and n_test are segments a domain, at least one an activity."""
    if min(n_train, n_test) < len(ACTIVITIES) or seed < 0:
        raise ManifestError(
            f"the demo needs at least {len(ACTIVITIES)} segments a split and a seed >= 0, "
            f"was asked for {n_train} train, {n_test} test, seed {seed}"
        )
    plans: list[VideoPlan] = []
    for i_world, world in enumerate(WORLDS):
        for i_split, (split, n) in enumerate(zip(SPLITS, (n_train, n_test), strict=True)):
            rng = np.random.default_rng([seed, i_world, i_split])
            activities = [a for a, k in zip(ACTIVITIES, count_activities(world, n), strict=True) for _ in range(k)]
            rng.shuffle(activities)
            without_track = world.name == "garden" and split == "test" and n > 2 * N_WITHOUT_TRACK
            sizes = _plan_video_sizes(n, without_track, rng)
            for i_video, size in enumerate(sizes):
                shots, end_s = _plan_shots(world, i_world, activities[:size], rng)
                del activities[:size]
                plans.append(
                    VideoPlan(
                        video_id=f"{world.name}-{split}-{i_video:02d}",
                        world=world,
                        split=split,
                        n_frames=int(np.ceil(end_s * FRAME_RATE_HZ)),
                        has_track=not (without_track and i_video == len(sizes) - 1),
                        shots=tuple(shots),
                        seed=(seed, i_world, i_split, i_video),
                    )
                )
    return tuple(plans)


def plan_segments(plan: VideoPlan) -> list[Segment]:
    """List the segments of one planned video; `noun` is the prop, the tags say timbre, overlap and missing track."""
    segments = []
    for i, shot in enumerate(plan.shots):
        tags = [f"timbre-{shot.timbre}"] if shot.timbre else []
        if (shot.label_start_s, shot.label_stop_s) != (shot.start_s, shot.stop_s):
            tags.append("overlap")
        if not plan.has_track:
            tags.append("no-track")
        segments.append(
            Segment(
                segment_id=f"{plan.video_id}-{i:02d}",
                video_id=plan.video_id,
                start_s=shot.label_start_s,
                stop_s=shot.label_stop_s,
                labels=(shot.activity,),
                domain=plan.world.name,
                split=plan.split,
                noun=shot.prop,
                tags=tuple(sorted(tags)),
            )
        )
    return segments


def count_activities(world: World, n: int) -> list[int]:
    """Compute how many of n segments show each activity: one each, the rest by the world's shares (largest rest)."""
    quotas = np.array(world.class_shares) * (n - len(ACTIVITIES))
    counts = np.floor(quotas + 1e-9).astype(int)
    by_rest = np.argsort(-(quotas - counts), kind="stable")
    counts[by_rest[: n - len(ACTIVITIES) - counts.sum()]] += 1
    return [1 + int(k) for k in counts]


def _plan_video_sizes(n: int, without_track: bool, rng: np.random.Generator) -> list[int]:
    n_sounding = n - (N_WITHOUT_TRACK if without_track else 0)
    n_videos = max(1, round(n_sounding / N_SEGMENTS_A_VIDEO))
    sizes = [len(part) for part in np.array_split(np.arange(n_sounding), n_videos)]
    for i in range(0, n_videos - 1, 2):
        n_moved = min(int(rng.integers(0, 4)), sizes[i] - 1)
        sizes[i] -= n_moved
        sizes[i + 1] += n_moved
    return sizes + ([N_WITHOUT_TRACK] if without_track else [])


def _plan_shots(
    world: World, i_world: int, activities: list[str], rng: np.random.Generator
) -> tuple[list[Shot], float]:
    """Plan a video's shots and when it ends; a tenth of the annotated neighbours overlap, never two pairs in a row."""
    n = len(activities)
    gaps_s = rng.uniform(0.2, 1.0, n + 1).round(3)
    lengths_s = rng.uniform(1.0, 1.75, n).round(3)
    overlaps = np.zeros(n + 1, dtype=bool)
    for i in range(1, n):
        overlaps[i] = not overlaps[i - 1] and rng.random() < OVERLAP_SHARE
    gaps_s[overlaps] = 0.2
    starts_s = np.cumsum(gaps_s[:-1]) + np.concatenate([[0], np.cumsum(lengths_s[:-1])])
    stops_s = starts_s + lengths_s
    end_s = float(stops_s[-1] + gaps_s[-1])
    cuts_s = [0.0, *((stops_s[:-1] + starts_s[1:]) / 2), end_s + 1 / FRAME_RATE_HZ]
    shots = []
    for i, activity in enumerate(activities):
        early_s, late_s = ((gaps_s[i + k] + OVERLAP_S) / 2 if overlaps[i + k] else 0.0 for k in (0, 1))
        shots.append(
            Shot(
                activity=activity,
                start_s=round(float(starts_s[i]), 3),
                stop_s=round(float(stops_s[i]), 3),
                label_start_s=round(float(starts_s[i] - early_s), 3),
                label_stop_s=round(float(stops_s[i] + late_s), 3),
                cut_from_s=float(cuts_s[i]),
                cut_until_s=float(cuts_s[i + 1]),
                motion=_plan_motion(world, rng),
                i_colour=int(rng.integers(len(world.actor_colours))),
                prop=_plan_prop(world, activity, rng),
                prop_x_px=float(rng.uniform(12, WIDTH - 12)),
                prop_y_px=float(rng.choice([14, HEIGHT - 14]) + rng.uniform(-3, 3)),
                timbre=_plan_timbre(i_world, activity, rng),
                pitch=float(rng.random()),
                level_db=float(rng.uniform(-4, 4)),
            )
        )
    return shots, end_s


def _plan_motion(world: World, rng: np.random.Generator) -> Motion:
    return Motion(
        rate_hz=float(rng.uniform(1.2, 1.8)) * world.tempo,
        phase=float(rng.random()),
        direction=int(rng.choice([-1, 1])),
        amplitude_px=float(rng.uniform(13, 18)),
        centre_x_px=WIDTH / 2 + float(rng.uniform(-10, 10)),
        centre_y_px=HEIGHT / 2 + float(rng.uniform(-6, 6)),
        radius_px=float(rng.uniform(8, 11)),
        tilt=float(rng.uniform(0, 2 * np.pi)),
        drift_phase=float(rng.random()),
    )


def _plan_prop(world: World, activity: str, rng: np.random.Generator) -> str:
    own = PROPS[(ACTIVITIES.index(activity) + world.n_prop_shift) % len(PROPS)]
    other = PROPS[int(rng.integers(len(PROPS)))]
    return own if rng.random() < PROP_BIAS else other


def _plan_timbre(i_world: int, activity: str, rng: np.random.Generator) -> Timbre | None:
    i = (int(rng.choice(len(TIMBRE_SHARES), p=TIMBRE_SHARES)) + i_world) % len(TIMBRE_SHARES)
    return TIMBRES[activity][i] if activity in TIMBRES else None
