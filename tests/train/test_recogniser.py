"""The recogniser, and each term of Eq. 8, against the paper's equations written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from echoshift.pipeline.cards import MANIFESTS_DIR, read_dataset_card
from echoshift.train.features import FeatureBatch, FeatureShapes
from echoshift.train.loop import (
    Dropouts,
    LabelledTargetFeatures,
    SourceFeatures,
    StepInputs,
    TargetFeatures,
    compute_class_loss,
)
from echoshift.train.settings import merge_settings, resolve_config
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import AudioInfusedRecogniser, build_recogniser

N_CLASSES, N_AUDIO, N_VISUAL, N_CLIPS = 4, 6, 10, 3
SMALL: dict[str, Any] = {
    "width": 8,
    "n_heads": 2,
    "head_width": 4,
    "mlp_width": 12,
    "visual_width": 5,
    "n_layers": 2,
    "fc_width": 7,
}
SHAPES = FeatureShapes({"pooled": (N_VISUAL,)}, N_AUDIO)


def make_config(**recogniser: Any) -> Stage2Config:
    settings: dict[str, Any] = {"recogniser": {**SMALL, **recogniser.pop("recogniser", {})}}
    return Stage2Config.model_validate(merge_settings(settings, recogniser))


def build(
    config: Stage2Config, seed: int = 0, shapes: FeatureShapes = SHAPES, n_classes: int = N_CLASSES
) -> AudioInfusedRecogniser:
    return build_recogniser(config, shapes, n_classes, torch.linspace(-1, 1, shapes.n_audio), seed)


def make_batch(n: int, seed: int = 0) -> FeatureBatch:
    rng = torch.Generator().manual_seed(seed)
    visual = torch.randn(n, N_CLIPS, N_VISUAL, generator=rng)
    has_audio = torch.ones(n, dtype=torch.bool)
    has_audio[0] = False
    return FeatureBatch({"pooled": visual}, torch.randn(n, N_AUDIO, generator=rng), has_audio)


def make_step(seed: int = 0, *, labelled: bool = False) -> StepInputs:
    rng = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, N_CLASSES, (5,), generator=rng)
    pseudo = torch.tensor([1, -1, 3, 0])
    return StepInputs(
        SourceFeatures(make_batch(5, seed), labels, torch.zeros(5, dtype=torch.int64)),
        TargetFeatures(make_batch(4, seed + 100), pseudo),
        LabelledTargetFeatures(make_batch(2, seed + 200), labels[:2]) if labelled else None,
        torch.tensor(0.5),
    )


# An independent forward pass, token by token, without the last layer's shortcut and without a batch.


def layer_norm(x: np.ndarray, state: dict[str, np.ndarray], name: str) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: np.ndarray, state: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def run_layer(tokens: np.ndarray, state: dict[str, np.ndarray], name: str) -> np.ndarray:
    normed = layer_norm(tokens, state, f"{name}.attention_norm")
    query, key, value = np.split(normed @ state[f"{name}.qkv.weight"].T, 3, axis=1)
    heads = []
    for h in range(SMALL["n_heads"]):
        part = slice(h * SMALL["head_width"], (h + 1) * SMALL["head_width"])
        scores = query[:, part] @ key[:, part].T / np.sqrt(SMALL["head_width"])
        heads.append(softmax(scores) @ value[:, part])
    tokens = tokens + linear(np.concatenate(heads, axis=1), state, f"{name}.attention_out")
    hidden = gelu(linear(layer_norm(tokens, state, f"{name}.mlp_norm"), state, f"{name}.mlp_in"))
    return tokens + linear(hidden, state, f"{name}.mlp_out")


def select_by_hand(
    state: dict[str, np.ndarray], audio: np.ndarray, visual: np.ndarray, *, sees: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """The logits of h [K] and, where it `sees`, of h' [n_clips, K] of one segment."""
    h = linear(audio, state, "sound_token.heard.out")
    if not sees:
        return h, None
    narrow = linear(visual, state, "sound_token.narrow")
    narrow = np.maximum(layer_norm(narrow, state, "sound_token.narrow_norm"), 0)
    mixture = np.tile(softmax(h) @ state["sound_token.bank"], (N_CLIPS, 1))
    return h, linear(np.concatenate([mixture, narrow], axis=1), state, "sound_token.chosen.out")


