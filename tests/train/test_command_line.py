"""Checks the command line itself: what it imports, completes and lists, and that each error is one line with a code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_shift
import typer

from echoshift.cli.app import app
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.open import create_store, name_store

HEAVY = ("torch", "torchvision", "torchaudio", "timm", "pytorchvideo", "pandas", "sklearn", "scipy", "matplotlib")
LIGHT = (*HEAVY, "numpy", "zarr", "h5py", "av", "cv2", "distributed")
REPOSITORY = Path(__file__).resolve().parents[2]


def run_blocked(blocked: tuple[str, ...], *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `echoshift ARGUMENTS` in a process of its own in which some packages can't be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from echoshift.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


MANY = """
import contextlib, io, json, os, sys
sys.modules.update(dict.fromkeys(BLOCKED))
from echoshift.cli.app import main
answers = []
for environment in json.load(sys.stdin):
    os.environ.update(environment)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main()
    answers.append(printed.getvalue())
print(json.dumps(answers))
"""


def answer_shells(questions: list[dict[str, str]]) -> list[str]:
    """Answer what shells ask, one after the other, in a process where nothing that computes can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", MANY.replace("BLOCKED", repr(LIGHT))],
        input=json.dumps(questions),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def complete(lines: Iterable[str], **environment: str) -> dict[str, list[str]]:
    """Complete the last word of each line as bash asks for it."""
    lines = list(lines)
    questions = [
        {
            "_ECHOSHIFT_COMPLETE": "complete_bash",
            "COMP_WORDS": line.replace(" ", "\n"),
            "COMP_CWORD": str(line.count(" ")),
            **environment,
        }
        for line in lines
    ]
    return {line: answer.split() for line, answer in zip(lines, answer_shells(questions), strict=True)}


def test_help_imports_nothing_that_computes():
    done = run_blocked(LIGHT, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: echoshift" in done.stdout
    for name in ("manifest", "store", "extract", "stage1", "stage2", "align", "ablate", "table", "list", "doctor"):
        assert f"\n  {name} " in done.stdout, "plain where it is no terminal"


def test_every_command_and_option_of_before_is_there():
    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, set[str]]]:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                yield from walk(below, (*path, name))
            return
        options = [param for param in command.params if param.param_type_name == "option"]
        arguments = {param.name.upper() for param in command.params if param not in options}
        yield " ".join(path), {name for param in options for name in (*param.opts, *param.secondary_opts)} | arguments

    before = json.loads((Path(__file__).parent / "data" / "commands-of-0.1.0.json").read_text())
    now = dict(walk(typer.main.get_command(app), ()))
    assert {name: sorted({*options} - now.get(name, set())) for name, options in before.items()} == {
        name: [] for name in before
    }


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_stores_are_listed_without_torch(tmp_path, backend):
    spec = FeatureSpec(
        encoder="toy",
        weights="0" * 64,
        clip=ClipSpec(n_frames=4),
        frame=FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
        outputs=(OutputSpec(name="pooled", shape=(5,)),),
    )
    path = name_store(tmp_path, "tiny", spec, backend)
    sizes = {"n_clips": 1, "n_rows_per_shard": 2}
    create_store(path, "tiny", spec, ["a", "b", "c"], manifest_sha256="m", weights_source="none", **sizes)
    done = run_blocked(HEAVY, "store", "ls", "--cache", tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)
    assert (row["store"], row["n_rows"], row["n_done"], row["outputs"]) == (str(path), 3, 0, {"pooled": [5]})


OFFERED = {
    "echoshift ext": ["extract"],
    "echoshift store ver": ["verify"],
    "echoshift extract hac --backend z": ["zarr"],
    "echoshift extract cha": ["charades_ego"],
    "echoshift extract hac --encoders i3d_": ["i3d_rgb", "i3d_flow"],
    "echoshift extract hac --preset rna": ["rna-train", "rna-test"],
    "echoshift weights get i3d-rgb-k": ["i3d-rgb-kinetics400"],
    "echoshift align hac --preset ": ["paper", "quick", "released"],
    "echoshift stage2 epic --shift D1-": ["D1-D2", "D1-D3"],
    "echoshift ablate epic --grid b-table2": ["b-table2"],
    "echoshift list sh": ["shifts"],
    "echoshift extract zzz": [],
}


