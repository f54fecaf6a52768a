"""requirements/ has a hash for everything that constraints.txt and compiler.txt pin."""

import re
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([\w.-]+)==([^\s\\;]+)(.*(?:\n +--hash=.*)*)", re.MULTILINE)


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    """{name: (version, how many hashes)} of a requirements file."""
    found = PIN.findall((REPOSITORY / file).read_text())
    return {normalized(name): (version, rest.count("--hash=")) for name, version, rest in found}


@pytest.mark.parametrize(
    "pinned, hashed, unhashed",
    [
        ("constraints.txt", "requirements/all.txt", {"torch"}),
        ("compiler.txt", "requirements/compiler.txt", set()),
    ],
)
def test_everything_pinned_has_hashes(pinned, hashed, unhashed):
    wanted, locked = pins(pinned), pins(hashed)
    assert {name: version for name, (version, _) in locked.items()} == {
        name: version for name, (version, _) in wanted.items() if name not in unhashed
    }, "run `make lock`"
    assert all(hashes > 0 for _, hashes in locked.values())


def test_the_base_is_part_of_the_whole():
    base, whole = pins("requirements/base.txt"), pins("requirements/all.txt")
    assert base and base.items() <= whole.items(), "run `make lock`"


def test_the_base_has_what_torch_needs():
    """Or pip would add it without a hash. CUDA's libraries come with the default wheel only."""
    needed = [line for line in metadata.requires("torch") if "extra ==" not in line]
    names = {normalized(re.split(r"[\s;\[<>=!~(]", line)[0]) for line in needed}
    of_cuda = {name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert names - of_cuda <= pins("requirements/base.txt").keys()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "requirements").glob("*.txt")))
def test_no_index_is_named(file):
    assert not re.search(r"://|--(extra-)?index|--find-links", file.read_text())
