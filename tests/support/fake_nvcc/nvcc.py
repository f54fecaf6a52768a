"""A compiler that copies: its PTX is the source, its defines and every header that was included.

FAKE_NVCC_LOG gets a line per compilation, FAKE_NVCC_SLEEP is a delay in seconds, FAKE_NVCC_TOUCH a
file that is changed while the first compilation runs, with its old time if FAKE_NVCC_KEEP_TIME.
FAKE_NVCC_CHILD is a file for the process id of a child that sleeps as long. A source that has the
word REFUSE is refused, with the rest of its line. Like nvcc it cannot do with names that mean
something to a shell, the working folder's among them.
"""

import os
import re
import subprocess
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


def start_child(file, seconds):
    child = subprocess.Popen([sys.executable, "-IS", "-c", f"import time; time.sleep({seconds})"])
    Path(file).write_text(str(child.pid))


def main(arguments):
    seconds = float(os.environ.get("FAKE_NVCC_SLEEP", "0"))
    if arguments == ["--version"]:
        time.sleep(float(os.environ.get("FAKE_NVCC_VERSION_SLEEP", "0")))
        print("nvcc: fake", os.environ.get("FAKE_NVCC_VERSION", "V1"), "build 7", sep="\n")
        return 0
    with open(os.environ["FAKE_NVCC_LOG"], "a") as log:
        print("compiled", file=log)
    touched = os.environ.get("FAKE_NVCC_TOUCH")
    if touched and len(Path(os.environ["FAKE_NVCC_LOG"]).read_text().splitlines()) == 1:
        time.sleep(0.02)
        before = os.stat(touched)
        Path(touched).write_text("// changed meanwhile\n")
        if "FAKE_NVCC_KEEP_TIME" in os.environ:
            os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns))
    if "FAKE_NVCC_CHILD" in os.environ:
        start_child(os.environ["FAKE_NVCC_CHILD"], seconds)
    time.sleep(seconds)
    names = [word for word in arguments if not word.startswith("-D")]
    odd = [name for name in [os.getcwd(), *names] if re.search(r"""[$`"'\\\n;&|<>()#]""", name)]
    if odd:
        print(f"error: a shell would not take {odd[0]!r} for a name")
        return 3
    source = Path(arguments[-1])
    refused = re.search("REFUSE(.*)", source.read_text())
    if refused:
        print(f"{source}(1): error: the word REFUSE{refused[1]}")
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
