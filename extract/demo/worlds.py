"""The demo's activities and its three domains: how each looks, sounds, and what misleads in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Colour = tuple[float, float, float]
Timbre = Literal["harmonic", "fm", "noise", "pluck"]

HEIGHT, WIDTH = 72, 96
FRAME_RATE_HZ = 15
SAMPLE_RATE_HZ = 22050

ACTIVITIES = ("circle", "bounce", "slide", "pulse", "zigzag", "spin")
"""What the actor does; each is a motion, no single picture shows it."""

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
"""Things in the background; in each domain most pictures of an activity show that domain's prop for it."""

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
        contrast, brightness: applied to the finished picture, around 128.
        n_blurs: how many times the picture is smoothed; noise: its standard deviation; jitter_px: of the camera.
        sway_px: how far the backdrop moves to and fro; mirrored: whether the picture is flipped.
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
