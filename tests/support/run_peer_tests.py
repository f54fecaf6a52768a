"""`run_peer_tests.py FILE --every N`: FlashAttention-2's own tests of its functions on CPU tensors.

FILE is a copy of its tests/test_flash_attn.py, which is not kept here. Its devices are replaced,
`flash8.compat.install()` stands in for its package, and every N-th case runs, of an order that is
drawn: the file has more cases than a CPU could do in days. It needs einops. Other arguments go to
pytest.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

#: What a test says of the GPU that it is on.
GPU = (
    (r"torch\.cuda\.get_device_capability\(\"cuda\"\)", "(9, 0)"),
    (r"torch\.cuda\.get_device_properties\(\"cuda\"\)\.total_memory", "2**40"),
    (r"torch\.cuda\.(synchronize|empty_cache)\(\)", "None"),
    (r"(['\"])cuda\1", '"cpu"'),
)
CONFTEST = """
import hashlib
import flash8.compat
flash8.compat.install()

def pytest_collection_modifyitems(items):
    items[:] = [x for x in items if int(hashlib.sha256(x.name.encode()).hexdigest(), 16) % {n} == 0]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--every", type=int, default=100, metavar="N")
    options, rest = parser.parse_known_args()
    text = options.file.read_text()
    for pattern, instead in GPU:
        text = re.sub(pattern, instead, text)

    import pytest

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_peer.py").write_text(text)
        (folder / "conftest.py").write_text(CONFTEST.format(n=options.every))
        (folder / "pytest.ini").write_text("[pytest]\n")
        return int(pytest.main(["-p", "no:cacheprovider", "--rootdir", name, name, *rest]))


if __name__ == "__main__":
    sys.exit(main())
