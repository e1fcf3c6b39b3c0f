"""Draws the frames of a planned demo video."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from echoshift.extract.demo.planning import FRAME_RATE_HZ, HEIGHT, PROP_COLOURS, WIDTH, Motion, Shot, VideoPlan, World

Floats = npt.NDArray[np.float32]

MARGIN = 6
"""Pixels of backdrop around the frame, for the camera to shake in."""


def draw_video(plan: VideoPlan) -> Iterator[npt.NDArray[np.uint8]]:
    """Draw a video shot by shot, uint8 [T, HEIGHT, WIDTH, 3]; the same plan gives the same frames."""
    rng = np.random.default_rng([*plan.seed, 0])
    backdrop = _draw_backdrop(plan.world, rng)
    times_s = np.arange(plan.n_frames) / FRAME_RATE_HZ
    for shot in plan.shots:
        shown = times_s[(times_s >= shot.cut_from_s) & (times_s < shot.cut_until_s)]
        yield _draw_shot(shot, plan.world, backdrop, shown, rng)


def trace_motion(activity: str, motion: Motion, elapsed_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute where the actor is: x and y in pixels, size as a factor, angle in radians, float64 [4, T]."""
    cycles = motion.rate_hz * elapsed_s + motion.phase
    turn = 2 * np.pi * cycles * motion.direction
    still = np.zeros_like(elapsed_s)
    x, y, size, angle = still, still, still + 1, still
    if activity == "circle":
        x, y = motion.amplitude_px * np.cos(turn), motion.amplitude_px * np.sin(turn)
    elif activity == "bounce":
        y = motion.amplitude_px * (1 - 2 * np.abs(np.sin(np.pi * cycles)))
    elif activity == "slide":
        x = 1.3 * motion.amplitude_px * np.cos(turn)
    elif activity == "pulse":
        size = 1 - 0.5 * np.cos(turn)
    elif activity == "zigzag":
        x = 1.4 * motion.amplitude_px * _triangle_wave(cycles / 2)
        y = 0.7 * motion.amplitude_px * _triangle_wave(1.5 * cycles)
    elif activity == "spin":
        angle = turn
    wandering = 2 * np.pi * (0.3 * elapsed_s + motion.drift_phase)
    x = motion.centre_x_px + x + 2 * np.cos(wandering)
    y = motion.centre_y_px + y + 2 * np.sin(1.3 * wandering)
    return np.stack([x, y, size, angle + motion.tilt + 0.2 * np.sin(wandering)])


