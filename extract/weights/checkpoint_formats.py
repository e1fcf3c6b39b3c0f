"""Converts a published checkpoint into our tensors, accounting for every name on both sides."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from echoshift.extract.weights.key_maps import (
    map_bn_inception_name,
    map_flax_i3d_name,
    map_mmaction2_slowfast_name,
    map_mmaction2_slowonly_name,
    map_piergiaj_name,
    map_pyslowfast_name,
    map_pytorchvideo_name,
    map_vggsound_name,
)
from echoshift.pipeline.errors import ManifestError, WeightsError
from echoshift.pipeline.restricted_pickle import NUMPY_CONSTRUCTORS, read_restricted_pickle

_N_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Exemption:
    """One kind of our tensors that a layout may lack, with the value it then has and the reason."""

    suffix: str
    value: float
    reason: str


_NO_COUNTER = Exemption("num_batches_tracked", 0, "a counter that checkpoints older than PyTorch 0.4.1 don't have")
_NO_SCALE = Exemption("bn.weight", 1, "this network's BatchNorm has no scale")


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """One published layout.

    Attributes:
        map_name: foreign name to ours, None if unknown.
        container: the entry of the file that holds the tensors, None if the file is the tensors.
        convert: changes a tensor's values or order, given our name.
        exemptions: what may be absent.
    """

    map_name: Callable[[str], str | None]
    container: str | None = None
    convert: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor
    exemptions: tuple[Exemption, ...] = (_NO_COUNTER,)


def _put_slow_first(name: str, tensor: Tensor) -> Tensor:
    # mmaction2's head concatenates [fast, slow], ours [slow, fast]; the fast path has 1/8 of the slow one's channels.
    if name != "blocks.6.proj.weight" or tensor.ndim != 2:
        return tensor
    n_fast = tensor.shape[1] // 9
    return torch.cat([tensor[:, n_fast:], tensor[:, :n_fast]], dim=1)


def _convert_flax(name: str, tensor: Tensor) -> Tensor:
    # Flax keeps kernels as [T, H, W, in, out]; this file keeps means and variances as [1, 1, 1, 1, C].
    if name.endswith("conv3d.weight") and tensor.ndim == 5:
        return tensor.permute(4, 3, 0, 1, 2)
    if name.endswith(("running_mean", "running_var")) and tensor.shape[:-1] == (1, 1, 1, 1):
        return tensor.reshape(-1)
    return tensor


def _convert_bn_inception(name: str, tensor: Tensor) -> Tensor:
    # Sound has one channel: the mean of the filters of the three colours. Norms' tensors were [1, C] before 0.4.
    if name == "conv1_7x7_s2.conv.weight" and tensor.ndim == 4 and tensor.shape[1] == 3:
        return tensor.mean(dim=1, keepdim=True)
    if ".bn." in name and tensor.ndim == 2 and tensor.shape[0] == 1:
        return tensor.reshape(-1)
    return tensor


FORMATS: Mapping[str, CheckpointFormat] = MappingProxyType(
    {
        "pytorchvideo": CheckpointFormat(map_pytorchvideo_name, container="model_state"),
        "pyslowfast": CheckpointFormat(map_pyslowfast_name, container="model_state"),
        "mmaction2-slowfast": CheckpointFormat(
            map_mmaction2_slowfast_name, container="state_dict", convert=_put_slow_first
        ),
        "mmaction2-slowonly": CheckpointFormat(map_mmaction2_slowonly_name, container="state_dict"),
        "piergiaj-i3d": CheckpointFormat(map_piergiaj_name),
        "flax-i3d": CheckpointFormat(map_flax_i3d_name, convert=_convert_flax, exemptions=(_NO_COUNTER, _NO_SCALE)),
        "bn-inception": CheckpointFormat(map_bn_inception_name, convert=_convert_bn_inception),
        "vggsound": CheckpointFormat(map_vggsound_name, container="model_state_dict"),
    }
)


def read_checkpoint(path: Path, format_name: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under their foreign names.

    PyTorch files are read with weights_only=True, NumPy pickles with a restricted unpickler: no file can run code.
    Raises WeightsError for a file that needs more, is broken, or lacks the entry where the layout keeps its tensors.
    """
    if format_name == "flax-i3d":
        return _read_numpy_tree(path)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    # torch's unpickler lets a file that is no pickle run into any of these
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{path} can't be read as tensors alone ({format_name}): {_describe_refusal(error)}; "
            "compare its checksum with the publisher's, and don't load it any other way"
        ) from error
    container = FORMATS[format_name].container
    if container is not None:
        if not isinstance(loaded, Mapping) or container not in loaded:
            raise WeightsError(f"{path} has no entry {container!r}, where {format_name} keeps its tensors")
        loaded = loaded[container]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} isn't a mapping of names to tensors ({format_name})")
    return dict(loaded)


