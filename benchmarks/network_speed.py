"""Measures the inference form of the encoders against their plain fp32 forward, interleaved, on random clips.

Run as `python -m benchmarks.network_speed [--device auto] [--precision fp32] [--batch 1] [--repeats 7]`. The plain
forward runs as peers run it: one clip a pass, float32, glibc's own habits. The form runs `--batch` clips a pass in
`--precision`, and on a CPU keeps the memory it frees. Printed are medians in ms a clip, their ratio, and how far
`pooled` is from the plain one.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echoshift.extract.encoders.inference_form import DTYPES, choose_precision_hint, prepare_for_inference
from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.devices import keep_freed_memory, resolve_device

INPUTS = {"slowfast_r50": (3, 32, 256, 256), "i3d_rgb": (3, 32, 224, 224), "resnet18_audio": (1, 257, 1004)}


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One encoder's figures: ms a clip, cosine (the worst clip's) and largest difference relative to the largest."""

    encoder: str
    plain_ms: float
    form_ms: float
    cosine: float
    difference: float


def main() -> None:
    """Measure the encoders asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--encoders", nargs="+", choices=list(INPUTS), default=list(INPUTS))
    options = parser.parse_args()
    device = resolve_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"{device} ({name}), torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch}, ")
    print(f"{options.precision} (fastest here: {choose_precision_hint(device)}), medians of {options.repeats}\n")
    print("| encoder | plain fp32, batch 1, ms a clip | inference form, ms a clip | ratio | cosine | max rel. diff. |")
    print("|---|---|---|---|---|---|")
    for encoder in options.encoders:
        row = measure_encoder(encoder, device, options)
        figures = f"{row.plain_ms:.1f} | {row.form_ms:.1f} | {row.plain_ms / row.form_ms:.2f}"
        print(f"| {row.encoder} | {figures} | {row.cosine:.7f} | {row.difference:.1e} |", flush=True)
        gc.collect()


def measure_encoder(encoder: str, device: torch.device, options: argparse.Namespace) -> SpeedRow:
    """Measure one encoder with random weights and norms that do something."""
    torch.manual_seed(0)
    network = find_encoder(encoder).build().eval().requires_grad_(False)
    _randomise_norms(network)
    network = network.to(device)
    form = prepare_for_inference(network, device, options.precision)
    clips = torch.randn(options.batch, *INPUTS[encoder], device=device)

    def run_plain() -> Tensor:
        return torch.cat([network(clip[None], ["pooled"])["pooled"] for clip in clips])

    def run_form() -> Tensor:
        return form(clips, ["pooled"])["pooled"]

    with torch.inference_mode(), _plain_fp32():
        wanted, found = run_plain().double(), run_form().double()
        plain_s, form_s = [], []
        for _ in range(options.repeats):
            if device.type == "cpu":
                keep_freed_memory(False)
            plain_s.append(_time(run_plain, device))
            if device.type == "cpu":
                keep_freed_memory(True)
                run_form()  # the memory it keeps is there from the second pass on
            form_s.append(_time(run_form, device))
    return SpeedRow(
        encoder=encoder,
        plain_ms=1e3 * statistics.median(plain_s) / options.batch,
        form_ms=1e3 * statistics.median(form_s) / options.batch,
        cosine=float(torch.cosine_similarity(found, wanted).min()),
        difference=float((found - wanted).abs().max() / wanted.abs().max()),
    )


def _plain_fp32() -> torch.backends.ContextProp:
    # TF32 would make the plain forward something else than float32 on a GPU.
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False)


def _time(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _randomise_norms(network: EncoderNetwork) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


if __name__ == "__main__":
    main()
