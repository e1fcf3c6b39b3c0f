"""Checks that doctor really tries things: it sees wrong frames, missing packages, bad places, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from echoshift.extract import doctor
from echoshift.extract.doctor import Finding, check_cache, check_datasets, run_checks
from echoshift.extract.readers.video import VideoReader
from echoshift.pipeline.errors import DecodeError


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doctor.write_clip(doctor.FORMATS[0], tmp_path_factory.mktemp("clips"))


def test_a_trial_clip_holds_the_greys_and_the_tone_that_it_is_judged_by(clip: Path) -> None:
    with av.open(str(clip)) as container:
        greys = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert np.allclose(greys, [40 + 16 * number for number in range(12)], atol=2)
    with av.open(str(clip)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])[4096:40960]
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert np.argmax(spectrum) * 48000 / len(samples) == pytest.approx(440, abs=2)
    assert np.sqrt(2 * np.mean(samples**2)) == pytest.approx(0.3, rel=0.05)


def test_a_decoder_that_returns_other_frames_is_seen(clip: Path) -> None:
    class Late(VideoReader):
        def read_frames(self, times_s):
            return super().read_frames(np.asarray(times_s) - 1 / 12)

    class Deaf(VideoReader):
        def read_frames(self, times_s):
            raise DecodeError(f"{clip}: it is\ntorn")

    assert doctor.find_frame_fault(clip, Late).endswith(" of 5 frames are others")
    assert doctor.find_frame_fault(clip, Deaf) == "it is torn"


def test_audio_of_another_strength_is_seen(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TONE", 0.15)  # as if what is read were twice too loud
    assert doctor.find_audio_fault(clip) == "a tone of 0.30, not 0.15"


def test_every_decoder_is_tried_on_what_can_be_written_here() -> None:
    findings = {finding.part: finding for finding in doctor.check_decoders()}
    written = [form.name for form in doctor.FORMATS if doctor.can_write(form)]
    assert "h264" in written
    for part in ("pyav", "pyav audio"):
        assert findings[part] == Finding("ok", part, f"opens {', '.join(written)}")
    assert "h264" in findings["decord"].message


def test_packages_missing_and_untried_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=2.2,<3", "av<2", "nothing-of-this-name>=1", "moto>=5; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    found = list(doctor.check_packages())
    assert [(f.level, f.message.split()[0]) for f in found] == [("warn", "av"), ("fail", "nothing-of-this-name")]
    assert found[0].remedy == "pip install 'av<2'"
    monkeypatch.setattr(metadata, "requires", lambda name: needed[:1])
    assert [str(f) for f in doctor.check_packages()] == ["ok    packages       1 packages in the tried versions"]


@pytest.mark.parametrize(("free_gib", "value", "level"), [(70, 64.0, "ok"), (10, 64.0, "warn"), (70, 63.0, "fail")])
def test_a_gpu_is_judged_by_its_memory_and_a_product(monkeypatch, free_gib, value, level):
    import torch

    real_ones = torch.ones
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda index: "A GPU",
        mem_get_info=lambda index: (free_gib * 2**30, 80 * 2**30),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "ones", lambda *size, device: real_ones(*size) * (value / 64) ** 0.5)
    build, gpu = doctor.check_torch()
    assert build.level == "ok"
    assert (gpu.level, gpu.message.split(";")[0]) == (level, f"cuda:0 A GPU, {free_gib}.0 of 80.0 GiB free")


def test_a_cache_that_is_a_file_fails_and_one_that_is_new_is_left_unmade(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert levels(check_cache(str(tmp_path / "file")))[0] == "fail"
    folder, stores = check_cache(str(tmp_path / "new" / "cache"))
    assert "not made yet, can be written" in folder.message
    assert stores.message == "none yet; 0.0 MB"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_stores_are_opened_and_their_failures_named(tiny) -> None:
    tiny.add_videos("v", n_each=2)
    (tiny.media / "v.mp4").write_text("no video")
    assert tiny.extract("--encoders", "resnet_demo")[0] == 3
    (broken,) = (tiny.cache / "tiny").glob("*.zarr")
    found = list(check_cache(str(tiny.cache)))
    assert [(f.level, f.part) for f in found] == [("ok", "cache"), ("warn", "stores"), ("ok", "stores")]
    assert "2 of 2 rows failed" in found[1].message
    assert "`echoshift extract tiny --retry-failed`" in found[1].remedy
    (broken / "zarr.json").write_text("{}")
    assert [f.level for f in check_cache(str(tiny.cache)) if f.part == "stores"] == ["fail", "ok"]


def test_cards_and_manifests_are_read(tiny) -> None:
    tiny.add_videos("v", n_each=2)
    (tiny.root / "other.toml").write_text((tiny.root / "tiny.toml").read_text().replace('"tiny"', '"other"'))
    fine, bare = check_datasets(tiny.root)
    assert fine == Finding("ok", "datasets", fine.message)
    assert fine.message.startswith("tiny: 2 segments; ")
    assert "epic" in bare.message and bare.message.endswith("other: card, but no manifest")
    (tiny.root / "tiny.csv").write_text("segment_id\n")
    (tiny.root / "other.toml").write_text("name = ")
    broken_card, broken_manifest, _ = check_datasets(tiny.root)
    assert (broken_card.level, broken_manifest.level) == ("fail", "fail")
    assert "other.toml is not valid TOML" in broken_card.message
    assert broken_manifest.remedy == "`echoshift manifest check tiny` names every fault"


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("ok", "a", "begun")
        raise ImportError("no\n module")

    found = list(run_checks([("a", broken), ("b", lambda: [Finding("warn", "b", "m", "r")])]))
    assert [str(f) for f in found] == [
        "ok    a              begun",
        "fail  a              ImportError: no module; mend what it names, then run doctor again",
        "warn  b              m; r",
    ]


def test_the_command_prints_a_line_each_or_one_document_and_ends_with_1(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_decoders", "check_flow", "check_networks"):
        monkeypatch.setattr(doctor, name, lambda name=name: [Finding("ok", name, "stands in")])
    tiny.add_videos("v", n_each=2)
    places = ["--cache", tiny.cache, "--manifests", tiny.root]
    code, out, err = tiny.run("doctor", *places)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warn"}
    n_ok = sum(line.startswith("ok ") for line in lines)
    assert lines[-1] == f"{n_ok} ok, {len(lines) - 1 - n_ok} warnings, 0 failures"
    (tiny.root / "tiny.toml").write_text("name = ")
    code, out, err = tiny.run("doctor", *places, "--json")
    assert (code, err) == (1, "")
    document = json.loads(out)
    assert document["fine"] is False
    assert document["counts"]["fail"] == 1
    assert sum(document["counts"].values()) == len(document["findings"]) == len(lines) - 1
    assert "correct the card" in [finding["remedy"] for finding in document["findings"]]
