"""Checks the command line itself: what it imports, completes and lists, and that each error is one line with a code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HEAVY = ("torch", "torchvision", "torchaudio", "timm", "pytorchvideo", "pandas", "sklearn", "scipy", "matplotlib")
LIGHT = (*HEAVY, "numpy", "zarr", "h5py", "av", "cv2", "distributed")
REPOSITORY = Path(__file__).resolve().parents[2]


def run_blocked(blocked: tuple[str, ...], *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `echoshift ARGUMENTS` in a process of its own in which some packages can't be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from train.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def complete(words: str, **environment: str) -> list[str]:
    """Completes the last of some words as bash asks for it, where nothing that computes can be imported."""
    done = run_blocked(
        LIGHT,
        _ECHOSHIFT_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_help_imports_nothing_that_computes() -> None:
    done = run_blocked(LIGHT, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: echoshift" in done.stdout
    for name in ("manifest", "store", "extract", "stage1", "stage2", "align", "ablate", "table", "list", "doctor"):
        assert f"\n  {name} " in done.stdout, "plain where it is no terminal"


def test_stores_are_listed_without_torch(tmp_path: Path) -> None:
    done = run_blocked(HEAVY, "store", "ls", "--cache", tmp_path, "--json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("echoshift ext", ["extract"]),
        ("echoshift store ver", ["verify"]),
        ("echoshift extract hac --backend z", ["zarr"]),
        ("echoshift extract cha", ["charades_ego"]),
        ("echoshift extract hac --encoders i3d_", ["i3d_rgb", "i3d_flow"]),
        ("echoshift extract hac --preset rna", ["rna-train", "rna-test"]),
        ("echoshift plan hac --set clip.n_", ["clip.n_frames=", "clip.n_clips=", "clip.n_views="]),
        ("echoshift weights get i3d-rgb-k", ["i3d-rgb-kinetics400"]),
        ("echoshift stage1 hac --set training.n_e", ["training.n_epochs="]),
        ("echoshift stage2 hac --set recogniser.n_l", ["recogniser.n_layers="]),
        ("echoshift align hac --set alignment.method=mm", ["alignment.method=mmd", "alignment.method=mm_sada"]),
        ("echoshift align hac --preset ", ["paper", "quick", "released"]),
        ("echoshift stage2 epic --shift D1-", ["D1-D2", "D1-D3"]),
        ("echoshift ablate epic --grid b-table2", ["b-table2"]),
        ("echoshift list sh", ["shifts"]),
        ("echoshift extract zzz", []),
    ],
)
def test_the_shell_completes(words: str, offered: list[str]) -> None:
    assert complete(words) == offered


def test_segments_complete_from_the_named_folder_of_manifests(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text('title = "Tiny"\n')
    (tmp_path / "tiny.csv").write_text("segment_id,video_id\nkitchen-1,k\nkitchen-2,k\nstudio-1,s\n")
    assert complete("echoshift store explain kit", ECHOSHIFT_MANIFESTS=str(tmp_path)) == ["kitchen-1", "kitchen-2"]
    assert complete("echoshift manifest show t", ECHOSHIFT_MANIFESTS=str(tmp_path)) == ["tiny"]
    (tmp_path / "tiny.toml").write_text("title = ")
    assert complete("echoshift manifest show t", ECHOSHIFT_MANIFESTS=str(tmp_path)) == ["tiny"], "torn cards too"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_for_completions(shell: str) -> None:
    done = run_blocked(LIGHT, _ECHOSHIFT_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert f"_ECHOSHIFT_COMPLETE=complete_{shell}" in done.stdout
    asked = run_blocked(
        LIGHT,
        _ECHOSHIFT_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="echoshift extr",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
        COMP_WORDS="echoshift extr",
        COMP_CWORD="1",
    )
    assert "extract" in asked.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extrat"], "there is no command `echoshift extrat`; did you mean 'extract'? `echoshift --help` lists all"),
        (["store", "sl"], "there is no command `echoshift store sl`; there are ls, info, verify, explain, "),
        (["store", "ls", "--jsno"], "echoshift store ls: no option '--jsno'; did you mean '--json'?"),
        (["extract"], "echoshift extract: missing argument 'dataset'; see `echoshift extract --help`"),
        (["extract", "hac", "--backend", "zar"], "'zar' is not one of 'zarr', 'hdf5'; did you mean 'zarr'?"),
        (["extract", "hacc"], "hacc.toml; did you mean 'hac'? `echoshift list datasets` lists all"),
        (["list", "shifts", "epci"], "epci.toml; did you mean 'epic'? `echoshift list datasets` lists all"),
        (["list", "settings", "--of", "stage3"], "no settings of 'stage3'; did you mean 'stage1' or 'stage2'?"),
        (["weights", "get", "i3d-rgb-kinetic"], "did you mean 'i3d-rgb-kinetics400'? `echoshift weights ls` lists all"),
        (["table", "hac", "--grid", "b-table4"], "`echoshift list grids` lists all"),
    ],
)
def test_each_error_is_one_line_with_what_there_is(tiny_shift: ModuleType, arguments: list[str], words: str) -> None:
    code, out, err = tiny_shift.run(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_group_without_a_command_shows_its_help(tiny_shift: ModuleType) -> None:
    code, out, err = tiny_shift.run("store")
    assert code == 2
    assert "Usage: echoshift store" in out + err


def test_names_are_listed_as_the_cards_grids_and_configurations_have_them(tiny_shift: ModuleType) -> None:
    def list_(*arguments: object) -> list[dict[str, object]]:
        code, out, err = tiny_shift.run("list", *arguments, "--json")
        assert (code, err) == (0, "")
        rows: list[dict[str, object]] = json.loads(out)
        return rows

    grids = sorted(path.stem for path in (REPOSITORY / "train" / "grids").glob("*.toml"))
    assert [row["name"] for row in list_("grids")] == grids
    assert [row["name"] for row in list_("shifts", "epic")][:3] == ["D1-D2", "D1-D3", "D2-D1"]
    assert {row["name"]: row["n_classes"] for row in list_("datasets")}["epic"] == 8
    assert {"name": "quick", "stages": "stage2, alignment"} in list_("presets")
    settings = {row["key"]: row for row in list_("settings", "--of", "stage1")}
    assert settings["attention.enabled"] == {
        "of": "stage1",
        "key": "attention.enabled",
        "kind": "bool",
        "default": True,
    }
    for what in ("encoders", "recipes", "weights", "methods"):
        assert list_(what), what
    code, out, _ = tiny_shift.run("list", "methods")
    assert code == 0
    assert out.splitlines()[:2] == ["methods", "name              how"]
