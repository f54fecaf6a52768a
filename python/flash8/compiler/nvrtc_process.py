"""A process that compiles one source with NVRTC: `nvrtc.py` starts it by this file's path.

It reads the request as JSON, writes kernel.ptx into the working folder and the log to its output,
and ends with 0, or with 1 when the source is refused. It imports nothing of flash8.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def compile_source(request: dict[str, Any]) -> tuple[int, bytes]:
    """The exit status, and what NVRTC said."""
    from cuda.bindings import nvrtc

    def must(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise SystemExit(f"error: NVRTC failed with {result[0].name}")
        return result[1] if len(result) > 1 else None

    headers = request["headers"]
    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    path = request["source"]
    source = Path(path).read_bytes()
    program = must(nvrtc.nvrtcCreateProgram(source, os.fsencode(path), len(names), texts, names))
    options = [os.fsencode(option) for option in request["options"]]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = b" " * must(nvrtc.nvrtcGetProgramLogSize(program))
    must(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.strip(b"\0 \n")
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return 1, said + b"\n"
    ptx = b" " * must(nvrtc.nvrtcGetPTXSize(program))
    must(nvrtc.nvrtcGetPTX(program, ptx))
    Path("kernel.ptx").write_bytes(ptx.rstrip(b"\0"))
    return 0, said + b"\n" if said else b""


if __name__ == "__main__":
    given = json.load(sys.stdin)
    sys.path[:] = given["path"]
    status, words = compile_source(given)
    sys.stdout.buffer.write(words)
    sys.stdout.flush()
    sys.exit(status)
