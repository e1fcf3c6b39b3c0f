"""Checks that encoders of another distribution, those that docs/ prints, extract like echoshift's own."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from echoshift.pipeline.store.open import list_stores, open_store

PAGE, NAME, WITH_TRUNK = "docs/adding-an-encoder.md", "frame_averages", "two_convolutions"
# Neither resized nor cut in height: the reference below needs no resize of its own.
AS_DECODED = ("--set", "frame.short_side=72", "--set", "frame.crop=72")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doc_checkout: ModuleType, blocks: ModuleType) -> Path:
    """Put the page's distribution on the path, with both of its modules."""
    folder = tmp_path / "site"
    entry = f'{NAME} = "{NAME}:ENTRY"\n'
    pyproject = blocks.find_file(PAGE, "pyproject.toml").replace(entry, entry + entry.replace(NAME, WITH_TRUNK))
    files = [(f"{name}.py", blocks.find_file(PAGE, f"{name}.py")) for name in (NAME, WITH_TRUNK)]
    doc_checkout.write_distribution(folder, pyproject, files)
    monkeypatch.syspath_prepend(folder)
    for name in (NAME, WITH_TRUNK):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def extract(tiny: Any, *arguments: str, encoder: str = NAME) -> tuple[int, str, str]:
    return tiny.extract("--encoders", encoder, "--weights", f"{encoder}=random:0", *arguments)


def test_the_pages_encoder_is_a_short_file_and_is_listed(tiny: Any, site: Path) -> None:
    assert len((site / f"{NAME}.py").read_text().splitlines()) < 60
    code, out, _ = tiny.run("list", "encoders")
    assert code == 0 and NAME in out and WITH_TRUNK in out and "slowfast_r50" in out
    tiny.add_videos("v", n_each=1)
    code, _, err = extract(tiny, encoder="frame_average")
    assert code == 2 and "there is no encoder 'frame_average'; did you mean 'frame_averages'?" in err


