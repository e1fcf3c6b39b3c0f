"""Installs weights: fetches a published checkpoint, converts it once and keeps it in the user's cache."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from platformdirs import user_cache_dir

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.catalogue import find_catalogue_entry
from echoshift.extract.weights.fetch import Progress, compute_file_sha256, fetch_checkpoint
from echoshift.extract.weights.weights_files import InstalledWeights, write_weights
from echoshift.pipeline.tensor_files import tensor_sha256

WEIGHTS_VARIABLE = "ECHOSHIFT_WEIGHTS"


def find_weights_dir(weights_dir: Path | None = None) -> Path:
    """Find the folder of installed weights: the given one, else ECHOSHIFT_WEIGHTS, else the user's cache."""
    if weights_dir is not None:
        return weights_dir
    configured = os.environ.get(WEIGHTS_VARIABLE)
    return Path(configured) if configured else Path(user_cache_dir("echoshift")) / "weights"


def install_weights(
    name: str,
    from_file: Path | None = None,
    weights_dir: Path | None = None,
    progress: Progress | None = None,
) -> InstalledWeights:
    """Install weights of the catalogue, from their official source or from a file that the user has downloaded.

    The tensors are renamed into ours and must match the network one by one; what is kept is NAME.safetensors and
    NAME.json. Installing again replaces both. Raises WeightsError: unknown name, unreachable source, wrong checksum,
    unreadable file, tensors that don't match.
    """
    import torch

    from echoshift.extract.weights.checkpoint_formats import convert_tensors, read_checkpoint

    entry = find_catalogue_entry(name)
    folder = find_weights_dir(weights_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="echoshift-weights-") as scratch:
        path = fetch_checkpoint(entry, from_file, Path(scratch), progress)
        source_sha256 = compute_file_sha256(path)
        foreign = read_checkpoint(path, entry.format)
    with torch.random.fork_rng(devices=[]):
        network = find_encoder(entry.encoder).build()
    tensors = convert_tensors(foreign, entry.format, network.state_dict(), place=str(from_file or entry.source))
    network.load_state_dict(tensors, strict=True)
    installed = InstalledWeights(
        name=name,
        encoder=entry.encoder,
        tensor_sha256=tensor_sha256(tensors),
        source=entry.source,
        source_sha256=source_sha256,
        licence=entry.licence,
        classes=entry.classes,
        installed_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_weights(folder / f"{name}.safetensors", tensors, installed)
    return installed
