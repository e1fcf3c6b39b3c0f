"""Writes and reads what a store says of itself: its specification, where it comes from, and its size."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.plugins import describe_plugin_versions
from echoshift.pipeline.specs import FeatureSpec, fingerprint
from echoshift.pipeline.store.layout import FORMAT_NAME, FORMAT_VERSION, StoreLayout

RECORDED_PACKAGES = (
    "echoshift",
    "torch",
    "torchaudio",
    "timm",
    "pytorchvideo",
    "av",
    "decord",
    "numpy",
    "zarr",
    "h5py",
)


def describe_versions() -> dict[str, str]:
    """List the versions of Python and of the packages that have a part in a feature's value, outside encoders' too."""
    packages = {name: version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version(), **packages, **describe_plugin_versions()}


def describe_writer() -> dict[str, str]:
    """Describe who writes, where and when (UTC)."""
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def make_attributes(
    dataset: str,
    spec: FeatureSpec,
    layout: StoreLayout,
    manifest_sha256: str,
    weights_source: str,
    encoder_source: str = "",
) -> dict[str, Any]:
    """Make the attributes of a new store (FORMAT.md, section 2); `encoder_source` only where there is one."""
    return {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "fingerprint": fingerprint(spec),
        "spec": spec.model_dump(mode="json"),
        "weights_source": weights_source,
        **({"encoder_source": encoder_source} if encoder_source else {}),
        "manifest_sha256": manifest_sha256,
        "n_rows": layout.n_rows,
        "n_clips": layout.n_clips,
        "n_rows_per_shard": layout.n_rows_per_shard,
        "n_id_bytes": layout.n_id_bytes,
        "created": describe_writer(),
        "versions": describe_versions(),
    }


def parse_attributes(path: str, attributes: Mapping[str, Any]) -> tuple[FeatureSpec, StoreLayout]:
    """Read specification and size from a store's attributes; raises StoreError when it is not one of ours."""
    if attributes.get("format") != FORMAT_NAME:
        raise StoreError(f"{path} is not an echoshift feature store")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {attributes.get('format_version')}, this echoshift reads {FORMAT_VERSION}; "
            f"extract it anew, or use the echoshift that wrote it"
        )
    try:
        spec = FeatureSpec.model_validate(attributes["spec"])
        layout = StoreLayout(
            n_rows=int(attributes["n_rows"]),
            n_clips=int(attributes["n_clips"]),
            n_rows_per_shard=int(attributes["n_rows_per_shard"]),
            n_id_bytes=int(attributes["n_id_bytes"]),
        )
    except (KeyError, ValidationError) as error:
        raise StoreError(f"{path}: the store's attributes are damaged: {error}") from error
    if attributes.get("fingerprint") != fingerprint(spec):
        raise StoreError(f"{path}: the fingerprint is not that of the specification; the attributes were changed")
    return spec, layout


def pack_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Make attributes that HDF5 can hold: text and whole numbers stay, everything else becomes JSON."""
    return {k: v if isinstance(v, str | int) else "json:" + json.dumps(v) for k, v in attributes.items()}


def unpack_attributes(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `pack_attributes`."""
    attributes: dict[str, Any] = {}
    for key, value in packed.items():
        if isinstance(value, str):
            attributes[key] = json.loads(value[5:]) if value.startswith("json:") else value
        else:
            attributes[key] = int(value)
    return attributes