@pytest.mark.parametrize("name", [NAME, WITH_TRUNK])
def test_features_are_those_of_the_network_on_the_videos_frames(name: str, tiny: Any, site: Path) -> None:
    import frame_averages
    import two_convolutions

    torch.manual_seed(5)
    entry = {NAME: frame_averages, WITH_TRUNK: two_convolutions}[name].ENTRY
    network = entry.build().eval()
    weights = tiny.root / "mine.safetensors"
    save_file(network.state_dict(), weights)
    tiny.add_videos("v", n_each=2)
    chosen = ("--encoders", name, "--weights", f"{name}={weights}", *AS_DECODED, "--dtype", "float32")
    code, _, err = tiny.extract(*chosen)
    assert code == 0, err
    [path] = list_stores(tiny.cache)
    found = open_store(path).read(["v-1"], "pooled")[0]
    assert found.shape == (5, 512 if name == NAME else 32)
    with av.open(str(tiny.media / "v.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    # Segment v-1 is 0.5 to 1.7 s at 15 Hz: 18 frames, the first the one that is shown at 0.5 s, number 7.
    part = (18 - 16 + 1) / 5
    mean, std = (torch.tensor(values).reshape(3, 1, 1, 1) for values in (entry.frame.mean, entry.frame.std))
    for clip in range(5):
        start = 7 + int(clip * part + part / 2)
        images = torch.from_numpy(frames[start : start + 16 : 2, :, 12:84].astype(np.float32))
        x = (images.permute(3, 0, 1, 2) - mean) / std
        with torch.no_grad():
            if name == NAME:  # one frame after the other
                wanted = torch.stack([network.model(x[:, i][None])[0] for i in range(8)]).mean(dim=0)
            else:
                wanted = network.features(network.trunk(x[None]))["pooled"][0]
        np.testing.assert_allclose(found[clip], wanted.numpy(), rtol=1e-3, atol=1e-4)


def test_the_store_says_where_its_encoder_came_from(
    tiny: Any, site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.add_videos("v", n_each=1)
    assert extract(tiny)[0] == 0
    [path] = list_stores(tiny.cache)
    sha256 = hashlib.sha256((site / f"{NAME}.py").read_bytes()).hexdigest()
    attributes = open_store(path).attributes
    assert attributes["encoder_source"] == (f"frame-averages 1.0 (frame_averages:ENTRY), file's sha256 {sha256}")
    assert attributes["versions"]["frame-averages"] == "1.0"
    code, out, _ = tiny.run("store", "info", path)
    assert code == 0 and sha256 in out
    code, out, err = extract(tiny)
    assert code == 0 and "was begun with" not in err
    changed = tmp_path / "changed"
    changed.mkdir()
    for folder in site.glob("*.dist-info"):
        (changed / folder.name).mkdir()
        for file in folder.iterdir():
            (changed / folder.name / file.name).write_bytes(file.read_bytes())
    (changed / f"{NAME}.py").write_text((site / f"{NAME}.py").read_text() + "# another revision of the file\n")
    monkeypatch.setattr(sys, "path", [str(changed), *(entry for entry in sys.path if entry != str(site))])
    monkeypatch.delitem(sys.modules, NAME)
    code, out, err = extract(tiny)
    assert code == 0 and f"was begun with frame-averages 1.0 (frame_averages:ENTRY), file's sha256 {sha256}" in err


def test_align_takes_its_features_and_stage_1_says_that_it_has_no_trunk(
    tiny_shift: ModuleType, site: Path, tmp_path: Path
) -> None:
    tiny = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    tiny.make()
    tiny.write_card(encoders=(NAME, "resnet_demo"))
    cache, here = ["--cache", tmp_path / "cache"], ["--manifests", tmp_path, "--device", "cpu"]
    chosen = ["--encoders", f"{NAME} resnet_demo", "--weights", f"{NAME}=random:0", "--set", "frame.crop=32"]
    code, _, err = tiny_shift.run("extract", "tiny", "--media", tiny.media, *cache, *here, *chosen)
    assert code == 0, err
    steps = {"n_steps": 4, "n_batch": 8, "lr_drop_step": 2, "n_checkpoints": 1, "checkpoint_every": 2}
    chosen = [word for name, value in steps.items() for word in ("--set", f"iterations.{name}={value}")]
    code, _, err = tiny_shift.run("align", "tiny", "--shift", "s-t", *cache, *here, "--runs", tiny.runs, *chosen)
    assert code == 0, err
    chosen = ["--media", tiny.media, *cache, *here, "--runs", tiny.runs, "--set", "absent.weight=0"]
    code, _, err = tiny_shift.run("stage1", "tiny", "--shift", "s-t", *chosen)
    assert code == 2 and f"{NAME} has no trunk: it only extracts, Stage 1 can't train it" in err


WRONG = {
    "not_there": ("import no_such_module\n", "can't be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("ENTRY = (\n", "can't be loaded: SyntaxError"),
    "no_entry": ("OTHER = 1\n", "can't be loaded: AttributeError"),
    "a_number": ("ENTRY = 3\n", "is a int; an encoder's entry point names an EncoderEntry"),
    "renamed": ('name="two_convolutions"', 'name="another"', "calls itself 'another'; entry point and EncoderEntry"),
    "no_shape": ("    build=", '    default_outputs=("tokens",),\n    build=', "plans no shape for its default output"),
    "seen_as_flow": ('modality="rgb"', 'modality="flow"', "needs a `frame` for rgb or flow, or an `audio`"),
    "no_network": ("build=TwoConvolutions", "build=dict", "builds a dict; it must be a torch.nn.Module"),
    "half_a_network": ("    def features(", "    def other(", "can't be built: TypeError: Can't instantiate abstract"),
    "other_shape": ('"pooled": (32,)', '"pooled": (16,)', "pooled of shape [32], its entry plans [16]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_encoder_is_one_clear_line(
    kind: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doc_checkout: ModuleType, blocks: ModuleType
) -> None:
    *change, message = WRONG[kind]
    name = f"wrong_{kind}"
    text = change[0] if len(change) == 1 else blocks.find_file(PAGE, f"{WITH_TRUNK}.py")
    if len(change) == 2:
        assert change[0] in text
        text = text.replace(change[0], change[1])
    if kind != "renamed":
        text = text.replace(f'name="{WITH_TRUNK}"', f'name="{name}"')
    pyproject = blocks.find_file(PAGE, "pyproject.toml").replace(NAME, name)
    doc_checkout.write_distribution(tmp_path / "site", pyproject, [(f"{name}.py", text)])
    monkeypatch.syspath_prepend(tmp_path / "site")
    tiny.add_videos("v", n_each=1)
    code, _, err = extract(tiny, encoder=name)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line and name in line
    assert "Traceback" not in err


def test_a_name_that_is_taken_is_refused(
    tiny: Any, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doc_checkout: ModuleType, blocks: ModuleType
) -> None:
    tiny.add_videos("v", n_each=1)
    pyproject = blocks.find_file(PAGE, "pyproject.toml")
    twin = pyproject.replace('name = "frame-averages"', 'name = "twin"')
    own = twin.replace('frame_averages = "', 'i3d_rgb = "').replace('"twin"', '"another-i3d"')
    doc_checkout.write_distribution(tmp_path / "twins", twin, [])
    doc_checkout.write_distribution(tmp_path / "twins", own, [])
    monkeypatch.syspath_prepend(tmp_path / "twins")
    code, _, err = extract(tiny)
    assert code == 2 and "2 distributions add 'frame_averages' to echoshift.encoders: twin 1.0 (" in err
    code, _, err = extract(tiny, encoder="i3d_rgb")
    assert code == 2 and "'i3d_rgb' of another-i3d 1.0" in err and "has the name of one of echoshift's own" in err
