"""The methods of alignment as wholes: what they compute, how they are built and found."""

from __future__ import annotations

import alignment_batches as alignment
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from echoshift.pipeline.errors import RunError
from echoshift.train.alignment.config import AlignmentConfig, AlignmentScheduleConfig
from echoshift.train.alignment.method import build_method, list_builtin
from echoshift.train.alignment.run import plan_schedule
from echoshift.train.alignment.two_streams import MaskedBatchNorm
from echoshift.train.features import FeatureBatch
from echoshift.train.loop import Dropouts
from echoshift.train.settings import make_config


@pytest.mark.parametrize("method", list_builtin())
def test_a_step_moves_every_weight_and_the_buffers_that_a_method_has(method):
    built = alignment.build(method).train()
    before = {name: value.clone() for name, value in built.named_buffers()}
    terms = built.losses(alignment.make_step(progress=0.2 if method != "hna" else 0.0), Dropouts())
    assert terms.isfinite().all() and terms[0] > 0 and len(terms) == len(built.loss_names)
    terms.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.parameters())
    moved = sum(not torch.equal(value, before[name]) for name, value in built.named_buffers())
    assert moved == {"adabn": 4, "hna": 1}.get(method, 0)


@pytest.mark.parametrize("method", list_builtin())
def test_predictions_are_probabilities_and_training_alone_decides_nothing_of_them(method):
    built = alignment.build(method).eval()
    batch = alignment.make_batch(4, 3)
    found = built.predict(batch, "target")
    assert found.shape == (4, alignment.N_CLASSES)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    one_by_one = [built.predict(batch.cut(i, i + 1), "target") for i in range(4)]
    torch.testing.assert_close(found, torch.cat(one_by_one))


@pytest.mark.parametrize("method", list_builtin())
def test_without_a_target_only_terms_of_the_source_are_left(method):
    built = alignment.build(method).train()
    terms = built.losses(alignment.make_step(has_target=False), Dropouts())
    names = built.loss_names
    assert len(terms) == len(names)
    for name, term in zip(names, terms.tolist(), strict=True):
        of_target = name.endswith("target") or name.startswith(("domain", "MMD"))
        assert (term == 0) == of_target, name


def test_the_seed_alone_decides_the_weights_and_torchs_generator_goes_on():
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
def test_the_papers_networks_have_these_many_parameters(method, changes, beyond):
    shapes = type(alignment.SHAPES)({"pooled": (2304,)}, 512)
    needs = alignment.NEEDS.get(method, {})
    config = AlignmentConfig.model_validate({"method": method, **needs, **changes})
    with torch.device("meta"):
        built = build_method(config, shapes, 8, 0)
    # Two projections to 1024, two classifiers of 8 classes; joined, one classifier has one bias less a class.
    streams = 2304 * 1024 + 1024 + 512 * 1024 + 1024 + 2 * (1024 * 8 + 8)
    assert sum(p.numel() for p in built.parameters()) == streams + beyond


# The two streams


def test_late_fusion_sums_the_logits_of_sounding_segments_and_mid_joins_the_features():
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


def test_clips_are_averaged_before_or_after_the_projection():
    batch = alignment.make_batch(3, 5, n_clips=4)
    averaged = FeatureBatch({"pooled": batch.visual["pooled"].mean(dim=1, keepdim=True)}, batch.audio, batch.has_audio)
    before = alignment.build("source_only", network={"clips": "mean"}).eval()
    after = alignment.build("source_only", network={"clips": "each"}).eval()
    torch.testing.assert_close(before.predict(batch, "source"), before.predict(averaged, "source"))
    assert (after.predict(batch, "source") - before.predict(batch, "source")).abs().max() > 1e-3


def test_one_modality_sees_nothing_of_the_other():
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


def test_masked_batch_norm_is_torchs_on_the_rows_that_count():
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


def test_adabns_statistics_are_the_targets_and_the_target_alone_is_predicted_with_them():
    built = alignment.build("adabn").train()
    step = alignment.make_step(3, n_clips=1)
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


def test_hna_keeps_the_norm_half_way_between_those_of_the_first_batch():
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


def test_a_wrong_name_is_met_with_the_nearest():
    with pytest.raises(RunError, match=r"alignment.toml: method: unknown method 'mmsada'; did you mean 'mm_sada'\?"):
        make_config(AlignmentConfig, {"method": "mmsada"}, "alignment.toml")
    with pytest.raises(RunError, match="unknown method 'xyz'; there are adabn, align, "):
        make_config(AlignmentConfig, {"method": "xyz"}, "alignment.toml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "mmd"}, "method mmd adapts to the target; it needs setting 'uda'"),
        ({"method": "adabn", "setting": "uda"}, "adabn needs network.batch_norm=true"),
        ({"method": "yang_rerun", "setting": "uda"}, "yang_rerun needs network.fusion=mid"),
        ({"method": "rna", "network": {"modalities": "audio"}}, "rna needs network.modalities=both"),
        ({"network": {"modalities": "audio", "fusion": "mid"}}, "fusion 'mid' needs modalities 'both'"),
        ({"mmd": {"k_first": 2, "k_last": 1}}, "`k_first` is above `k_last`"),
        ({"network": {"depth": 2}}, r"network.depth: no such key"),
    ],
)
def test_what_cannot_go_together_is_refused(settings, words):
    with pytest.raises(RunError, match=words):
        make_config(AlignmentConfig, settings, "here")


def test_the_schedule_is_that_of_methods_7():
    config = AlignmentScheduleConfig()
    alone, adapting = plan_schedule(config, has_target=False), plan_schedule(config, has_target=True)
    assert (alone.n_source, alone.n_target, adapting.n_source, adapting.n_target) == (128, 0, 64, 64)
    assert (alone.optimiser, alone.momentum, alone.weight_decay, alone.n_steps) == ("sgd", 0.9, 1e-7, 9000)
    assert [alone.find_lr(step) for step in (0, 2999, 3000, 8999)] == [0.01, 0.01, 0.001, 0.001]
    assert alone.snapshots == (8600, 8650, 8700, 8750, 8800, 8850, 8900, 8950)  # and the last, 9000
    with pytest.raises(RunError, match="begin before the first step; raise n_steps"):
        make_config(AlignmentScheduleConfig, {"n_steps": 400}, "here")
