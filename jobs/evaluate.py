"""ray job submit --working-dir . -- python jobs/evaluate.py --model FOLDER --tasks fpb --data.folder FOLDER"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
