"""Extracts features the way peers do, one clip at a time: what benchmarks.extraction_speed compares the pipeline with.

It runs in a process of its own, so that none of the pipeline's settings reach it. Its first argument is a JSON file of
what `describe_plain_loop` gives; each line of standard input names an encoder, for which all segments are extracted,
and the seconds it took come back on standard output. The network is loaded before, untimed, as the pipeline's is.

For each clip: open the file, seek, decode forward to the clip's pictures, each to an RGB array, each resized by PIL
(bilinear), cropped and normalised on the CPU, one clip a forward pass of the plain float32 network, one file a segment.
A picture that is in a clip twice is decoded and resized once. Sound: the file's whole track is decoded and resampled by
FFmpeg, its spectrogram taken by scipy. Torch's own settings are left as they are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import scipy.signal
import torch
from PIL import Image
from torch import Tensor

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.weights.load import load_encoder, resolve_weights
from echoshift.pipeline.specs import AudioSpec, FeatureSpec, FrameSpec


def describe_plain_loop(spec: FeatureSpec, weights: str, segments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe one encoder's loop; segments have id, path, start_s, stop_s and clips, times [n, T] (sound: [[]])."""
    return {"spec": spec.model_dump_json(), "weights": weights, "segments": list(segments)}


def decode_clip(path: str, times_s: Sequence[float], frame: FrameSpec) -> Tensor:
    """Decode the pictures shown at ascending times, and prepare them: float32 [C, T, crop, crop]."""
    prepared: list[np.ndarray] = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        assert stream.time_base is not None
        container.seek(int(times_s[0] / stream.time_base), stream=stream)
        shown, shown_prepared = None, None
        for picture in container.decode(stream):
            while shown is not None and len(prepared) < len(times_s) and times_s[len(prepared)] < picture.time - 1e-4:
                if shown_prepared is None:
                    shown_prepared = prepare_picture(shown.to_ndarray(format="rgb24"), frame)
                prepared.append(shown_prepared)
            if len(prepared) == len(times_s):
                break
            shown, shown_prepared = picture, None
        while len(prepared) < len(times_s):
            assert shown is not None, f"{path} has no picture at {times_s[0]} s"
            prepared.append(prepare_picture(shown.to_ndarray(format="rgb24"), frame))
    return torch.from_numpy(np.stack(prepared, axis=1))


def prepare_picture(picture: np.ndarray, frame: FrameSpec) -> np.ndarray:
    """Resize, crops and normalises one picture: float32 [C, crop, crop]."""
    height, width = picture.shape[:2]
    short, side = min(height, width), frame.short_side
    size = (side * width // short, side * height // short)
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    left, top = (size[0] - frame.crop) // 2, (size[1] - frame.crop) // 2
    cut = resized[top : top + frame.crop, left : left + frame.crop].astype(np.float32)
    return ((cut - np.float32(frame.mean)) / np.float32(frame.std)).transpose(2, 0, 1)


def read_spectrogram(path: str, start_s: float, stop_s: float, audio: AudioSpec) -> Tensor:
    """Read a segment's sound out of the whole track and take its log spectrogram, float32 [1, F, N]."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=audio.rate_hz)
    with av.open(path) as container:
        blocks = [r.to_ndarray()[0] for f in container.decode(audio=0) for r in resampler.resample(f)]
    blocks += [r.to_ndarray()[0] for r in resampler.resample(None)]
    samples = np.concatenate(blocks)[round(start_s * audio.rate_hz) : round(stop_s * audio.rate_hz)]
    samples = np.tile(samples, -(-audio.n_samples // len(samples)))[: audio.n_samples].clip(-1, 1)
    n_overlap = audio.n_window - audio.n_hop
    _, _, power = scipy.signal.spectrogram(samples, audio.rate_hz, nperseg=audio.n_window, noverlap=n_overlap)
    log_power = np.log(power + audio.log_floor)
    standardised = (log_power - log_power.mean()) / (log_power.std() + 1e-9)
    return torch.from_numpy(standardised.astype(np.float32))[None]


def extract_plainly(
    network: EncoderNetwork, spec: FeatureSpec, segments: Sequence[dict[str, Any]], device: torch.device, folder: Path
) -> None:
    """Extract `pooled` of every segment into a file of its own, float32 [n_clips, D]."""
    for segment in segments:
        features = []
        for times_s in segment["clips"]:
            if spec.audio is not None:
                clip = read_spectrogram(segment["path"], segment["start_s"], segment["stop_s"], spec.audio)
            else:
                assert spec.frame is not None, "an encoder sees pictures or hears sound"
                clip = decode_clip(segment["path"], times_s, spec.frame)
            with torch.no_grad():
                features.append(network(clip[None].to(device), ["pooled"])["pooled"][0].cpu().numpy())
        np.save(folder / f"{segment['id']}.npy", np.stack(features))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(job["device"])
    loops = {}
    for name, loop in job["encoders"].items():
        spec = FeatureSpec.model_validate_json(loop["spec"])
        network = load_encoder(name, resolve_weights(loop["weights"], name), device)
        loops[name] = (network, spec, loop["segments"])
        (Path(job["folder"]) / name).mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        started = time.perf_counter()
        extract_plainly(*loops[name], device, Path(job["folder"]) / name)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
