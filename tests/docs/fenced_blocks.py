"""The fenced blocks of README.md and docs/, and the commands in those of shell."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\S*)[ ]?(.*?)\n(.*?)^```$", re.M | re.S)
_HEADING = re.compile(r"^#+ (.*)$", re.M)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        name: page and heading, such as `docs/store.md#commands`; the second of its language there ends in -2.
        language: `sh`, `python`, `toml`, `csv`, or empty.
        file: the file's name after the language, where there is one: what the page tells the reader to write.
    """

    name: str
    language: str
    file: str
    text: str


def list_pages() -> list[Path]:
    """List the pages that readers are sent to."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    """Read the blocks of a page; headings inside blocks (comments of shell) are none."""
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    seen: dict[tuple[str, str], int] = {}
    spans = [match.span() for match in _BLOCK.finditer(text)]
    headings = [m for m in _HEADING.finditer(text) if not any(start < m.start() < stop for start, stop in spans)]
    for match in _BLOCK.finditer(text):
        above = [m.group(1) for m in headings if m.start() < match.start()]
        slug = re.sub(r"[^a-z0-9]+", "-", above[-1].lower()).strip("-") if above else "top"
        key = (slug, match.group(1))
        seen[key] = seen.get(key, 0) + 1
        number = f"-{seen[key]}" if seen[key] > 1 else ""
        name = f"{page.relative_to(ROOT).as_posix()}#{slug}{number}"
        blocks.append(Block(name, match.group(1), match.group(2).strip(), match.group(3)))
    return blocks


def read_all_blocks(language: str) -> list[Block]:
    """Read the blocks of one language of all pages."""
    return [block for page in list_pages() for block in read_blocks(page) if block.language == language]


def find_file(page: str, file: str) -> str:
    """Return the text of the file that a page tells the reader to write."""
    [found] = [block.text for block in read_blocks(ROOT / page) if block.file == file]
    return found


def split_commands(text: str) -> list[list[str]]:
    """Split shell text into commands, each its words; comments go, `\\` joins lines, `&&` ends a command."""
    parts = [part for line in text.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]
