"""Resolves what a config calls weights into one record, and loads the encoder that the record names."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.catalogue import find_catalogue_entry, read_catalogue
from echoshift.extract.weights.install import find_weights_dir
from echoshift.extract.weights.weights_files import InstalledWeights, read_record
from echoshift.pipeline.errors import WeightsError
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors, tensor_sha256

if TYPE_CHECKING:
    import torch

    from echoshift.extract.encoders.encoder_network import EncoderNetwork

_ENDING = ".safetensors"
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """One set of weights, resolved.

    Attributes:
        ref: as the config says: an installed name, a path to a .safetensors file, or `random:SEED`.
        sha256: of the tensors; part of the feature's fingerprint.
        source: where they come from, for people.
        path: the file, None for random weights.
    """

    ref: str
    sha256: str
    source: str
    path: Path | None


@dataclass(frozen=True, slots=True)
class WeightsRow:
    """One line of the list of weights; `path` is None if they aren't installed."""

    name: str
    encoder: str
    installed: bool
    preferred: bool
    licence: str
    source: str
    note: str
    path: Path | None


def default_weights(encoder: str) -> str:
    """Return the reference used when none is named: the catalogue's preferred ones, or `random:0` (demo)."""
    find_encoder(encoder)
    for entry in read_catalogue().values():
        if entry.encoder == encoder and entry.preferred:
            return entry.name
    if encoder.endswith("_demo"):
        return "random:0"
    raise WeightsError(f"the catalogue prefers no weights for {encoder}; name them")


def resolve_weights(ref: str, encoder: str, weights_dir: Path | None = None) -> WeightsRecord:
    """Resolve a reference for an encoder, from the records alone where there are any.

    Weights are random only where `random:SEED` says so. Raises WeightsError: not installed, unknown, or made for
    another encoder.
    """
    find_encoder(encoder)
    if ref.startswith("random:"):
        sha256 = _compute_random_sha256(encoder, _read_seed(ref), weights_dir)
        return WeightsRecord(ref, sha256, f"default initialisation, seed {_read_seed(ref)}", None)
    if ref.endswith(_ENDING):
        return _resolve_file(ref, Path(ref), encoder)
    installed = _read_installed(ref, find_weights_dir(weights_dir))
    _check_encoder(ref, installed.encoder, encoder)
    return WeightsRecord(ref, installed.tensor_sha256, installed.source, _find_file(ref, weights_dir))


def load_encoder(encoder: str, record: WeightsRecord, device: torch.device | str = "cpu") -> EncoderNetwork:
    """Load an encoder's network with the record's weights: on `device`, in eval mode, without gradients.

    Raises WeightsError if the file's tensors have another checksum than the record, or don't fit the network.
    """
    if record.path is None:
        network = _build_random(encoder, _read_seed(record.ref))
        tensors = network.state_dict()
    else:
        network = _build_random(encoder, seed=0)
        tensors = read_tensors(record.path)
        check_tensors(tensors, network.state_dict(), f"{record.path} (for {encoder})")
        network.load_state_dict(tensors, strict=True)
    found = tensor_sha256(tensors)
    if found != record.sha256:
        place = record.ref if record.path is None else record.path
        raise WeightsError(f"{place} has changed: its tensors have sha256 {found}, the record says {record.sha256}")
    return network.eval().requires_grad_(False).to(device)


def check_weights(name: str, weights_dir: Path | None = None) -> InstalledWeights:
    """Check installed weights: computes the tensors' checksum anew and load them; raises WeightsError on a fault."""
    installed = _read_installed(name, find_weights_dir(weights_dir))
    load_encoder(installed.encoder, resolve_weights(name, installed.encoder, weights_dir))
    return installed


def list_weights(weights_dir: Path | None = None) -> list[WeightsRow]:
    """List the catalogue's weights and whatever else is installed, by name."""
    folder = find_weights_dir(weights_dir)
    records = {path.stem: read_record(path) for path in folder.glob("*.json") if path.with_suffix(_ENDING).is_file()}
    rows = [
        WeightsRow(
            name=entry.name,
            encoder=entry.encoder,
            installed=entry.name in records,
            preferred=entry.preferred,
            licence=entry.licence,
            source=entry.source,
            note=entry.note,
            path=folder / f"{entry.name}{_ENDING}" if entry.name in records else None,
        )
        for entry in read_catalogue().values()
    ]
    rows += [
        WeightsRow(name, record.encoder, True, False, record.licence, record.source, "", folder / f"{name}{_ENDING}")
        for name, record in records.items()
        if name not in read_catalogue()
    ]
    return sorted(rows, key=lambda row: row.name)


def _find_file(name: str, weights_dir: Path | None) -> Path:
    return find_weights_dir(weights_dir) / f"{name}{_ENDING}"


def _read_installed(name: str, folder: Path) -> InstalledWeights:
    sidecar = folder / f"{name}.json"
    if not re.fullmatch(r"[\w.-]+", name) or not sidecar.is_file() or not sidecar.with_suffix(_ENDING).is_file():
        entry = find_catalogue_entry(name)
        raise WeightsError(f"{name} isn't installed in {folder}; run `echoshift weights get {entry.name}`")
    return read_record(sidecar)


def _resolve_file(ref: str, path: Path, encoder: str) -> WeightsRecord:
    header = read_header(path)
    if "encoder" in header and "tensor_sha256" in header:
        _check_encoder(ref, header["encoder"], encoder)
        return WeightsRecord(ref, header["tensor_sha256"], header.get("source", str(path)), path)
    return WeightsRecord(ref, tensor_sha256(read_tensors(path)), f"file {path.name}", path)


def _check_encoder(ref: str, made_for: str, wanted: str) -> None:
    if made_for != wanted:
        raise WeightsError(f"the weights {ref} are for {made_for}, not for {wanted}")


def _read_seed(ref: str) -> int:
    text = ref.removeprefix("random:")
    if not re.fullmatch(r"\d{1,19}", text) or int(text) > _MAX_SEED:
        raise WeightsError(f"{ref!r} isn't random:SEED with a whole number from 0 to 2^63 - 1")
    return int(text)


def _build_random(encoder: str, seed: int) -> EncoderNetwork:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return find_encoder(encoder).build()


def _compute_random_sha256(encoder: str, seed: int, weights_dir: Path | None) -> str:
    """Compute the checksum of random weights, and notes it, so that a run with nothing to do needn't build a network.

    `load_encoder` computes it anew, so a wrong note is an error and never a wrong feature.
    """
    name = f"{encoder}-revision{find_encoder(encoder).revision}-seed{seed}-torch{version('torch')}.sha256"
    note = find_weights_dir(weights_dir) / "random" / name
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    sha256 = tensor_sha256(_build_random(encoder, seed).state_dict())
    with suppress(PermissionError):  # a cache that can't be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_name(f"{note.name}.{os.getpid()}.partial")
        fresh.write_text(sha256 + "\n", encoding="utf-8")
        fresh.replace(note)
    return sha256
