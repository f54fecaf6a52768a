"""An assembler that prefixes: its log is in the source, on the lines that start with //LOG.

FAKE_PTXAS_SLEEP is a delay in seconds.
"""

import os
import sys
import time
from pathlib import Path

time.sleep(float(os.environ.get("FAKE_PTXAS_SLEEP", "0")))

arguments = sys.argv[1:]
text = Path(next(word for word in arguments if word.endswith(".ptx"))).read_text()
log = [line.removeprefix("//LOG ") for line in text.splitlines() if line.startswith("//LOG ")]
print(*log, sep="\n")
Path(arguments[arguments.index("-o") + 1]).write_text("cubin of\n" + text)
