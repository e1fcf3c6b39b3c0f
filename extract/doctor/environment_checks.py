"""Looks at what commands run on: Python, packages, torch, GPUs, cores and memory."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from echoshift.extract.doctor.findings import Finding

DISTRIBUTION = "echoshift"
FIRST_PYTHON, FIRST_UNTRIED_PYTHON = (3, 11), (3, 14)
GIB = 2**30
LEAST_MEMORY_GIB = 4.0


def check_python() -> Iterator[Finding]:
    """Look at the Python that runs: its version among those that were tried, and whether it is an environment."""
    version = platform.python_version()
    where = f"{version} at {sys.executable}"
    if not FIRST_PYTHON <= sys.version_info[:2] < FIRST_UNTRIED_PYTHON:
        yield Finding("fail", "python", where, "use 3.11 to 3.13: make setup PYTHON=python3.11")
    elif sys.prefix == sys.base_prefix:
        yield Finding("warn", "python", f"{where}, outside of any environment", "make setup makes .venv")
    else:
        yield Finding("ok", "python", where)


def check_packages() -> Iterator[Finding]:
    """Look at every package that echoshift needs: is it installed, in a version that was tried?"""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    n_fine = 0
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("fail", "packages", f"{requirement.name} isn't installed", "run make setup")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            n_fine += 1
        else:
            wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            message = f"{requirement.name} {version} was never tried; tried: {wanted}"
            yield Finding("warn", "packages", message, f"pip install '{requirement.name}{wanted}'")
    if n_fine == len(needed):
        yield Finding("ok", "packages", f"{n_fine} packages in the tried versions")


def check_torch() -> Iterator[Finding]:
    """Look at torch's build, and at each GPU: its memory, and whether it computes."""
    import torch

    cuda = torch.version.cuda
    build = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU'} build"
    has_nvidia = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available():
        yield Finding("ok", "torch", build)
    elif cuda is None and has_nvidia:
        remedy = "install a CUDA build of torch to use the GPU"
        yield Finding("warn", "torch", f"{build}, though this machine has an NVIDIA driver", remedy)
    elif cuda is not None and has_nvidia:
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; until then everything runs on the CPU"
        yield Finding("warn", "torch", f"{build}, but it finds no GPU", remedy)
    else:
        yield Finding("ok", "torch", f"{build}; no GPU here, so everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        yield _check_gpu(index)


def _check_gpu(index: int) -> Finding:
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        right = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        words = " ".join(str(error).split())
        return Finding("fail", "gpu", f"cuda:{index} {name}: {words}", "free it, or use --device cpu")
    memory = f"cuda:{index} {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not right:
        return Finding("fail", "gpu", f"{memory}; it computes wrongly", "use another GPU, or --device cpu")
    if free < total / 2:
        return Finding("warn", "gpu", memory, "another process has over half of it: see nvidia-smi")
    return Finding("ok", "gpu", memory)


def check_cores() -> Iterator[Finding]:
    """Look at the cores that this process may use, torch's threads, and memory."""
    import torch

    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = torch.get_num_threads()
    cores = f"{n_cores} of {os.cpu_count()} cores may be used; torch takes {n_threads} threads"
    if n_threads > n_cores:
        yield Finding("warn", "cores", cores, f"set OMP_NUM_THREADS={n_cores}: threads that wait for a core cost time")
    else:
        yield Finding("ok", "cores", cores)
    available = read_available_memory()
    if available is None:
        return
    memory = f"{available / GIB:.1f} GiB available"
    if available < LEAST_MEMORY_GIB * GIB:
        yield Finding("warn", "memory", memory, "use fewer --readers, a smaller --batch, and one worker")
    else:
        yield Finding("ok", "memory", memory)


def read_available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Read how many bytes of memory are available; None where Linux' file about it isn't there."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
