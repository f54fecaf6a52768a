"""The documents: lines that fit, links that lead somewhere, and files that exist."""

import re
import subprocess

import pytest

from repository import ROOT

MAX_COLUMNS = 120
#: Where a path in backticks may start; shorter ones name a file of the folder at hand.
TOPS = ("bench", "cutlass_kernels", "docs", "examples", "hopper", "python", "requirements", "tests")
#: What a run writes.
WRITTEN = ("bench/results/gpu_check.json", "examples/byte_gpt/out/")


def listed(*patterns):
    """Files of the checkout that git knows or would add; all that match where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return sorted(path for pattern in patterns for path in ROOT.rglob(pattern))
    return sorted(path for line in found.splitlines() if (path := ROOT / line).is_file())


DOCUMENTS = listed("*.md")
BY_NAME = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(text):
    """(number, line) outside of code blocks."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def long_lines(text):
    """Numbers of lines that are too long; tables cannot be wrapped, nor can a link by itself."""
    return [
        number
        for number, line in prose(text)
        if len(line) >= MAX_COLUMNS and not line.lstrip().startswith(("|", "<!--", "[", "!["))
    ]


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path, text):
    """Links of a document that lead to no file or to no heading of one."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(line for _, line in prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else (path.parent / file).resolve()
        there = target.exists()
        if there and anchor:
            there = anchor in anchors(text if not file else target.read_text())
        dead += [] if there else [link]
    return dead


def missing_files(text):
    """Paths in backticks, from the root of the checkout, at which there is nothing."""
    named = re.findall(rf"`((?:{'|'.join(TOPS)})/[\w./*-]+)(?:::\w+)?`", text)
    wanted = [name for name in named if name not in WRITTEN]
    return [name for name in wanted if not any(ROOT.glob(name.rstrip("/")))]


@BY_NAME
def test_lines_fit(path):
    if path.parent.name == "results":
        pytest.skip("a script wrote it")
    assert long_lines(path.read_text()) == []


@BY_NAME
def test_links_lead_somewhere(path):
    assert dead_links(path, path.read_text()) == []


@BY_NAME
def test_files_exist(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("it tells of what has been")
    assert missing_files(path.read_text()) == []


def test_faults_are_found():
    text = f"# One\n\n{'x ' * 60}\n\n| {'x ' * 60} |\n\n```\n{'x ' * 60}\n```\n"
    assert long_lines(text) == [3]
    text = "# A `b` (c)\n\n[a](#a-b-c) [b](#other) [c](nothing.md) [d](README.md#status)\n"
    assert dead_links(ROOT / "LICENSE", text) == ["#other", "nothing.md"]
    assert missing_files("`docs/fp8.md`, `tests/test_*.py`, `docs/none.md`") == ["docs/none.md"]


def test_the_documents_are_found():
    assert {ROOT / "README.md", ROOT / "docs" / "fp8.md"} <= set(DOCUMENTS)
