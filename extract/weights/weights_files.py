"""Writes and reads echoshift's own weights files: safetensors with a record beside them.

`NAME.safetensors` holds the tensors and, in its header, the encoder and the tensors' checksum, so that a file that
travels alone still says what it is. `NAME.json` holds the whole record.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER_BYTES = 100_000_000
_N_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class InstalledWeights:
    """Is the record of one weights file.

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


def tensor_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Computes the checksum of named tensors: sha256 over name, dtype, shape and little-endian bytes, sorted by name.

    It doesn't depend on the file format, the device or the order of the mapping.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_weights(path: Path, tensors: Mapping[str, Tensor], record: InstalledWeights) -> None:
    """Writes the tensors to `path` (.safetensors) and the record to the .json beside it, each whole or not at all."""
    from safetensors.torch import save

    header = {"encoder": record.encoder, "tensor_sha256": record.tensor_sha256, "source": record.source}
    sidecar = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar.unlink(missing_ok=True)  # an old record must not describe the new tensors, whenever this is interrupted
    _replace_file(path, save(dict(tensors), metadata=header))
    _replace_file(sidecar, (json.dumps(asdict(record), indent=2) + "\n").encode())


def _replace_file(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def read_record(sidecar: Path) -> InstalledWeights:
    """Reads a record; raises WeightsError if the file is missing or isn't one."""
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


def read_header(path: Path) -> dict[str, str]:
    """Reads what a safetensors file says of itself (encoder, tensor_sha256, source; empty if nothing), without torch.

    Raises WeightsError if the file is missing or isn't a safetensors file.
    """
    try:
        with path.open("rb") as file:
            n_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_bytes)) if n_bytes <= _MAX_HEADER_BYTES else None
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weights file {path}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} isn't a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} isn't a safetensors file")
    metadata = header.get("__metadata__", {})
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file onto the CPU; raises WeightsError if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weights file {path}") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} isn't a whole safetensors file: {error}; install the weights again") from error


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str) -> None:
    """Raises WeightsError unless both have the same names, shapes and dtypes; the message lists the differences."""
    faults = [f"lacks {name}" for name in expected if name not in tensors]
    faults += [f"has {name}, which the network hasn't" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        like = expected.get(name)
        if like is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
            faults.append(f"has {name} as {tensor.dtype} {list(tensor.shape)}, not {like.dtype} {list(like.shape)}")
    if faults:
        more = f"; and {len(faults) - _N_NAMES_SHOWN} more" if len(faults) > _N_NAMES_SHOWN else ""
        raise WeightsError(f"{place} doesn't fit: it {'; it '.join(faults[:_N_NAMES_SHOWN])}{more}")
