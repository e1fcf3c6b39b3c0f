"""Installs weights, resolves what a config calls weights into one record, and loads the encoder that it names.

Installed weights are two files of the weights folder: `NAME.safetensors` holds the tensors and, in its header, the
encoder and the tensors' checksum, so that a file that travels alone still says what it is; `NAME.json` holds the whole
record.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_dir

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.catalogue import (
    Progress,
    compute_file_sha256,
    fetch_checkpoint,
    find_catalogue_entry,
    read_catalogue,
)
from echoshift.pipeline.errors import WeightsError
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors, tensor_sha256, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from echoshift.extract.encoders.network import EncoderNetwork

WEIGHTS_VARIABLE = "ECHOSHIFT_WEIGHTS"

_ENDING = ".safetensors"
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class InstalledWeights:
    """The record of one weights file.

    Attributes:
        name: the file's name without its ending.
        encoder: the one network it fits.
        tensor_sha256: of the tensors (`tensor_sha256`), what features and runs record.
        source: where the tensors come from, for people; source_sha256: of the file they were converted from, "" if
            there was none.
        licence: of the source.
        classes: which classes the classifier tells apart.
        installed_at: UTC, ISO 8601.
    """

    name: str
    encoder: str
    tensor_sha256: str
    source: str
    source_sha256: str
    licence: str
    classes: str
    installed_at: str


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
    from echoshift.extract.weights.formats import convert_tensors, read_checkpoint

    entry = find_catalogue_entry(name)
    folder = find_weights_dir(weights_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="echoshift-weights-") as scratch:
        path = fetch_checkpoint(entry, from_file, Path(scratch), progress)
        source_sha256 = compute_file_sha256(path)
        foreign = read_checkpoint(path, entry.format)
    network = _build_random(entry.encoder, seed=0)
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
    sidecar, file = folder / f"{name}.json", folder / f"{name}{_ENDING}"
    sidecar.unlink(missing_ok=True)  # an old record must not describe the new tensors, whenever this is interrupted
    header = {"encoder": installed.encoder, "tensor_sha256": installed.tensor_sha256, "source": installed.source}
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as fresh:  # of this process alone
        write_tensors(Path(fresh) / file.name, tensors, header)
        (Path(fresh) / file.name).replace(file)
    _write_text(sidecar, json.dumps(asdict(installed), indent=2) + "\n")
    return installed


def default_weights(encoder: str) -> str:
    """Return the reference used when none is named: the catalogue's preferred weights, or the encoder's own default."""
    own = find_encoder(encoder).default_weights
    for entry in read_catalogue().values():
        if entry.encoder == encoder and entry.preferred:
            return entry.name
    if own:
        return own
    raise WeightsError(f"the catalogue prefers no weights for {encoder}; name them")


def resolve_weights(ref: str, encoder: str, weights_dir: Path | None = None) -> WeightsRecord:
    """Resolve a reference for an encoder, from the records alone where there are any.

    Weights are random only where `random:SEED` says so. Raises WeightsError: not installed, unknown, or made for
    another encoder.
    """
    find_encoder(encoder)
    if ref.startswith("random:"):
        seed = _parse_seed(ref)
        sha256 = _compute_random_sha256(encoder, seed, weights_dir)
        return WeightsRecord(ref, sha256, f"default initialisation, seed {seed}", None)
    if ref.endswith(_ENDING):
        path = Path(ref)
        header = read_header(path)
        if "encoder" not in header or "tensor_sha256" not in header:
            return WeightsRecord(ref, tensor_sha256(read_tensors(path)), f"file {path.name}", path)
        made_for, sha256, source = header["encoder"], header["tensor_sha256"], header.get("source", ref)
    else:
        installed = _read_installed(ref, find_weights_dir(weights_dir))
        path = find_weights_dir(weights_dir) / f"{ref}{_ENDING}"
        made_for, sha256, source = installed.encoder, installed.tensor_sha256, installed.source
    if made_for != encoder:
        raise WeightsError(f"the weights {ref} are for {made_for}, not for {encoder}")
    return WeightsRecord(ref, sha256, source, path)


def load_encoder(encoder: str, record: WeightsRecord, device: torch.device | str = "cpu") -> EncoderNetwork:
    """Load an encoder that has a trunk and a head as `load_any_encoder` does; raises SpecError if it only extracts."""
    from echoshift.extract.encoders.network import require_trunk

    return require_trunk(load_any_encoder(encoder, record, device), encoder)


def load_any_encoder(encoder: str, record: WeightsRecord, device: torch.device | str = "cpu") -> nn.Module:
    """Load an encoder's network with the record's weights: on `device`, in eval mode, without gradients.

    Raises WeightsError if the file's tensors have another checksum than the record, or don't fit the network.
    """
    if record.path is None:
        network = _build_random(encoder, _parse_seed(record.ref))
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
    """Compute the checksum of installed weights and load them; raises WeightsError on a fault."""
    installed = _read_installed(name, find_weights_dir(weights_dir))
    load_any_encoder(installed.encoder, resolve_weights(name, installed.encoder, weights_dir))
    return installed


def list_weights(weights_dir: Path | None = None) -> list[WeightsRow]:
    """List the catalogue's weights and whatever else is installed, by name."""
    folder = find_weights_dir(weights_dir)
    records = {path.stem: _read_record(path) for path in folder.glob("*.json") if path.with_suffix(_ENDING).is_file()}
    catalogue = read_catalogue()
    rows = []
    for name in sorted({*catalogue, *records}):
        known = catalogue.get(name) or records[name]
        rows.append(
            WeightsRow(
                name=name,
                encoder=known.encoder,
                installed=name in records,
                preferred=name in catalogue and catalogue[name].preferred,
                licence=known.licence,
                source=known.source,
                note=catalogue[name].note if name in catalogue else "",
                path=folder / f"{name}{_ENDING}" if name in records else None,
            )
        )
    return rows