def test_the_shell_completes_without_what_computes():
    assert complete(OFFERED) == OFFERED


def test_segments_complete_from_the_named_folder_of_manifests(tmp_path):
    (tmp_path / "tiny.toml").write_text('title = "Tiny"\n')
    (tmp_path / "torn.toml").write_text("title = ")
    (tmp_path / "tiny.csv").write_text("segment_id,video_id\nkitchen-1,k\nkitchen-2,k\nstudio-1,s\n")
    segments, datasets = "echoshift store explain kit", "echoshift manifest show t"
    assert complete([segments, datasets], ECHOSHIFT_MANIFESTS=str(tmp_path)) == {
        segments: ["kitchen-1", "kitchen-2"],
        datasets: ["tiny", "torn"],
    }


def test_each_shell_gets_a_script_and_its_answers():
    shells = ("bash", "zsh", "fish")
    asked = {"_TYPER_COMPLETE_ARGS": "echoshift extr", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asked |= {"COMP_WORDS": "echoshift\nextr", "COMP_CWORD": "1"}
    sources = [{"_ECHOSHIFT_COMPLETE": f"source_{shell}"} for shell in shells]
    completions = [{"_ECHOSHIFT_COMPLETE": f"complete_{shell}", **asked} for shell in shells]
    answers = answer_shells([*sources, *completions])
    for shell, script in zip(shells, answers[:3], strict=True):
        assert f"_ECHOSHIFT_COMPLETE=complete_{shell}" in script
    assert all("extract" in answer and "stage1" not in answer for answer in answers[3:]), answers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extrat"], "no such command 'extrat'. Did you mean 'extract'?"),
        (["store", "sl"], "echoshift store: no such command 'sl'; see `echoshift store --help`"),
        (["store", "ls", "--jsno"], "echoshift store ls: no such option: --jsno (Possible options: --json)"),
        (["extract"], "echoshift extract: missing argument 'dataset'; see `echoshift extract --help`"),
        (["extract", "hac", "--backend", "zar"], "'zar' is not one of 'zarr', 'hdf5'; see `echoshift extract --help`"),
        (["extract", "hacc"], "hacc.toml; did you mean 'hac'? `echoshift list datasets` lists all"),
        (["list", "shifts", "epci"], "epci.toml; did you mean 'epic'? `echoshift list datasets` lists all"),
        (["list", "settings", "--of", "stage3"], "no settings of 'stage3'; did you mean 'stage1' or 'stage2'?"),
        (["weights", "get", "i3d-rgb-kinetic"], "did you mean 'i3d-rgb-kinetics400'? `echoshift weights ls` lists all"),
        (["table", "hac", "--grid", "b-table4"], "`echoshift list grids` lists all"),
    ],
)
def test_each_error_is_one_line_with_what_there_is(arguments, words):
    code, out, err = tiny_shift.run(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_places_that_can_not_be_written_are_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    own = tmp_path / "own.csv"
    own.write_text("segment_id,video_id,start_s,stop_s,labels,domain,split\na,v,0,1,p,k,train\nb,v,0,1,q,g,test\n")
    code, out, err = tiny_shift.run("manifest", "import", "csv", own, "--dataset", "d", "--manifests", file / "below")
    assert (code, out) == (2, "")
    assert err == f"error: {file / 'below'}: Not a directory; name another place, or see to its rights and room\n"


@pytest.mark.parametrize(("number", "is_told"), [(errno.EACCES, True), (errno.ENOSPC, True), (errno.EBADF, False)])
def test_faults_of_our_own_keep_their_traceback(monkeypatch, number, is_told):
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), "/some/where")

    monkeypatch.setattr("echoshift.pipeline.cards.read_dataset_card", fail)
    if not is_told:
        with pytest.raises(OSError, match=os.strerror(number)):
            tiny_shift.run("manifest", "show", "demo")
        return
    code, _, err = tiny_shift.run("manifest", "show", "demo")
    assert code == 2
    assert err == f"error: /some/where: {os.strerror(number)}; name another place, or see to its rights and room\n"


def test_names_are_listed_as_the_cards_grids_and_configurations_have_them():
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