def iterate_by_hand(model: AudioInfusedRecogniser, batch: FeatureBatch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What is heard and seen of each segment."""
    for visual, audio, heard in zip(batch.visual["pooled"], batch.audio, batch.has_audio, strict=True):
        yield (audio if heard else model.missing_sound.detach()).double().numpy(), visual.double().numpy()


def predict_by_hand(model: AudioInfusedRecogniser, batch: FeatureBatch, domain: int) -> np.ndarray:
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    chosen, found = model.config.recogniser, []
    for audio, visual in iterate_by_hand(model, batch):
        tokens = linear(visual, state, "embed_visual.pooled")
        if chosen.domain_embedding == "per_domain":
            tokens = tokens + state["domain"][domain]
        elif chosen.domain_embedding == "shared":
            tokens = tokens + state["domain"][0]
        if chosen.class_token == "learnable":
            first = state["class_token"][None]
        else:
            h, h_prime = select_by_hand(state, audio, visual, sees=chosen.class_token == "h_prime")
            vectors = softmax(h[None] if h_prime is None else h_prime) @ state["sound_token.bank"]
            first = vectors if chosen.class_tokens == "per_clip" else vectors.mean(0, keepdims=True)
        sequence = [first, tokens]
        if chosen.audio_tokens:
            sequence.append(np.tile(linear(audio, state, "embed_audio"), (N_CLIPS, 1)))
        states = np.concatenate(sequence)
        for layer in range(chosen.n_layers):
            states = run_layer(states, state, f"transformer.layers.{layer}")
        logits = linear(layer_norm(states[: len(first)], state, "head_norm"), state, "head").mean(0)
        found.append(softmax(logits))
    return np.stack(found)


Z_M = {"class_token": "learnable", "audio_tokens": True, "domain_embedding": "none"}


@pytest.mark.parametrize(
    "recogniser",
    [
        Z_M,
        {**Z_M, "domain_embedding": "per_domain"},
        {**Z_M, "domain_embedding": "shared", "audio_tokens": False},
        {},
        {"class_token": "h"},
        {"class_tokens": "per_clip"},
    ],
    ids=["z^m", "z'", "shared", "z", "h", "a token a clip"],
)
@pytest.mark.parametrize("domain", ["source", "target"])
def test_a_prediction_is_that_of_the_equations(recogniser, domain):
    model = build(make_config(recogniser=recogniser)).eval()
    batch = make_batch(4)
    with torch.no_grad():
        found = model.predict(batch, domain).numpy()
    np.testing.assert_allclose(found, predict_by_hand(model, batch, 1 if domain == "target" else 0), atol=1e-5)


def test_the_released_recogniser_has_the_parameters_of_the_released_code():
    config = resolve_config(Stage2Config, read_dataset_card("epic", MANIFESTS_DIR), "released")
    model = build(config, shapes=FeatureShapes({"pooled": (2304,)}, 512), n_classes=8)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    # 3.81 M (METHODS section 6); the missing-sound embedding, which the released code hasn't, isn't trained.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_810_008
    assert not model.missing_sound.requires_grad
    assert counts["transformer"] == 3 * 788_480
    assert counts["sound_token"] == 267_784 + 300_552 + 147_648 + 4_096 + 131_328
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["sound_token.heard.hidden.weight"] == (512, 512)
    assert shapes["sound_token.chosen.hidden.weight"] == (512, 576)
    assert shapes["sound_token.to_token.weight"] == (256, 512)
    assert shapes["sound_token.narrow.weight"] == (64, 2304)


def test_flow_and_charades_have_their_own_settings():
    epic = read_dataset_card("epic", MANIFESTS_DIR)
    charades = read_dataset_card("charades_ego", MANIFESTS_DIR)
    assert resolve_config(Stage2Config, epic, "released", sees_flow=True).schedule.n_epochs == 24
    assert resolve_config(Stage2Config, epic, "released").schedule.n_epochs == 29
    assert resolve_config(Stage2Config, epic, "released", sees_flow=True).recogniser.class_tokens == "per_clip"
    paper = resolve_config(Stage2Config, epic, "paper", sees_flow=True).recogniser
    assert (paper.class_tokens, paper.width, paper.n_layers, paper.n_heads, paper.bank_width) == ("mean", 512, 2, 8, 0)
    assert resolve_config(Stage2Config, epic, "quick", sees_flow=True).schedule.n_steps == 300
    released = resolve_config(Stage2Config, charades, "released")
    assert (released.recogniser.n_layers, released.pseudo_labels.kind, released.recogniser.over_clips) == (
        2, "none", "max"
    )  # fmt: skip


def test_the_loss_is_equation_8():
    config = make_config(loss={"source": 0.5, "target": 0.25, "h": 0.1, "h_prime": 0.02})
    model, step = build(config).eval(), make_step()
    with torch.no_grad():
        terms = dict(zip(model.loss_names, model.losses(step, Dropouts()).tolist(), strict=True))
        target = step.target
        p_source, p_target = model.predict(step.source.inputs, "source"), model.predict(target.inputs, "target")
        expected = -0.5 * p_source[range(5), step.source.labels].log().mean()
        assert terms["source"] == pytest.approx(float(expected), rel=1e-5)
        known = [0, 2, 3]  # the second has no pseudo-label
        expected = -0.25 * p_target[known, target.pseudo_labels[known]].log().mean()
        assert terms["target"] == pytest.approx(float(expected), rel=1e-5)
        assert terms["labelled target"] == 0


def select_all(model: AudioInfusedRecogniser, batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray]:
    """The logits of h [B, K] and of h' [B, n_clips, K]."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    found = [select_by_hand(state, audio, visual) for audio, visual in iterate_by_hand(model, batch)]
    return np.stack([h for h, _ in found]), np.stack([h_prime for _, h_prime in found])


def make_pair(labels: Tensor, pseudo: Tensor | None = None) -> StepInputs:
    """Make a step of four segments of each domain, the first silent."""
    source = SourceFeatures(make_batch(4), labels, torch.zeros(4, dtype=torch.int64))
    return StepInputs(
        source, None if pseudo is None else TargetFeatures(make_batch(4, 100), pseudo), None, torch.tensor(0.0)
    )


def compute_terms(
    model: AudioInfusedRecogniser, step: StepInputs, dropouts: Dropouts | None = None
) -> dict[str, float]:
    with torch.no_grad():
        terms = model.losses(step, dropouts or Dropouts())
    return dict(zip(model.loss_names, terms.tolist(), strict=True))


def test_h_prime_is_learned_from_each_clip_of_silent_segments_too():
    def cross_entropy(logits: np.ndarray, label: int) -> float:
        return float(np.log(np.exp(logits).sum()) - logits[label])

    model, labels, pseudo = build(make_config()).eval(), [2, 0, 1, 1], [-1, 2, 0, -1]
    step = make_pair(torch.tensor(labels), torch.tensor(pseudo))
    of_source, of_target = (select_all(model, part.inputs) for part in (step.source, step.target))
    source = [cross_entropy(of_source[1][i, c], labels[i]) for i in range(4) for c in range(N_CLIPS)]
    target = [cross_entropy(of_target[1][i, c], pseudo[i]) for i in (1, 2) for c in range(N_CLIPS)]
    terms = compute_terms(model, step)
    assert terms["h'"] == pytest.approx(0.1 * (np.mean(source) + np.mean(target)), rel=1e-5)
    heard = np.mean([cross_entropy(of_source[0][i], labels[i]) for i in (1, 2, 3)])
    of_both = heard + np.mean([cross_entropy(of_target[0][i], pseudo[i]) for i in (1, 2)])
    assert terms["h"] == pytest.approx(0.1 * of_both, rel=1e-5)


def test_a_target_without_any_pseudo_label_adds_nothing():
    model, labels = build(make_config()).eval(), torch.tensor([2, 0, 1, 1])
    with_none = compute_terms(model, make_pair(labels, torch.full((4,), -1)))
    assert with_none["target"] == 0
    assert with_none == pytest.approx(compute_terms(model, make_pair(labels)), rel=1e-6)


def test_h_mixes_by_softmax_and_is_learned_by_sigmoids_where_there_are_several_labels():
    model = build(make_config(), shapes=replace(SHAPES, multi_label=True)).eval()
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    pseudo = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    pseudo[1] = torch.nan
    step = make_pair(labels, pseudo)

    def average(logits: np.ndarray, wanted: Tensor, counted: list[int]) -> float:
        truth = wanted.double().numpy()[counted].reshape(len(counted), *[1] * (logits.ndim - 2), N_CLASSES)
        chosen = logits[counted]
        return float(np.mean(np.log1p(np.exp(chosen)) - truth * chosen))

    of_source, of_target = (select_all(model, part.inputs) for part in (step.source, step.target))
    terms = compute_terms(model, step)
    expected = average(of_source[0], labels, [1, 2, 3]) + average(of_target[0], pseudo, [2, 3])
    assert terms["h"] == pytest.approx(0.1 * expected, rel=1e-5)
    expected = average(of_source[1], labels, [0, 1, 2, 3]) + average(of_target[1], pseudo, [0, 2, 3])
    assert terms["h'"] == pytest.approx(0.1 * expected, rel=1e-5)


def test_withheld_sound_is_as_no_sound_in_training_alone():
    """The first numbers of a step withhold sound: here those of segments 1 and 2, under p_missing = 0.1."""
    model, draws = build(make_config(recogniser={"dropout": 0.0})), torch.tensor([0.5, 0.05, 0.0999, 0.1])
    step = make_pair(torch.tensor([2, 0, 1, 1]))
    silent = step.source.inputs._replace(has_audio=torch.tensor([False, False, False, True]))
    as_silent = step._replace(source=step.source._replace(inputs=silent))
    withheld = compute_terms(model.train(), step, Dropouts(lambda shape: draws))
    assert withheld == pytest.approx(compute_terms(model.eval(), as_silent), rel=1e-6)
    assert withheld["h"] != pytest.approx(compute_terms(model, step)["h"], rel=1e-3)


def test_sound_terms_on_the_source_leave_the_target_out():
    both, source = (
        build(make_config(loss={"sound_terms_on": on})).eval().losses(make_step(), Dropouts())
        for on in ("both", "source")
    )
    assert float(both[3].detach()) > float(source[3].detach()) > 0
    assert float(both[4].detach()) > float(source[4].detach()) > 0


def test_a_labelled_target_counts_as_the_target():
    model, step = build(make_config(loss={"target": 0.25})).eval(), make_step(labelled=True)
    with torch.no_grad():
        p = model.predict(step.labelled.inputs, "target")
        expected = -0.25 * p[range(2), step.labelled.labels].log().mean()
        assert float(model.losses(step, Dropouts())[2]) == pytest.approx(float(expected), rel=1e-5)


def test_class_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    by_hand = (np.log(1 + np.exp(-2.0)) + np.log(1 + np.exp(1.0))) / 2
    assert float(compute_class_loss(logits, torch.tensor([0, 0, -1]))) == pytest.approx(by_hand, rel=1e-6)
    assert float(compute_class_loss(logits, torch.full((3,), -1))) == 0
    several = torch.tensor([[1.0, 0.0], [0.0, 1.0], [float("nan")] * 2])
    softplus = [np.log(1 + np.exp(x)) for x in (-2.0, 0.0, 0.0, -1.0)]
    assert float(compute_class_loss(logits, several)) == pytest.approx(sum(softplus) / 4, rel=1e-6)


def test_what_is_missing_of_the_sound_is_looked_at_nowhere():
    model, batch = build(make_config()).eval(), make_batch(3)
    poisoned = batch._replace(audio=torch.where(batch.has_audio[:, None], batch.audio, 1e6))
    with torch.no_grad():
        assert torch.equal(model.predict(batch, "target"), model.predict(poisoned, "target"))


def test_a_mean_embedding_isn_t_learned_and_a_learned_one_is():
    for kind, learned in (("mean", False), ("learned", True)):
        model = build(make_config(missing_sound={"embedding": kind}))
        model.losses(make_step(), Dropouts()).sum().backward()
        assert (model.missing_sound.grad is not None and bool(model.missing_sound.grad.abs().sum() > 0)) is learned
        torch.testing.assert_close(model.missing_sound.detach(), torch.linspace(-1, 1, N_AUDIO))


def test_several_labels_are_sigmoids():
    shapes = FeatureShapes({"tokens_slow": (2, 5), "tokens_fast": (4, 3)}, N_AUDIO, multi_label=True)
    model = build(make_config(recogniser={"clips": "each"}), shapes=shapes).eval()
    rng = torch.Generator().manual_seed(0)
    visual = {
        "tokens_slow": torch.randn(3, 1, 2, 5, generator=rng),
        "tokens_fast": torch.randn(3, 1, 4, 3, generator=rng),
    }
    batch = FeatureBatch(visual, torch.randn(3, N_AUDIO, generator=rng), torch.ones(3, dtype=torch.bool))
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    step = StepInputs(SourceFeatures(batch, labels, torch.zeros(3, dtype=torch.int64)), None, None, torch.tensor(0.0))
    with torch.no_grad():
        p = model.predict(batch, "source")
        expected = F.binary_cross_entropy(p, labels)
        assert float(model.losses(step, Dropouts())[0]) == pytest.approx(float(expected), rel=1e-5)
    # Each token has a weight in the prediction, whatever its output.
    for name in visual:
        moved = {**visual, name: visual[name] + torch.eye(visual[name].shape[2])[-1][:, None]}
        with torch.no_grad():
            assert not torch.allclose(model.predict(batch._replace(visual=moved), "source"), p)


def test_the_seed_decides_the_weights_and_leaves_torch_s_generator_alone():
    torch.manual_seed(7)
    first = build(make_config(), seed=1).state_dict()
    torch.rand(3)
    again, other = build(make_config(), seed=1).state_dict(), build(make_config(), seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["sound_token.bank"], other["sound_token.bank"])
    drawn = torch.rand(1)
    torch.manual_seed(7)
    torch.rand(3)
    assert torch.equal(drawn, torch.rand(1))
