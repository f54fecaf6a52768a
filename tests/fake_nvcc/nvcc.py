"""A compiler that copies: its PTX is the source, its defines and every header that was included.

FAKE_NVCC_LOG gets a line per compilation, FAKE_NVCC_SLEEP is a delay in seconds, FAKE_NVCC_TOUCH a
file that is changed while the first compilation runs. A source that has the word REFUSE is refused.
"""

import os
import re
import sys
import time
from pathlib import Path


def options_of(arguments, flag):
    return [arguments[i + 1] for i, word in enumerate(arguments) if word == flag]


def headers_of(path, folders):
    for name in re.findall(r'#include "(.+)"', path.read_text()):
        found = next(
            folder / name for folder in (path.parent, *folders) if (folder / name).is_file()
        )
        yield found
        yield from headers_of(found, folders)


def main(arguments):
    if arguments == ["--version"]:
        print("nvcc: fake", os.environ.get("FAKE_NVCC_VERSION", "V1"), "build 7", sep="\n")
        return 0
    with open(os.environ["FAKE_NVCC_LOG"], "a") as log:
        print("compiled", file=log)
    touched = os.environ.get("FAKE_NVCC_TOUCH")
    if touched and len(Path(os.environ["FAKE_NVCC_LOG"]).read_text().splitlines()) == 1:
        time.sleep(0.02)
        Path(touched).write_text("// changed meanwhile\n")
    time.sleep(float(os.environ.get("FAKE_NVCC_SLEEP", "0")))
    source = Path(arguments[-1])
    if "REFUSE" in source.read_text():
        print(f"{source}(1): error: the word REFUSE")
        return 2
    folders = [Path(word[2:]) for word in arguments if word.startswith("-I")]
    read = [source, *headers_of(source, folders)]
    defines = " ".join(word for word in arguments if word.startswith("-D"))
    text = "\n".join([f"// {defines}", *(path.read_text() for path in read)])
    Path(options_of(arguments, "-o")[0]).write_text(text)
    names = " \\\n    ".join(str(path).replace(" ", "\\ ") for path in read)
    Path(options_of(arguments, "-MF")[0]).write_text(f"kernel.ptx : {names}\n")
    return 0


sys.exit(main(sys.argv[1:]))
