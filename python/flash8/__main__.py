"""`python -m flash8`, the same as the console script `flash8`."""

import sys

from flash8_cli import main

if __name__ == "__main__":
    sys.exit(main())
