"""The methods of alignment as wholes: what they compute, alone and stacked, and how they are built."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F

from echoshift.pipeline.errors import RunError
from echoshift.train.alignment.config import METHOD_NAMES, AlignmentConfig
from echoshift.train.alignment.masked_batch_norm import MaskedBatchNorm
from echoshift.train.alignment.methods import METHODS
from echoshift.train.alignment.schedule import AlignmentScheduleConfig, plan_schedule
from echoshift.train.cached.batches import Dropouts, FeatureBatch, StepInputs
from echoshift.train.overrides import make_config


class Losses(nn.Module):
    """Has a method's losses as its forward pass, which functional_call asks for."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, step: StepInputs, draws: Tensor) -> Tensor:
        return self.method.losses(step, Dropouts(draws))


def stack_steps(steps: list[StepInputs]) -> tuple[object, ...]:
    """Stack each tensor of steps' source, target and progress; what no step has can't be mapped over."""

    def stack(*parts: object) -> object:
        first = parts[0]
        if isinstance(first, Tensor):
            return torch.stack(parts)  # type: ignore[arg-type]
        if isinstance(first, dict):
            return {name: stack(*(part[name] for part in parts)) for name in first}  # type: ignore[index]
        return type(first)(*(stack(*of_field) for of_field in zip(*parts, strict=True)))  # type: ignore[call-overload]

    return tuple(stack(*parts) for parts in zip(*((s.source, s.target, s.progress) for s in steps), strict=True))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_two_stacked_copies_come_to_what_each_comes_to_alone(alignment: ModuleType, method: str) -> None:
    alone = [alignment.build(method, seed).train() for seed in range(2)]
    steps = [alignment.make_step(seed, progress=0.0) for seed in range(2)]
    counted = Dropouts()
    alignment.build(method).losses(steps[0], counted)
    draws = torch.rand(2, counted.n_taken, generator=torch.Generator().manual_seed(5))
    wrapped = [Losses(alignment.build(method, seed).train()) for seed in range(2)]
    parameters, buffers = stack_module_state(wrapped)
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    template = wrapped[0].to("meta")

    def compute(of_run: object, held: object, parts: tuple[Any, Any, Tensor], of_draws: Tensor) -> Tensor:
        step = StepInputs(parts[0], parts[1], None, parts[2])
        return functional_call(template, (of_run, held), (step, of_draws))  # type: ignore[arg-type]

    terms = torch.vmap(compute)(parameters, buffers, stack_steps(steps), draws)
    terms.sum().backward()
    assert terms.shape == (2, len(alone[0].loss_names))
    for run in range(2):
        expected = alone[run].losses(steps[run], Dropouts(draws[run]))
        assert expected.isfinite().all() and expected[0] > 0
        torch.testing.assert_close(terms[run], expected, rtol=1e-4, atol=1e-5)
        expected.sum().backward()
        for name, parameter in alone[run].named_parameters():
            gradient = parameters[f"method.{name}"].grad
            assert gradient is not None
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient[run], own, rtol=1e-3, atol=1e-5, msg=name)
        for name, buffer in alone[run].named_buffers():
            torch.testing.assert_close(buffers[f"method.{name}"][run], buffer, msg=name)
    moved = {"adabn": 4, "hna": 1}.get(method, 0)
    fresh = dict(Losses(alignment.build(method)).named_buffers())
    assert sum(not torch.equal(buffers[name][0], fresh[name]) for name in fresh) == moved


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_predictions_are_probabilities_and_training_alone_decides_nothing_of_them(
    alignment: ModuleType, method: str
) -> None:
    built = alignment.build(method).eval()
    batch = alignment.make_batch(4, 3)
    found = built.predict(batch, "target")
    assert found.shape == (4, alignment.N_CLASSES)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    singles = [slice(i, i + 1) for i in range(4)]
    one_by_one = [
        built.predict(
            FeatureBatch({"pooled": batch.visual["pooled"][one]}, batch.audio[one], batch.has_audio[one]), "target"
        )
        for one in singles
    ]
    torch.testing.assert_close(found, torch.cat(one_by_one))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_without_a_target_only_terms_of_the_source_are_left(alignment: ModuleType, method: str) -> None:
    built = alignment.build(method).train()
    terms = built.losses(alignment.make_step(has_target=False), Dropouts())
    names = built.loss_names
    assert len(terms) == len(names)
    for name, term in zip(names, terms.tolist(), strict=True):
        of_target = name.endswith("target") or name.startswith(("domain", "MMD"))
        assert (term == 0) == of_target, name