def _triangle_wave(cycles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 4 * np.abs(cycles % 1 - 0.5) - 1


def _draw_shot(
    shot: Shot, world: World, backdrop: Floats, times_s: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    n_frames = len(times_s)
    setting = backdrop.copy()
    _paint(setting, _shape_prop(shot), np.array(PROP_COLOURS[shot.prop], dtype=np.float32))
    shake_px = _smooth_walk(n_frames, world.jitter_px, rng)
    sway_px = np.rint(world.sway_px * np.sin(2 * np.pi * 0.5 * times_s)).astype(int)
    tops = np.clip(MARGIN + shake_px[0], 0, 2 * MARGIN)
    lefts = np.clip(MARGIN + shake_px[1] + sway_px, 0, 2 * MARGIN)
    rows = tops[:, None] + np.arange(HEIGHT)
    columns = lefts[:, None] + np.arange(WIDTH)
    frames = setting[rows[:, :, None], columns[:, None, :]]

    # The actor rests in its first and last pose outside the action.
    elapsed_s = np.clip(times_s, shot.start_s, shot.stop_s) - shot.start_s
    x, y, size, angle = trace_motion(shot.activity, shot.motion, elapsed_s).astype(np.float32)
    body, mark = _shape_actor(world, x - shake_px[1], y - shake_px[0], size * np.float32(shot.motion.radius_px), angle)
    _paint(frames, body, np.array(world.actor_colours[shot.i_colour], dtype=np.float32))
    _paint(frames, mark, np.array(world.mark_colour, dtype=np.float32))
    return _film(frames, world, rng)


def _smooth_walk(n_frames: int, step_px: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw a shaking that returns to the middle, whole pixels, int64 [2, n_frames]."""
    steps = rng.normal(0, step_px, (2, n_frames)) if step_px else np.zeros((2, n_frames))
    place = np.zeros(2)
    places = np.empty((2, n_frames))
    for i in range(n_frames):
        place = 0.8 * place + steps[:, i]
        places[:, i] = place
    return np.rint(places).astype(np.int64)


def _paint(frames: Floats, cover: Floats, colour: Floats) -> None:
    """Lay a colour over frames [..., H, W, 3] in place where `cover` [..., H, W] is 1."""
    frames += cover[..., None] * (colour - frames)


def _shape_actor(world: World, x: Floats, y: Floats, radius: Floats, angle: Floats) -> tuple[Floats, Floats]:
    """Compute how much of each pixel the actor and the mark on it cover, float32 [T, H, W] each."""
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    dx = np.arange(WIDTH, dtype=np.float32)[None, None, :] - x[:, None, None]
    dy = np.arange(HEIGHT, dtype=np.float32)[None, :, None] - y[:, None, None]
    along, across = cos * dx + sin * dy, cos * dy - sin * dx
    r = radius[:, None, None]
    if world.actor == "disc":
        outside = np.hypot(along, across) - r
    elif world.actor == "square":
        outside = np.maximum(np.abs(along), np.abs(across)) - 0.9 * r
    else:
        outside = np.maximum(-along, 0.5 * along + 0.866 * np.abs(across)) - 0.65 * r
    body = np.clip(0.5 - outside, 0, 1)
    bar = np.maximum(np.abs(across) - 0.2 * r, -along)
    return body, body * np.clip(0.5 - bar, 0, 1)


def _shape_prop(shot: Shot) -> Floats:
    """Compute how much of each pixel of the backdrop the shot's prop covers, float32 [H + 2 m, W + 2 m]."""
    dx = np.arange(WIDTH + 2 * MARGIN, dtype=np.float32)[None, :] - np.float32(shot.prop_x_px + MARGIN)
    dy = np.arange(HEIGHT + 2 * MARGIN, dtype=np.float32)[:, None] - np.float32(shot.prop_y_px + MARGIN)
    wide, high = np.abs(dx), np.abs(dy)
    if shot.prop == "lamp":
        outside = np.minimum(np.hypot(dx, dy + 4) - 8, np.maximum(wide - 1.5, high - 12))
    elif shot.prop == "crate":
        outside = np.maximum(wide, high) - 10
    elif shot.prop == "ladder":
        rungs = np.abs((dy + 2.5) % 5 - 2.5) - 1
        outside = np.maximum(np.minimum(np.abs(wide - 7) - 1.5, rungs), np.maximum(wide - 8, high - 13))
    elif shot.prop == "barrel":
        outside = np.hypot(dx, 0.7 * dy) - 9
    elif shot.prop == "plant":
        outside = np.minimum(np.hypot(wide - 5, dy + 4) - 5.5, np.maximum(wide - 2, np.abs(dy - 5) - 8))
    else:
        cloth = np.maximum(np.abs(dx - 4) - 9, np.abs(dy + 6) - 6)
        outside = np.minimum(cloth, np.maximum(np.abs(dx + 6) - 1.5, high - 13))
    return np.clip(0.5 - outside, 0, 1).astype(np.float32)


def _draw_backdrop(world: World, rng: np.random.Generator) -> Floats:
    """Draw a domain's backdrop with a margin around it, float32 [H + 2 m, W + 2 m, 3]."""
    height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    rows, columns = np.mgrid[:height, :width]
    if world.backdrop == "gradient":
        tilt = rng.uniform(-0.3, 0.3)
        blend = rows / height + tilt * (columns / width - 0.5)
    elif world.backdrop == "planks":
        plank = int(rng.integers(9, 14))
        blend = rng.random(width // plank + 2)[columns // plank] * 0.7 + 0.3 * (columns % plank == 0)
        blend = blend + 0.1 * np.sin(rows / 3 + 7 * (columns // plank))
    else:
        blend = np.zeros((height, width))
        for n_cells in (5, 11, 23):
            cells = rng.random((n_cells, n_cells))
            blend += cells[rows * n_cells // height, columns * n_cells // width] / 3
    first, second = (np.array(tone, dtype=np.float32) for tone in world.backdrop_tone)
    cover = np.clip(blend, 0, 1).astype(np.float32)[..., None]
    return first + cover * (second - first)


def _film(frames: Floats, world: World, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Turn painted frames into what the domain's camera records."""
    quarter = np.float32(0.25)
    for _ in range(world.n_blurs):
        padded = np.pad(frames, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
        frames = quarter * (padded[:, :-2] + padded[:, 1:-1] + padded[:, 1:-1] + padded[:, 2:])
        padded = np.pad(frames, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
        frames = quarter * (padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 1:-1] + padded[:, :, 2:])
    grain = rng.standard_normal(frames.shape[:3], dtype=np.float32) * np.float32(world.noise)
    frames = (frames - 128) * np.float32(world.contrast) + np.float32(128 + world.brightness) + grain[..., None]
    recorded = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(recorded[:, :, ::-1]) if world.mirrored else recorded
