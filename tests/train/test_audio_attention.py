"""Checks psi against a plain written-out reference, its size, and what a missing sound does to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from echoshift.train.stage1.config import AttentionConfig
from echoshift.train.stage1.encoder import AudioAttention

SMALL = {"width": 24, "n_layers": 3, "n_heads": 3, "head_width": 8, "mlp_width": 40}
STILL = {"dropout": 0.0, "embedding_dropout": 0.0}
PATHS = {"trunk_slow": 10, "trunk_fast": 4}


def _make(seed: int = 0, **changed: float) -> AudioAttention:
    torch.manual_seed(seed)
    return AudioAttention(6, PATHS, AttentionConfig(**(SMALL | changed)))


def _make_sound(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, 3, 5), torch.ones(n, dtype=torch.bool)


def _normalise(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _compute_reference(w: dict[str, Tensor], audio_map: Tensor, heard: list[bool], n_layers: int) -> dict[str, Tensor]:
    """Compute the gates without dropout: each segment, layer and head in turn, every token a query in every layer."""
    gates: dict[str, list[Tensor]] = {path: [] for path in PATHS}
    for segment, has_sound in zip(audio_map, heard, strict=True):
        positions = [segment[:, f, n] for f in range(segment.shape[1]) for n in range(segment.shape[2])]
        tokens = [
            w["projection.weight"] @ x + w["projection.bias"] if has_sound else w["missing_audio"] for x in positions
        ]
        x = torch.stack([w["class_token"], *tokens])
        for layer in range(n_layers):
            p = f"layers.{layer}"
            query, key, value = (_normalise(x, w, f"{p}.attention_norm") @ w[f"{p}.qkv.weight"].T).chunk(3, dim=1)
            heads = []
            for head in range(3):
                part = slice(8 * head, 8 * head + 8)
                scores = query[:, part] @ key[:, part].T / math.sqrt(8)
                heads.append(scores.exp() / scores.exp().sum(dim=1, keepdim=True) @ value[:, part])
            joined = torch.cat(heads, dim=1)
            x = x + joined @ w[f"{p}.attention_out.0.weight"].T + w[f"{p}.attention_out.0.bias"]
            hidden = _normalise(x, w, f"{p}.mlp_norm") @ w[f"{p}.mlp.0.weight"].T + w[f"{p}.mlp.0.bias"]
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            x = x + hidden @ w[f"{p}.mlp.3.weight"].T + w[f"{p}.mlp.3.bias"]
        summary = _normalise(x[0], w, "head_norm")
        for path in PATHS:
            gates[path].append(1 / (1 + (-(w[f"heads.{path}.weight"] @ summary + w[f"heads.{path}.bias"])).exp()))
    return {path: torch.stack(rows) for path, rows in gates.items()}


@pytest.mark.parametrize("n_layers", [1, 3])
def test_gates_and_gradients_equal_the_written_out_reference(n_layers):
    psi = _make(n_layers=n_layers, p_missing=0, **STILL).double()
    for parameter in psi.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.3)
    audio_map, has_audio = _make_sound(3)
    audio_map, has_audio[1] = audio_map.double(), False
    for mode in (True, False):
        found = psi.train(mode)(audio_map, has_audio)
        weights = dict(psi.named_parameters())
        wanted = _compute_reference(weights, audio_map, has_audio.tolist(), n_layers)
        for path, n_channels in PATHS.items():
            assert found[path].shape == (3, n_channels) and found[path].dtype == torch.float32
            torch.testing.assert_close(found[path], wanted[path].float())
        downstream = {path: torch.randn(3, n) for path, n in PATHS.items()}  # so that every gate has its own gradient
        gradients = [
            torch.autograd.grad(sum((gates[p] * downstream[p]).sum() for p in PATHS), list(psi.parameters()))
            for gates in (found, wanted)
        ]
        for name, ours, reference in zip(weights, *gradients, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6, msg=name)


def test_size_at_slowfast_r101():
    psi = AudioAttention(256, {"trunk_slow": 1280, "trunk_fast": 128}, AttentionConfig())
    n_projection, n_head = 256 * 256 + 256, 2 * 256 + 256 * 1408 + 1408
    n_attention = 2 * 256 + 256 * 1536 + 512 * 256 + 256
    n_mlp = 2 * 256 + 256 * 512 + 512 + 512 * 256 + 256
    n_tokens = 2 * 256  # the class token and the missing-audio embedding
    n = sum(p.numel() for p in psi.parameters())
    assert n == n_projection + 8 * (n_attention + n_mlp) + n_head + n_tokens
    assert round(n / 1e6, 2) == 6.74  # METHODS 5.5


def test_silent_segments_share_one_gate_whatever_their_map_holds():
    psi = _make(p_missing=0, **STILL)
    audio_map, has_audio = _make_sound(5)
    has_audio[1:4] = False
    audio_map[1], audio_map[2] = torch.nan, torch.inf
    for mode in (True, False):
        psi.train(mode)
        gates = psi(audio_map, has_audio)
        other = psi(torch.where(has_audio[:, None, None, None], audio_map, 7.0), has_audio)
        for path in PATHS:
            torch.testing.assert_close(gates[path][1:4], gates[path][1].expand(3, -1))
            assert torch.equal(gates[path][1:4], other[path][1:4])
            assert (gates[path][1] - gates[path][0]).abs().max() > 1e-3
            # What the others get doesn't depend on the company.
            alone = psi(audio_map[4:], has_audio[4:])[path]
            torch.testing.assert_close(alone, gates[path][4:])
    loss = sum(g.square().sum() for g in psi(audio_map, has_audio).values())
    gradients = dict(zip(dict(psi.named_parameters()), torch.autograd.grad(loss, list(psi.parameters())), strict=True))
    assert all(torch.isfinite(g).all() for g in gradients.values())  # NaN doesn't come back through the projection
    assert gradients["missing_audio"].abs().min() > 0


def test_every_parameter_has_a_gradient_with_and_without_sound():
    """Distributed training waits for all of them."""
    psi = _make(p_missing=0)
    audio_map, has_audio = _make_sound(2)
    for heard, unused in ((True, "missing_audio"), (False, "projection.weight")):
        loss = sum(g.sum() for g in psi(audio_map, torch.full_like(has_audio, heard)).values())
        gradients = torch.autograd.grad(loss, list(psi.parameters()))
        for (name, _), gradient in zip(psi.named_parameters(), gradients, strict=True):
            if name == unused:
                assert not gradient.any()
            elif not name.startswith("projection") or heard:
                assert gradient.any(), name


def test_sound_is_withheld_in_training_alone():
    psi = _make(p_missing=0.25, **STILL)
    n = 400
    audio_map, has_audio = _make_sound(n)
    heard = psi.eval()(audio_map, has_audio)["trunk_slow"]
    silent = psi(audio_map[:1], torch.zeros(1, dtype=torch.bool))["trunk_slow"]
    assert (heard - silent).abs().amax(dim=1).min() > 1e-4  # in evaluation no sound is withheld
    torch.manual_seed(5)
    found = psi.train()(audio_map, has_audio)["trunk_slow"]
    withheld = (found - silent).abs().amax(dim=1) < 1e-6
    torch.testing.assert_close(found[~withheld], heard[~withheld])
    assert 70 <= withheld.sum() <= 130  # 100 expected, standard deviation 8.7
    torch.manual_seed(5)
    assert torch.equal(psi(audio_map, has_audio)["trunk_slow"], found)
    assert has_audio.all()  # the batch itself is as it was


def test_mixed_precision_gives_gates_in_single():
    psi = _make(p_missing=0, **STILL)
    audio_map, has_audio = _make_sound(3)
    has_audio[0] = False
    wanted = psi(audio_map, has_audio)
    with torch.autocast("cpu", torch.bfloat16):
        found = psi(audio_map.bfloat16(), has_audio)
    for path in PATHS:
        assert found[path].dtype == torch.float32
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=0.02)
