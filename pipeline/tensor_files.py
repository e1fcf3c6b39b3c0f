"""Writes and reads files of tensors (safetensors) with facts in their headers, and tells tensors apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from echoshift.pipeline.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER_BYTES = 100_000_000
_N_NAMES_SHOWN = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors with facts in the file's header, in one step; the same tensors and facts give the same bytes."""
    from safetensors.torch import save

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_bytes(_sort_metadata(save(kept, metadata=dict(header))))
    fresh.replace(path)


def tensor_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Compute the checksum of named tensors: sha256 over name, dtype, shape and little-endian bytes, sorted by name.

    It doesn't depend on the file format, the device or the order of the mapping.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, str]:
    """Read what a safetensors file says of itself (encoder, tensor_sha256, source; empty if nothing), without torch.

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
    """Read the tensors of a safetensors file onto the CPU; raises WeightsError if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weights file {path}") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} isn't a whole safetensors file: {error}; make it again") from error


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str) -> None:
    """Raise WeightsError unless both have the same names, shapes and dtypes; the message lists the differences."""
    faults = [f"lacks {name}" for name in expected if name not in tensors]
    faults += [f"has {name}, which the network hasn't" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        like = expected.get(name)
        if like is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
            faults.append(f"has {name} as {tensor.dtype} {list(tensor.shape)}, not {like.dtype} {list(like.shape)}")
    if faults:
        more = f"; and {len(faults) - _N_NAMES_SHOWN} more" if len(faults) > _N_NAMES_SHOWN else ""
        raise WeightsError(f"{place} doesn't fit: it {'; it '.join(faults[:_N_NAMES_SHOWN])}{more}")


def _sort_metadata(file: bytes) -> bytes:
    """Sort the facts in a safetensors file's header, which its library writes in another order each time."""
    stop = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:stop])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + file[stop:]