def _write_text(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _read_record(sidecar: Path) -> InstalledWeights:
    try:
        loaded = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"the record {sidecar} can't be read: {error}; install the weights again") from error
    names = {field.name for field in fields(InstalledWeights)}
    if (
        not isinstance(loaded, dict)
        or set(loaded) != names
        or not all(isinstance(value, str) for value in loaded.values())
    ):
        raise WeightsError(f"the record {sidecar} hasn't the fields {', '.join(sorted(names))}; install them again")
    return InstalledWeights(**loaded)


def _read_installed(name: str, folder: Path) -> InstalledWeights:
    sidecar = folder / f"{name}.json"
    if not re.fullmatch(r"[\w.-]+", name) or not sidecar.is_file() or not sidecar.with_suffix(_ENDING).is_file():
        entry = find_catalogue_entry(name)
        raise WeightsError(f"{name} isn't installed in {folder}; run `echoshift weights get {entry.name}`")
    return _read_record(sidecar)


def _parse_seed(ref: str) -> int:
    text = ref.removeprefix("random:")
    if not re.fullmatch(r"\d{1,19}", text) or int(text) > _MAX_SEED:
        raise WeightsError(f"{ref!r} isn't random:SEED with a whole number from 0 to 2^63 - 1")
    return int(text)


def _build_random(encoder: str, seed: int) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return find_encoder(encoder).build()


def _compute_random_sha256(encoder: str, seed: int, weights_dir: Path | None) -> str:
    """Compute the checksum of random weights and note it, so that a run with nothing to do needn't build a network.

    Loading computes it again, so a wrong note is an error and never a wrong feature.
    """
    entry = find_encoder(encoder)
    name = f"{encoder}-revision{entry.revision}-seed{seed}-torch{version('torch')}"
    if entry.source:  # the file of an encoder from outside may change while its revision stays
        name += f"-{hashlib.sha256(entry.source.encode()).hexdigest()[:16]}"
    note = find_weights_dir(weights_dir) / "random" / f"{name}.sha256"
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    sha256 = tensor_sha256(_build_random(encoder, seed).state_dict())
    with suppress(PermissionError):  # a cache that can't be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        _write_text(note, sha256 + "\n")
    return sha256
