"""ray job submit --working-dir . -- python jobs/bench.py NAME ..."""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
