"""ray job submit --working-dir . -- python jobs/sweep.py --config studies/quality --data.shards FOLDER ..."""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
