"""Writes and reads echoshift's own weights files: safetensors with a record beside them.

`NAME.safetensors` holds the tensors and, in its header, the encoder and the tensors' checksum, so that a file that
travels alone still says what it is. `NAME.json` holds the whole record.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from echoshift.pipeline.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor


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


def write_weights(path: Path, tensors: Mapping[str, Tensor], record: InstalledWeights) -> None:
    """Write the tensors to `path` (.safetensors) and the record to the .json beside it, each whole or not at all."""
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
    """Read a record; raises WeightsError if the file is missing or isn't one."""
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