def _describe_refusal(error: Exception) -> str:
    # torch's own message advises to load the file unsafely; only what it objects to is repeated.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    objections = [line for line in lines if re.search(r"GLOBAL|[Uu]nsupported", line)]
    return (objections or [line for line in lines if "weights_only" not in line] or [type(error).__name__])[0]


def _read_numpy_tree(path: Path) -> dict[str, Tensor]:
    try:
        tree = read_restricted_pickle(path, NUMPY_CONSTRUCTORS)
    except ManifestError as error:
        raise WeightsError(f"{path} isn't a pickle of NumPy arrays alone: {error}") from error
    return {name: torch.from_numpy(array.copy()) for name, array in _walk_tree("", tree, path)}


def _walk_tree(prefix: str, tree: object, path: Path) -> Iterator[tuple[str, Any]]:
    import numpy as np

    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _walk_tree(f"{prefix}/{name}" if prefix else str(name), branch, path)
    elif isinstance(tree, np.ndarray) and tree.dtype == np.float32:
        yield prefix, tree
    else:
        raise WeightsError(f"{path}: {prefix or 'the root'} is a {type(tree).__name__}, not a float32 array")


def convert_tensors(
    tensors: Mapping[str, Tensor], format_name: str, expected: Mapping[str, Tensor], place: str
) -> dict[str, Tensor]:
    """Convert foreign tensors into ours, exactly the names, shapes and dtypes of `expected` (a network's state dict).

    `place` names the file in messages. Raises WeightsError that lists the names without a counterpart on either side,
    two names for one tensor, or the shapes that differ; only the layout's exemptions may be absent.
    """
    layout = FORMATS[format_name]
    ours: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    unknown: list[str] = []
    for foreign, tensor in tensors.items():
        name = layout.map_name(foreign)
        if name is None or name not in expected:
            unknown.append(foreign)
        elif name in ours:
            raise WeightsError(f"{place}: {foreign} and {origins[name]} are both {name} ({format_name})")
        else:
            ours[name], origins[name] = layout.convert(name, tensor), foreign
    missing: list[str] = []
    for name, like in expected.items():
        if name in ours:
            continue
        exemption = next((e for e in layout.exemptions if name.endswith(e.suffix)), None)
        if exemption is None:
            missing.append(name)
        else:
            ours[name] = torch.full_like(like, exemption.value)
    misshapen = [
        f"{origins[name]} is {list(tensor.shape)}, {name} is {list(expected[name].shape)}"
        for name, tensor in ours.items()
        if tensor.shape != expected[name].shape
    ]
    faults = [
        *_describe("has tensors the network hasn't", unknown),
        *_describe("lacks", missing),
        *_describe("has other shapes:", misshapen),
    ]
    if faults:
        raise WeightsError(f"{place} doesn't fit ({format_name}): it {'; it '.join(faults)}")
    return {name: ours[name].to(like.dtype).contiguous() for name, like in expected.items()}


def _describe(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:_N_NAMES_SHOWN])
    more = f" and {len(names) - _N_NAMES_SHOWN} more" if len(names) > _N_NAMES_SHOWN else ""
    return [f"{what} {shown}{more}"]
