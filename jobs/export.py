"""ray job submit --working-dir . -- python jobs/export.py --model FOLDER --format merged --out FOLDER"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
