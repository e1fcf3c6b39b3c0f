"""Checks that every command of README.md, CONTRIBUTING.md and docs/ exists, and that each block is listed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = (("docs/adding-an-encoder.md", "frame_averages.py"), ("docs/adding-a-method.md", "coral.py"))


@pytest.fixture(scope="module")
def parser(
    parsing: ModuleType,
    doc_checkout: ModuleType,
    blocks: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """Return a parser that knows the encoder and the method that the pages add."""
    root = tmp_path_factory.mktemp("checkout")
    checkout = doc_checkout.DocCheckout(root)
    checkout.make()
    with pytest.MonkeyPatch.context() as patch:
        for page, file in PLUGINS:
            pyproject = blocks.find_file(page, "pyproject.toml")
            doc_checkout.write_distribution(checkout.site, pyproject, [(file, blocks.find_file(page, file))])
        patch.syspath_prepend(checkout.site)
        yield parsing.CommandParser(root)


def test_each_command_exists_with_its_options(shell_block: Any, parser: Any, blocks: ModuleType) -> None:
    commands = blocks.split_commands(shell_block.text)
    assert commands
    for words in commands:
        parser.check(words)


def test_each_block_of_shell_is_listed_once(blocks: ModuleType, lists: ModuleType) -> None:
    there = [block.name for block in blocks.read_all_blocks("sh")]
    run, parsed = {*lists.CHEAP, *lists.ON_THE_DEMO}, set(lists.PARSED)
    assert len(there) == len(set(there))
    assert not run & parsed
    assert set(there) == run | parsed, "list new blocks in tests/docs/block_lists.py, and take out those that are gone"
    known = {"sh", "python", "toml", "csv", ""}
    assert {block.language for page in blocks.list_pages() for block in blocks.read_blocks(page)} <= known


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make extract DATASET=epic ENCODER=i3d_rgb", "the Makefile has no {'ENCODER'}"),
        ("make extrct DATASET=epic", "make has no {'extrct'}"),
        ("make extract DATASET=epic ENCODERS=i3d_rbg", "there is no encoder 'i3d_rbg'"),
        (".venv/bin/echoshift extract epic --encodrs i3d_rgb", "--encodrs"),
        (".venv/bin/echoshift store verfy x.zarr", "verfy"),
        ("make ablate GRID=a-table9 DATASET=epic", "a-table9"),
        ("make align METHOD=rnaa DATASET=epic", "unknown method 'rnaa'"),
        ("make stage1 DATASET=demo SHIFT=studio-attic", "attic"),
        ('make stage2 DATASET=demo ARGS="--set schedule.n_epoch=1"', "n_epoch"),
        ("rm -rf cache", "nobody here knows rm"),
    ],
)
def test_a_wrong_command_is_found(command: str, fault: str, parser: Any, blocks: ModuleType) -> None:
    [words] = blocks.split_commands(command)
    with pytest.raises(Exception, match=re.escape(fault)):
        parser.check(words)


def test_links_lead_somewhere(blocks: ModuleType) -> None:
    links = []
    for page in blocks.list_pages():
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                links.append((page, target))
    assert len(links) > 30
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []
