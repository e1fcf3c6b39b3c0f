"""Checks class activation maps against gradients taken by hand, and that they are laid over what the network saw."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from echoshift.extract.media import OpenMedia
from echoshift.pipeline.specs import FrameSpec
from echoshift.train.look.activation import (
    ActivationMap,
    ActivationMapper,
    draw_activation_maps,
    make_activation_maps,
    overlay_map,
    restore_frames,
)
from echoshift.train.look.run_choice import RunChoice, choose_stage1_run
from echoshift.train.stage1.frames import read_clips

IDS = ("t-test-0", "t-test-1")


@pytest.fixture(scope="module")
def mapped(compared: Any) -> Any:
    """Return a mapper of the checkpoint with two segments' maps."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import read_manifest
    from echoshift.train.splits import DataPlaces

    card = read_dataset_card("tiny", compared.root)
    places = DataPlaces(
        card, read_manifest(compared.root / "tiny.csv", card), compared.media, compared.root / "cache", "cpu"
    )
    runs_dir = compared.runs / "tiny"
    mapper = ActivationMapper(places, runs_dir, choose_stage1_run(runs_dir, RunChoice()))
    segments = {s.segment_id: s for s in places.manifest}
    with OpenMedia(places.media_root, card.media) as media:
        maps = [mapper.map(media, segments[name], "high") for name in IDS]
        clips = [read_clips(media, segments[name], mapper._spec).clips for name in IDS]
    return mapper, maps, clips


def test_it_is_grad_cam(mapped: Any) -> None:
    mapper, maps, clips = mapped
    model = mapper._model
    layer = model.gated.network.get_submodule(maps[0].layer)
    assert maps[0].layer == "blocks.4.multipathway_blocks.0"  # res5 of the slow path
    for name, found, clip in zip(IDS, maps, clips, strict=True):
        middle = clip[len(clip) // 2][None]
        with torch.no_grad():
            gates = model.compute_gates(mapper._audio.read_maps([name]), torch.ones(1, dtype=torch.bool))
        kept: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
        logits = model.gated({"clip": middle}, gates)
        hook.remove()
        (activations,) = kept
        (gradients,) = torch.autograd.grad(logits[0, 1], activations)  # class 1 is `high`
        weights = gradients.mean(dim=(2, 3, 4), keepdim=True)
        expected = F.relu((weights * activations).sum(dim=1, keepdim=True))
        expected = F.interpolate(expected, middle.shape[2:], mode="trilinear")[0, 0].detach().numpy()
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-7)
        assert found.class_name == "high"
        assert found.probability == pytest.approx(float(logits.detach().softmax(dim=1)[0, 1]), abs=1e-5)
        assert not any(p.grad is not None for p in model.parameters())


