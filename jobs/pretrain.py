"""ray job submit --working-dir . -- python jobs/pretrain.py --config RECIPE --data.shards FOLDER ..."""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
