"""ray job submit --working-dir . -- python jobs/estimate.py --config RECIPE --estimate.device h100-80gb ..."""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