def test_frames_are_those_of_the_video_at_their_times(mapped: Any, compared: Any) -> None:
    _, maps, _ = mapped
    found = maps[1]  # 1 to 2 s of t-test.mp4
    with av.open(str(compared.media / "t-test.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    assert found.frames.shape[1:] == (32, 32, 3) and len(found.times_s) == len(found.frames)
    for frame, time_s in zip(found.frames, found.times_s, strict=True):
        number = int(np.floor(time_s * 12 + 1e-2))
        assert 12 <= number < 24
        # The short side goes to 36 pixels, of which the middle 32 are seen: the frame's own middle, a bit enlarged.
        errors = [np.abs(frame[8:24, 8:24].mean(axis=(0, 1)) - d[9:23, 9:23].mean(axis=(0, 1))).mean() for d in decoded]
        assert errors[number] < 6
        assert errors[number] <= sorted(errors)[2]


def test_frames_are_restored() -> None:
    spec = FrameSpec(short_side=4, crop=4, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0))
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mean, std = np.array(spec.mean), np.array(spec.std)
    clip = torch.from_numpy(((frames - mean) / std).transpose(3, 0, 1, 2).astype(np.float32))
    np.testing.assert_array_equal(restore_frames(clip, spec), frames)


def test_an_overlay_changes_where_the_map_is() -> None:
    frames = np.full((2, 3, 3, 3), 90, dtype=np.uint8)
    values = np.zeros((2, 3, 3), dtype=np.float32)
    np.testing.assert_array_equal(overlay_map(frames, values), frames)
    values[1, 2, 0] = 0.25
    laid = overlay_map(frames, values)
    changed = (laid != frames).any(axis=-1)
    assert changed.sum() == 1 and changed[1, 2, 0]
    # The end of inferno is (252, 255, 164); 65 % of it.
    assert laid[1, 2, 0].tolist() == pytest.approx([0.35 * 90 + 0.65 * c for c in (252, 255, 164)], abs=1.5)


def test_a_row_a_run_is_drawn(mapped: Any) -> None:
    _, maps, _ = mapped
    first: ActivationMap = maps[0]
    drawn = draw_activation_maps([first, first], None, "tiny (synthetic)", n_shown=3)
    n_frames = sum(len(axis.images) for axis in drawn.figure.axes)
    assert n_frames == 3 * 3  # the frames, and two rows of maps
    assert first.segment.segment_id in drawn.description and "stage1 s-t, seed 0 sees high" in drawn.description


def test_the_command_draws_all_kinds(
    compared: Any, tiny_shift: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["--media", compared.media, "--cache", compared.root / "cache", "--manifests", compared.root]
    places += ["--runs", compared.runs]
    code, out, err = tiny_shift.run("plot", "norms", "tiny", *places)
    assert code == 0, err
    assert "source_only: mean norm of frames" in out and "rna: mean norm of frames" in out
    assert (tmp_path / "reports" / "tiny" / "norms.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = tiny_shift.run("plot", "shares", "tiny", "--to", tmp_path / "s.svg", "--json", *places)
    assert code == 0, err
    assert '"accuracy": {"frames":' in out
    text = (tmp_path / "s.svg").read_text()
    assert ">share of the final score</text>" in text  # text is text
    code, out, err = tiny_shift.run("plot", "cam", "tiny", "--segment", "t-test-2", "--to", tmp_path / "c.png", *places)
    assert code == 0, err
    assert out.startswith("Class activation maps over a clip of t-test-2 (low), tiny (synthetic).")
    for arguments, words in (
        (["cam"], "a class activation map is of one segment; name it (--segment)"),
        (["cam", "--segment", "t-test-2", "--class", "lo"], "tiny has no class 'lo'; it has low, high, never"),
        (["cam", "--segment", "t-test-2", "--row", "+ z"], "no finished run of Stage 1 of row '+ z'"),
        (["norms", "--row", "a", "--row", "b"], "norms is of one run; name one --row"),
        (["norms", "--method", "grl"], "`echoshift align --set alignment.method=grl` makes one"),
    ):
        kind, *more = arguments
        code, _, err = tiny_shift.run("plot", kind, "tiny", *more, *places)
        assert code == 2 and words in err, err


def test_where_a_method_stands_on_the_encoder_its_logits_are_mapped(
    finished: Any, open_tiny: Any, tmp_path: Path
) -> None:
    tiny = finished.with_runs(tmp_path / "runs")
    settings = (
        "objective.enabled=true",
        "objective.network.width=8",
        "absent.weight=0",
        "balance.kind=none",
        "training.n_epochs=1",
    )
    for method in ("source_only", "rna"):
        code, _, err = tiny.stage1("--no-export", settings=(*settings, f"objective.method={method}"))
        assert code == 0, err
    runs_dir, places = tiny.runs / "tiny", open_tiny(tiny)
    segment = next(s for s in places.manifest if s.segment_id == "t-test-1")
    mapper = ActivationMapper(places, runs_dir, choose_stage1_run(runs_dir, RunChoice(method="rna")))
    with OpenMedia(places.media_root, places.card.media) as media:
        found = mapper.map(media, segment, "low")
        clips = read_clips(media, segment, mapper._spec).clips
    assert found.values.shape == found.frames.shape[:3]
    # The mean over clips of what the method says of each is what the run stored.
    said = []
    for clip in clips:
        with torch.no_grad():
            said.append(mapper._make_classifier(segment)(clip[None]).softmax(dim=1)[0].numpy())
    record = choose_stage1_run(runs_dir, RunChoice(method="rna"))
    with np.load(tiny.steps / f"predictions-{record.steps['predictions']}" / "predictions.npz") as arrays:
        stored = arrays["probabilities"][arrays["segment_ids"].tolist().index("t-test-1")]
    np.testing.assert_allclose(np.mean(said, axis=0), stored, atol=1e-4)
    assert found.probability == pytest.approx(said[len(clips) // 2][0], abs=1e-5)
    drawn = make_activation_maps(places, runs_dir, RunChoice(method="rna"), "t-test-1")
    assert list(drawn.numbers) == ["stage1 source_only s-t, seed 0", "stage1 rna s-t, seed 0"]
