"""Tests the networks against others' code and by hand: torchvision's, PyTorchVideo's, TensorFlow's padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from echoshift.extract.encoders.inception_i3d import build_i3d
from echoshift.extract.encoders.inference_form import same_padding
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.encoders.slowfast import plan_slow_indices
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.pipeline.errors import SpecError


def test_resnet18_equals_torchvisions_and_its_map_has_1071_positions() -> None:
    torch.manual_seed(0)
    network = find_encoder("resnet18_audio").build().eval()
    ensure_torchvision()
    from torchvision.models import resnet18

    theirs = resnet18(weights=None, num_classes=309).eval()
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    network.net.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 1, 257, 1004)
    with torch.inference_mode():
        outputs = network(x, ["map", "pooled", "logits"])
        torch.testing.assert_close(outputs["logits"], theirs(x))
    assert outputs["map"].shape == (1, 256, 17, 63) and 17 * 63 == 1071
    assert outputs["pooled"].shape == (1, 512)
    with torch.device("meta"):  # the second paper's spectrogram
        network = find_encoder("resnet18_audio").build().eval()
        assert network(torch.zeros(1, 1, 256, 256), ["map"])["map"].shape == (1, 256, 16, 16)


def _randomise_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def test_slowfasts_logits_equal_pytorchvideos_own_forward_at_8x8_and_224() -> None:
    torch.manual_seed(0)
    ours = find_encoder("slowfast_r50").build().eval()
    from pytorchvideo.models.slowfast import create_slowfast

    theirs = create_slowfast(model_depth=50).eval()
    _randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 224, 224)
    slow = x[:, :, torch.linspace(0, 31, 8).long()]  # as PackPathway does
    with torch.inference_mode():
        found = ours(x, ["logits", "pooled_avg", "pooled", "tokens_slow", "tokens_fast", "trunk_slow", "trunk_fast"])
        wanted = theirs([slow, x.clone()])
        torch.testing.assert_close(found["logits"], theirs.blocks[6].proj(found["pooled_avg"]))
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-4, atol=1e-4)
    assert found["trunk_slow"].shape == (1, 1280, 8, 14, 14)
    assert found["trunk_fast"].shape == (1, 128, 32, 14, 14)
    # The slow channels come first, and the tokens' maximum over time is the pooled feature.
    assert torch.equal(found["pooled"][:, :2048], found["tokens_slow"].amax(dim=1))
    assert torch.equal(found["pooled"][:, 2048:], found["tokens_fast"].amax(dim=1))


def test_slow_indices_are_each_code_bases_own() -> None:
    assert plan_slow_indices(32, "stride") == [0, 4, 8, 12, 16, 20, 24, 28]
    assert plan_slow_indices(32, "linspace") == [0, 4, 8, 13, 17, 22, 26, 31]
    for n_frames in range(4, 260, 4):
        wanted = torch.linspace(0, n_frames - 1, n_frames // 4, dtype=torch.float64).long().tolist()
        assert plan_slow_indices(n_frames, "linspace") == wanted
    for n_frames in (8, 16, 32, 64, 128):  # the lengths in use, in PackPathway's single precision
        wanted = torch.linspace(0, n_frames - 1, n_frames // 4).long().tolist()
        assert plan_slow_indices(n_frames, "linspace") == wanted
    assert plan_slow_indices(4, "stride") == plan_slow_indices(4, "linspace") == [0]
    for n_frames in (0, 2, 30):
        with pytest.raises(SpecError, match=f"positive multiple of 4 frames, not {n_frames}"):
            plan_slow_indices(n_frames, "stride")


def test_same_padding_by_hand() -> None:
    # n = 7, k = 3, s = 2: 4 outputs need (4 - 1) * 2 + 3 = 9 inputs, 2 more: 1 and 1. n = 8: 4 outputs need 9: 0 and 1.
    assert same_padding((7, 8, 8), (3, 3, 2), (2, 2, 2)) == [0, 0, 0, 1, 1, 1]
    assert same_padding((32, 224, 224), (7, 7, 7), (2, 2, 2)) == [2, 3, 2, 3, 2, 3]
    assert same_padding((1, 1, 1), (2, 2, 2), (2, 2, 2)) == [0, 1, 0, 1, 0, 1]
    assert same_padding((5, 5, 5), (1, 1, 1), (1, 1, 1)) == [0] * 6


def test_i3ds_convolution_pads_more_at_the_end() -> None:
    conv = type(build_i3d(3).get_submodule("logits"))(1, 1, 3, stride=2, is_classifier=True)
    with torch.no_grad():
        conv.conv3d.weight.zero_()
        conv.conv3d.bias.zero_()
        conv.conv3d.weight[0, 0, :, 0, 0] = torch.tensor([1.0, 10.0, 100.0])
        x = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)
        # Nothing before, one zero after: windows 1 2 3 and 3 4 0.
        assert conv(x)[0, 0, :, 0, 0].tolist() == [321.0, 43.0]


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (2, 2)])
def test_i3ds_pooling_without_a_padded_copy_is_exact(n: int, kernel: int, stride: int) -> None:
    with torch.device("meta"):
        pool = type(build_i3d(3).get_submodule("MaxPool3d_2a_3x3"))
    x = torch.randn(2, 3, n, n, 5) - 3
    padding: list[int] = []
    for size in (5, n, n):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    padded = F.pad(x, padding, value=float("-inf"))
    assert torch.equal(pool((kernel,) * 3, (stride,) * 3)(x), F.max_pool3d(padded, kernel, stride))


def test_i3ds_logits_average_windows_of_two_positions_in_time() -> None:
    torch.manual_seed(0)
    network = build_i3d(3).eval()
    trunk = torch.rand(1, 832, 8, 14, 14)
    with torch.inference_mode():
        head = network.head({"trunk": trunk})
        top = trunk
        for name in ("MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c"):
            top = network.get_submodule(name)(top)
        assert top.shape == (1, 1024, 4, 7, 7)
        by_time = top.mean(dim=(3, 4))
        weighted = (by_time * torch.tensor([0.5, 1.0, 1.0, 0.5])).sum(dim=2) / 3
        conv = network.logits.conv3d
        wanted = F.linear(weighted, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(head["logits"], wanted)
    torch.testing.assert_close(head["pooled"], by_time.mean(dim=2))
    torch.testing.assert_close(head["pooled_max"], top.amax(dim=(2, 3, 4)))
