"""Checks that an encoder of another distribution, the one that docs/ prints, extracts like one of echoshift's own."""

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

from echoshift.pipeline.store.opening import list_stores, open_store

PAGE, MODULE, NAME = "docs/adding-an-encoder.md", "two_convolutions.py", "two_convolutions"
# Neither resized nor cut in height: the reference below needs no resize of its own.
AS_DECODED = ("--set", "frame.short_side=72", "--set", "frame.crop=72")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doc_checkout: ModuleType, blocks: ModuleType) -> Path:
    """Put the page's distribution on the path."""
    folder = tmp_path / "site"
    pyproject = blocks.find_file(PAGE, "pyproject.toml")
    doc_checkout.write_distribution(folder, pyproject, [(MODULE, blocks.find_file(PAGE, MODULE))])
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return folder


def extract(tiny: Any, *arguments: str, encoder: str = NAME) -> tuple[int, str, str]:
    return tiny.extract("--encoders", encoder, "--weights", f"{encoder}=random:0", *arguments)


def test_features_are_those_of_the_network_on_the_videos_frames(tiny: Any, site: Path) -> None:
    import two_convolutions

    torch.manual_seed(5)
    network = two_convolutions.TwoConvolutions().eval()
    weights = tiny.root / "mine.safetensors"
    save_file(network.state_dict(), weights)
    tiny.add_videos("v", n_each=2)
    chosen = ("--encoders", NAME, "--weights", f"{NAME}={weights}", *AS_DECODED, "--dtype", "float32")
    code, _, err = tiny.extract(*chosen)
    assert code == 0, err
    [path] = list_stores(tiny.cache)
    found = open_store(path).read(["v-1"], "pooled")[0]
    assert found.shape == (5, 32)
    with av.open(str(tiny.media / "v.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    # Segment v-1 is 0.5 to 1.7 s at 15 Hz: 18 frames, the first the one that is shown at 0.5 s, number 7.
    part = (18 - 16 + 1) / 5
    for clip in range(5):
        start = 7 + int(clip * part + part / 2)
        pictures = frames[start : start + 16 : 2, :, 12:84].astype(np.float32)
        x = torch.from_numpy((pictures - 114.75) / 57.375).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            wanted = network(x, ["pooled"])["pooled"][0].numpy()
        np.testing.assert_allclose(found[clip], wanted, rtol=1e-4, atol=1e-5)


def test_the_store_says_where_its_encoder_came_from(
    tiny: Any, site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.add_videos("v", n_each=1)
    assert extract(tiny)[0] == 0
    [path] = list_stores(tiny.cache)
    sha256 = hashlib.sha256((site / MODULE).read_bytes()).hexdigest()
    attributes = open_store(path).attributes
    assert attributes["encoder_source"] == (f"two-convolutions 1.0 (two_convolutions:ENTRY), file's sha256 {sha256}")
    assert attributes["versions"]["two-convolutions"] == "1.0"
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
    (changed / MODULE).write_text((site / MODULE).read_text() + "# another revision of the file\n")
    monkeypatch.setattr(sys, "path", [str(changed), *(entry for entry in sys.path if entry != str(site))])
    monkeypatch.delitem(sys.modules, NAME)
    code, out, err = extract(tiny)
    assert code == 0 and f"was begun with two-convolutions 1.0 (two_convolutions:ENTRY), file's sha256 {sha256}" in err


WRONG = {
    "not_there": ("import no_such_module\n", "can't be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("ENTRY = (\n", "can't be loaded: SyntaxError"),
    "no_entry": ("OTHER = 1\n", "can't be loaded: AttributeError"),
    "a_number": ("ENTRY = 3\n", "is a int; an encoder's entry point names an EncoderEntry"),
    "renamed": ('name="two_convolutions"', 'name="another"', "calls itself 'another'; entry point and EncoderEntry"),
    "no_shape": ('default_outputs=("pooled",)', 'default_outputs=("tokens",)', "plans no shape for its default output"),
    "seen_as_flow": ('modality="rgb"', 'modality="flow"', "needs a `frame` for rgb or flow, or an `audio`"),
    "no_network": ("build=TwoConvolutions", "build=dict", "builds a dict; it must be an EncoderNetwork"),
    "half_a_network": ("    def features(", "    def other(", "can't be built: TypeError: Can't instantiate abstract"),
    "other_shape": ('"pooled": (2 * WIDTH,)', '"pooled": (WIDTH,)', "pooled of shape [32], its entry plans [16]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_encoder_is_one_clear_line(
    kind: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doc_checkout: ModuleType, blocks: ModuleType
) -> None:
    *change, message = WRONG[kind]
    name = f"wrong_{kind}"
    text = change[0] if len(change) == 1 else blocks.find_file(PAGE, MODULE)
    if len(change) == 2:
        assert change[0] in text
        text = text.replace(change[0], change[1])
    if kind != "renamed":
        text = text.replace('name="two_convolutions"', f'name="{name}"')
    pyproject = blocks.find_file(PAGE, "pyproject.toml").replace("two_convolutions", name)
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
    twin = pyproject.replace('name = "two-convolutions"', 'name = "twin"')
    own = twin.replace('two_convolutions = "', 'i3d_rgb = "').replace('"twin"', '"another-i3d"')
    doc_checkout.write_distribution(tmp_path / "twins", twin, [])
    doc_checkout.write_distribution(tmp_path / "twins", own, [])
    monkeypatch.syspath_prepend(tmp_path / "twins")
    code, _, err = extract(tiny)
    assert code == 2 and "2 distributions add 'two_convolutions' to echoshift.encoders: twin 1.0 (" in err
    code, _, err = extract(tiny, encoder="i3d_rgb")
    assert code == 2 and "'i3d_rgb' of another-i3d 1.0" in err and "has the name of one of echoshift's own" in err


def test_it_stands_in_the_list_of_what_there_is(tiny: Any, site: Path) -> None:
    tiny.add_videos("v", n_each=1)
    code, _, err = extract(tiny, encoder="two_convolution")
    assert code == 2 and "there is no encoder 'two_convolution'; did you mean 'two_convolutions'?" in err
