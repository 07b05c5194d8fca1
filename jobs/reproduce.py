"""ray job submit --working-dir . -- python jobs/reproduce.py --scale cpu --run.storage FOLDER ..."""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
