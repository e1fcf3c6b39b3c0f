"""Tests SlowFast's own forward against PyTorchVideo's, and what each variant feeds its slow path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.encoders.slowfast_variants import VARIANTS, plan_slow_indices
from echoshift.pipeline.errors import SpecError


def _randomise_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def test_logits_equal_pytorchvideos_own_forward_at_8x8_and_224() -> None:
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
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-4, atol=1e-4)
    assert found["trunk_slow"].shape == (1, 1280, 8, 14, 14)
    assert found["trunk_fast"].shape == (1, 128, 32, 14, 14)
    # The slow channels come first, and the tokens' maximum over time is the pooled feature.
    assert torch.equal(found["pooled"][:, :2048], found["tokens_slow"].amax(dim=1))
    assert torch.equal(found["pooled"][:, 2048:], found["tokens_fast"].amax(dim=1))
    with torch.inference_mode():
        torch.testing.assert_close(found["logits"], theirs.blocks[6].proj(found["pooled_avg"]))


def test_slow_indices_follow_each_codes_rule() -> None:
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


@pytest.mark.parametrize(("name", "unseen"), [("slowfast_r50", 12), ("slowfast_r50_mmaction", 13)])
def test_slow_path_sees_only_its_frames(name: str, unseen: int) -> None:
    network = find_encoder(name).build().eval()
    seen: list[torch.Tensor] = []
    stem = network.get_submodule("blocks.0.multipathway_blocks.0")
    stem.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = torch.zeros(1, 3, 32, 32, 32)
    x += torch.arange(32.0)[:, None, None]
    with torch.inference_mode():
        network(x, ["trunk_slow"])
    indices = [int(value) for value in seen[0][0, 0, :, 0, 0]]
    assert indices == plan_slow_indices(32, VARIANTS[name].slow_sampling)
    assert unseen not in indices


def test_only_the_variants_of_the_papers_code_normalise_their_laterals() -> None:
    with torch.device("meta"):
        paper = set(find_encoder("slowfast_r50").build().state_dict())
        mmaction2 = set(find_encoder("slowfast_r50_mmaction").build().state_dict())
    assert mmaction2 < paper
    extra = paper - mmaction2
    assert {name.split(".norm.")[0] for name in extra} == {f"blocks.{i}.multipathway_fusion" for i in range(4)}


def test_demo_network_depends_on_all_its_blocks_and_is_small() -> None:
    torch.manual_seed(0)
    network = find_encoder("slowfast_demo").build().eval()
    x = torch.randn(1, 3, 8, 64, 64)
    with torch.inference_mode():
        before = network(x, ["pooled"])["pooled"]
        network.get_submodule("blocks.2.multipathway_blocks.0.res_blocks.0.branch2.conv_b").weight.zero_()
        after = network(x, ["pooled"])["pooled"]
    assert not torch.allclose(before, after)
    assert sum(parameter.numel() for parameter in network.parameters()) < 1_000_000
