"""Fresh processes that use the native layer or the compiler without the cost of `import torch`."""

import os
import subprocess
import sys
from pathlib import Path

import flash8

# A package that is only its path: importing its parts does not run flash8/__init__.py.
PRELUDE = f"""
import sys, types
package = types.ModuleType("flash8")
package.__path__ = [{str(Path(flash8.__file__).parent)!r}]
sys.modules["flash8"] = package
"""


def command(code: str, *arguments: str) -> list[str]:
    """The command line of a process that runs `code`."""
    return [sys.executable, "-c", PRELUDE + code, *arguments]


def run(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own with these environment variables."""
    result = subprocess.run(
        command(code), env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return result.stdout
