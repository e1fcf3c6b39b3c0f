"""Tests the audio ResNets against torchvision's ResNet and on a spectrogram of full length."""

from __future__ import annotations

import torch
from torch import nn

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.torchvision_import import ensure_torchvision


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
    assert outputs["map"].shape == (1, 256, 17, 63)
    assert outputs["map"].shape[2] * outputs["map"].shape[3] == 1071
    assert outputs["pooled"].shape == (1, 512)


def test_resnet18_takes_the_second_papers_spectrogram() -> None:
    with torch.device("meta"):
        network = find_encoder("resnet18_audio").build().eval()
        assert network(torch.zeros(1, 1, 256, 256), ["map"])["map"].shape == (1, 256, 16, 16)


def test_demo_resnet_is_small_and_differs_between_sounds() -> None:
    torch.manual_seed(0)
    network = find_encoder("resnet_demo").build().eval()
    with torch.inference_mode():
        pooled = network(torch.randn(2, 1, 257, 199), ["pooled"])["pooled"]
    assert pooled.shape == (2, 128)
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3
    assert sum(parameter.numel() for parameter in network.parameters()) < 500_000
