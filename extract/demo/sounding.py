"""Makes the audio track of a planned demo video: room tone, and what the audible activities sound like."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from echoshift.extract.demo.planning import PITCHES_HZ, SAMPLE_RATE_HZ, Shot, VideoPlan, World

Samples = npt.NDArray[np.float64]

ACTIVITY_DBFS = -20
ECHO_DELAY_S = 0.09
FADE_S = 0.01


def sound_video(plan: VideoPlan) -> npt.NDArray[np.float32]:
    """Make a video's mono track at SAMPLE_RATE_HZ, float32 [n] in +-1; the same plan gives the same samples."""
    rng = np.random.default_rng([*plan.seed, 1])
    n_samples = round(plan.duration_s * SAMPLE_RATE_HZ)
    track = _make_room_tone(plan.world, n_samples, rng)
    for shot in plan.shots:
        if shot.timbre is None:
            continue
        sound = _sound_shot(shot, plan.world, rng)
        start = round(shot.start_s * SAMPLE_RATE_HZ)
        for delay, gain in ((0, 1.0), (round(ECHO_DELAY_S * SAMPLE_RATE_HZ), plan.world.echo)):
            part = track[start + delay : start + delay + len(sound)]
            part += gain * sound[: len(part)]
    return np.clip(track, -1, 1).astype(np.float32)


def _sound_shot(shot: Shot, world: World, rng: np.random.Generator) -> Samples:
    """Make the sound of one action: a timbre shaped by the rhythm of the motion that makes it."""
    n_samples = round((shot.stop_s - shot.start_s) * SAMPLE_RATE_HZ)
    elapsed_s = np.arange(n_samples) / SAMPLE_RATE_HZ
    n_beats_a_cycle = 3 if shot.activity == "zigzag" else 1  # one at each turn, or one a cycle
    beat_rate_hz = n_beats_a_cycle * shot.motion.rate_hz
    place = (beat_rate_hz * elapsed_s + n_beats_a_cycle * shot.motion.phase) % 1
    since_beat_s = place / beat_rate_hz
    low_hz, high_hz = PITCHES_HZ[shot.activity]
    pitch_hz = low_hz * (high_hz / low_hz) ** shot.pitch
    sound = _make_timbre(shot, pitch_hz, elapsed_s, since_beat_s, rng)
    swell = 0.5 - 0.5 * np.cos(2 * np.pi * place)
    if shot.activity == "circle":
        sound *= 0.3 + 0.7 * swell
    elif shot.activity == "pulse":
        sound *= swell**2
    else:
        sound *= np.exp(-since_beat_s / (0.08 if shot.activity == "bounce" else 0.04))
    fade = np.minimum(1, np.minimum(elapsed_s, elapsed_s[::-1]) / FADE_S)
    sound = _muffle(sound * fade, world.cutoff_hz)
    return _set_level(sound, ACTIVITY_DBFS + world.gain_db + shot.level_db)


def _make_timbre(
    shot: Shot, pitch_hz: float, elapsed_s: Samples, since_beat_s: Samples, rng: np.random.Generator
) -> Samples:
    turn = 2 * np.pi * pitch_hz * elapsed_s
    if shot.timbre == "harmonic":
        return sum((np.sin(h * turn) / h for h in range(1, 7)), np.zeros_like(turn))
    if shot.timbre == "fm":
        return np.sin(turn + 2.5 * np.sin(1.41 * turn))
    if shot.timbre == "pluck":
        overtones = (np.sin(h * turn) / h * np.exp(-8 * h * since_beat_s) for h in range(1, 5))
        return sum(overtones, np.zeros_like(turn))
    spectrum = np.fft.rfft(rng.standard_normal(len(turn)))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(turn), 1 / SAMPLE_RATE_HZ), 1) / (1.2 * pitch_hz))
    return np.fft.irfft(spectrum * np.exp(-0.5 * (octaves / 0.3) ** 2), len(turn))


def _make_room_tone(world: World, n_samples: int, rng: np.random.Generator) -> Samples:
    """Make what is heard when nothing happens: noise that falls with frequency, and what the room adds to it."""
    frequencies_hz = np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE_HZ)
    slope = 1.0 if world.room == "wind" else 0.5
    spectrum = np.fft.rfft(rng.standard_normal(n_samples)) / np.maximum(frequencies_hz, 60) ** slope
    tone = _set_level(np.fft.irfft(spectrum, n_samples), 0)
    time_s = np.arange(n_samples) / SAMPLE_RATE_HZ
    if world.room == "hum":
        tone += sum(np.sin(2 * np.pi * 50 * h * time_s + h) / h for h in (1, 2, 4))
    elif world.room == "wind":
        tone *= 1 + 0.5 * np.sin(2 * np.pi * 0.2 * time_s + rng.uniform(0, 6))
        for start_s in rng.uniform(0, time_s[-1], int(time_s[-1] / 3)):
            chirp_s = np.clip((time_s - start_s) / 0.12, 0, 1)
            tone += 0.5 * np.sin(np.pi * chirp_s) * np.sin(2 * np.pi * (4200 + 500 * chirp_s) * time_s)
    return _set_level(tone, world.room_dbfs)


def _muffle(sound: Samples, cutoff_hz: float) -> Samples:
    frequencies_hz = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE_HZ)
    return np.fft.irfft(np.fft.rfft(sound) / np.sqrt(1 + (frequencies_hz / cutoff_hz) ** 4), len(sound))


def _set_level(sound: Samples, level_dbfs: float) -> Samples:
    return sound * (10 ** (level_dbfs / 20) / np.sqrt(np.mean(sound**2)))
