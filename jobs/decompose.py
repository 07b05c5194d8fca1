"""ray job submit --working-dir . -- python jobs/decompose.py --model FOLDER --rank 64 --out FOLDER"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["decompose", *sys.argv[1:]]))