def test_the_seed_alone_decides_the_weights_and_torchs_generator_goes_on(alignment: ModuleType) -> None:
    torch.manual_seed(1)
    first, after = alignment.build("mm_sada", 3).state_dict(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    again, other = alignment.build("mm_sada", 3).state_dict(), alignment.build("mm_sada", 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["streams.project_visual.weight"], other["streams.project_visual.weight"])
    of_rna = alignment.build("rna", 3).state_dict()
    assert all(torch.equal(of_rna[name], first[name]) for name in of_rna), "methods begin with the same streams"


@pytest.mark.parametrize(
    ("method", "changes", "beyond"),
    [
        ("rna", {}, 0),
        ("source_only", {"network": {"batch_norm": True}}, 2 * 2 * 1024),
        ("synchronisation", {}, 2048 * 100 + 100 + 100 * 2 + 2),
        ("grl", {}, 2 * (1024 * 100 + 100 + 100 * 2 + 2)),
        ("mm_sada", {}, 2048 * 100 + 100 + 202 + 2 * (1024 * 100 + 100 + 202)),
        ("yang_rerun", {}, 1024 * 100 + 100 + 202 - 8),
    ],
)
def test_the_papers_networks_have_these_many_parameters(
    alignment: ModuleType, method: str, changes: dict[str, object], beyond: int
) -> None:
    shapes = type(alignment.SHAPES)({"pooled": (2304,)}, 512)
    needs = alignment.NEEDS.get(method, {})
    config = AlignmentConfig.model_validate({"method": method, **needs, **changes})
    with torch.device("meta"):
        built = METHODS[method](config, shapes, 8)
    # Two projections to 1024, two classifiers of 8 classes; joined, one classifier has one bias less a class.
    streams = 2304 * 1024 + 1024 + 512 * 1024 + 1024 + 2 * (1024 * 8 + 8)
    assert sum(p.numel() for p in built.parameters()) == streams + beyond


# The two streams


def test_late_fusion_sums_the_logits_of_sounding_segments_and_mid_joins_the_features(alignment: ModuleType) -> None:
    batch = alignment.make_batch(3, 4)
    for fusion in ("late", "mid"):
        built = alignment.build("source_only", network={"fusion": fusion, "clips": "each"}).eval()
        state = {name.removeprefix("streams."): value.numpy() for name, value in built.state_dict().items()}
        for i in range(3):
            clips = batch.visual["pooled"][i].numpy() @ state["project_visual.weight"].T + state["project_visual.bias"]
            visual = np.maximum(clips, 0).mean(axis=0)
            audio = np.maximum(
                batch.audio[i].numpy() @ state["project_audio.weight"].T + state["project_audio.bias"], 0
            )
            audio = audio * (i != 1)  # segment 1 is silent
            if fusion == "late":
                logits = visual @ state["classify_visual.weight"].T + state["classify_visual.bias"]
                if i != 1:
                    logits = logits + audio @ state["classify_audio.weight"].T + state["classify_audio.bias"]
            else:
                joined = np.concatenate([visual, audio])
                logits = joined @ state["classify_both.weight"].T + state["classify_both.bias"]
            expected = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(built.predict(batch, "target")[i].detach(), expected, rtol=1e-5)


def test_clips_are_averaged_before_or_after_the_projection(alignment: ModuleType) -> None:
    batch = alignment.make_batch(3, 5, n_clips=4)
    averaged = FeatureBatch({"pooled": batch.visual["pooled"].mean(dim=1, keepdim=True)}, batch.audio, batch.has_audio)
    before = alignment.build("source_only", network={"clips": "mean"}).eval()
    after = alignment.build("source_only", network={"clips": "each"}).eval()
    torch.testing.assert_close(before.predict(batch, "source"), before.predict(averaged, "source"))
    assert (after.predict(batch, "source") - before.predict(batch, "source")).abs().max() > 1e-3


def test_one_modality_sees_nothing_of_the_other(alignment: ModuleType) -> None:
    batch, other = alignment.make_batch(4, 6), alignment.make_batch(4, 7)
    seeing = alignment.build("source_only", network={"modalities": "visual"}).eval()
    hearing = alignment.build("source_only", network={"modalities": "audio"}).eval()
    foreign_sound = FeatureBatch(batch.visual, other.audio, other.has_audio)
    foreign_pictures = FeatureBatch(other.visual, batch.audio, batch.has_audio)
    assert torch.equal(seeing.predict(batch, "target"), seeing.predict(foreign_sound, "target"))
    assert torch.equal(hearing.predict(batch, "target"), hearing.predict(foreign_pictures, "target"))
    torch.testing.assert_close(hearing.predict(batch, "target")[1], torch.full((3,), 1 / 3))  # it is silent
    step = alignment.make_step(has_target=False)
    labels = step.source.labels.clone()
    labels[1] = (labels[1] + 1) % 3  # a silent segment's label teaches sound nothing
    changed = step._replace(source=step.source._replace(labels=labels))
    assert torch.equal(hearing.losses(step, Dropouts()), hearing.losses(changed, Dropouts()))


# BatchNorm and AdaBN


def test_masked_batch_norm_is_torchs_on_the_rows_that_count() -> None:
    rng = torch.Generator().manual_seed(8)
    ours, theirs = MaskedBatchNorm(5, per_domain=False).train(), nn.BatchNorm1d(5).train()
    for step in range(3):
        values = 3 * torch.randn(9, 5, generator=rng) + step
        counted = torch.rand(9, generator=rng) < 0.6
        torch.testing.assert_close(ours(values, counted, "source")[counted], theirs(values[counted]))
    torch.testing.assert_close(ours.running_mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.running_var[0], theirs.running_var)
    before = ours.running_mean.clone()
    ours(torch.randn(4, 5, generator=rng), torch.zeros(4, dtype=torch.bool), "source")
    assert torch.equal(ours.running_mean, before)
    values = torch.randn(4, 5, generator=rng)
    torch.testing.assert_close(ours.eval()(values, torch.ones(4, dtype=torch.bool), "target"), theirs.eval()(values))


def test_adabns_statistics_are_the_targets_and_the_target_alone_is_predicted_with_them(alignment: ModuleType) -> None:
    built = alignment.build("adabn").train()
    step = alignment.make_step(3, n_clips=1)
    assert step.target is not None
    for _ in range(200):  # 0.9^200 of the initial statistics are left
        built.losses(step, Dropouts())
    norm, streams = built.streams.norm_visual, built.streams
    for domain, inputs, row in (("source", step.source.inputs, 0), ("target", step.target.inputs, 1)):
        features = F.relu(streams.project_visual(inputs.visual["pooled"][:, 0])).detach().numpy()
        np.testing.assert_allclose(norm.running_mean[row], features.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norm.running_var[row], features.var(axis=0, ddof=1), rtol=1e-4, atol=1e-6)
        sound = F.relu(streams.project_audio(inputs.audio[inputs.has_audio])).detach().numpy()
        np.testing.assert_allclose(streams.norm_audio.running_mean[row], sound.mean(axis=0), rtol=1e-4, atol=1e-6)
        normalised = streams.eval().encode(inputs, domain).visual.detach().numpy()
        expected = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0, ddof=1) + 1e-5)
        np.testing.assert_allclose(normalised, expected, rtol=1e-3, atol=1e-4)
        streams.train()
    # The target moves no weight: the gradient is that of source only.
    other = alignment.build("source_only", network={"batch_norm": True}).train()
    fresh = alignment.build("adabn").train()
    fresh.losses(step, Dropouts()).sum().backward()
    other.losses(step, Dropouts()).sum().backward()
    for (name, one), two in zip(fresh.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_hna_keeps_the_norm_half_way_between_those_of_the_first_batch(alignment: ModuleType) -> None:
    built = alignment.build("hna").train()
    first = alignment.make_step(1, progress=0.0)
    features = built.streams.encode(first.source.inputs, "source")
    norms = [np.linalg.norm(f.detach().numpy(), axis=1) for f in features[:2]]
    expected = (norms[0].mean() + norms[1][features.heard.numpy()].mean()) / 2
    for step in (first, alignment.make_step(2, progress=0.1), alignment.make_step(3, progress=1.0)):
        built.losses(step, Dropouts())
        assert built.norm.item() == pytest.approx(expected, rel=1e-5)
    fixed = alignment.build("hna", hna={"norm": 2.5}).train()
    fixed.losses(first, Dropouts())
    assert fixed.norm.item() == 2.5


# Configuration


def test_names_and_builders_are_the_same_and_a_wrong_name_is_met_with_the_nearest() -> None:
    assert tuple(METHODS) == METHOD_NAMES
    with pytest.raises(RunError, match=r"alignment.toml: method: .*no method 'mmsada'; did you mean 'mm_sada'\?"):
        make_config(AlignmentConfig, {"method": "mmsada"}, "alignment.toml")
    with pytest.raises(RunError, match="no method 'xyz'; there are source_only, rna, "):
        make_config(AlignmentConfig, {"method": "xyz"}, "alignment.toml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "mmd"}, "method mmd adapts to the target; it needs setting 'uda'"),
        ({"method": "adabn", "setting": "uda"}, "adabn needs network.batch_norm = true"),
        ({"method": "yang_rerun", "setting": "uda"}, "yang_rerun needs network.fusion = 'mid'"),
        ({"method": "rna", "network": {"modalities": "audio"}}, "rna needs modalities 'both'"),
        ({"network": {"modalities": "audio", "fusion": "mid"}}, "fusion 'mid' needs modalities 'both'"),
        ({"mmd": {"k_first": 2, "k_last": 1}}, "`k_first` is above `k_last`"),
        ({"network": {"depth": 2}}, r"network.depth: no such key"),
    ],
)
def test_what_cannot_go_together_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RunError, match=words):
        make_config(AlignmentConfig, settings, "here")


def test_the_schedule_is_that_of_methods_7() -> None:
    config = AlignmentScheduleConfig()
    alone, adapting = plan_schedule(config, has_target=False), plan_schedule(config, has_target=True)
    assert (alone.n_source, alone.n_target, adapting.n_source, adapting.n_target) == (128, 0, 64, 64)
    assert (alone.optimiser, alone.momentum, alone.weight_decay, alone.n_steps) == ("sgd", 0.9, 1e-7, 9000)
    assert [alone.find_lr(step) for step in (0, 2999, 3000, 8999)] == [0.01, 0.01, 0.001, 0.001]
    assert alone.snapshots == (8600, 8650, 8700, 8750, 8800, 8850, 8900, 8950)  # and the last, 9000
    with pytest.raises(RunError, match="begin before the first step; raise n_steps"):
        make_config(AlignmentScheduleConfig, {"n_steps": 400}, "here")
