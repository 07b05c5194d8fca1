"""python -m finhpc COMMAND ..."""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
