"""Tests I3D: TensorFlow's padding by hand, the split, and the logits of the authors' pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from echoshift.extract.encoders.inception_i3d import InceptionI3D, SamePaddedConv, SamePaddedMaxPool, same_padding


def test_same_padding_by_hand() -> None:
    # n = 7, k = 3, s = 2: 4 outputs need (4 - 1) * 2 + 3 = 9 inputs, 2 more: 1 and 1. n = 8: 4 outputs need 9: 0 and 1.
    assert same_padding((7, 8, 8), (3, 3, 2), (2, 2, 2)) == [0, 0, 0, 1, 1, 1]
    assert same_padding((32, 224, 224), (7, 7, 7), (2, 2, 2)) == [2, 3, 2, 3, 2, 3]
    assert same_padding((1, 1, 1), (2, 2, 2), (2, 2, 2)) == [0, 1, 0, 1, 0, 1]
    assert same_padding((5, 5, 5), (1, 1, 1), (1, 1, 1)) == [0] * 6


def test_convolution_pads_more_at_the_end() -> None:
    conv = SamePaddedConv(1, 1, 3, stride=2, is_classifier=True)
    with torch.no_grad():
        conv.conv3d.weight.zero_()
        assert conv.conv3d.bias is not None
        conv.conv3d.bias.zero_()
        conv.conv3d.weight[0, 0, :, 0, 0] = torch.tensor([1.0, 10.0, 100.0])
        x = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)
        # Nothing before, one zero after: windows 1 2 3 and 3 4 0.
        assert conv(x)[0, 0, :, 0, 0].tolist() == [321.0, 43.0]


def test_padding_never_wins_the_maximum() -> None:
    pool = SamePaddedMaxPool((3, 3, 3), (2, 2, 2))
    assert pool(torch.full((1, 1, 4, 4, 4), -5.0)).eq(-5).all()


@pytest.mark.parametrize(("n_frames", "side", "trunk"), [(1, 32, (1, 2)), (8, 33, (2, 3)), (17, 64, (5, 4))])
def test_any_clip_and_picture_are_taken(n_frames: int, side: int, trunk: tuple[int, int]) -> None:
    network = InceptionI3D(2).eval()
    with torch.inference_mode():
        outputs = network(torch.randn(1, 2, n_frames, side, side), ["trunk", "pooled", "logits"])
    assert outputs["trunk"].shape == (1, 832, trunk[0], trunk[1], trunk[1])
    assert outputs["pooled"].shape == (1, 1024)
    assert torch.isfinite(outputs["logits"]).all()


def test_logits_average_windows_of_two_positions_in_time() -> None:
    torch.manual_seed(0)
    network = InceptionI3D(3).eval()
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


def test_names_are_those_of_the_widespread_checkpoints() -> None:
    names = set(InceptionI3D(3).state_dict())
    for name in (
        "Conv3d_1a_7x7.conv3d.weight",
        "Conv3d_2c_3x3.bn.running_var",
        "Mixed_3b.b1a.conv3d.weight",
        "Mixed_5c.b3b.bn.weight",
        "logits.conv3d.bias",
    ):
        assert name in names
    assert not any(name.startswith("dropout") or name.endswith("b0.conv3d.bias") for name in names)
