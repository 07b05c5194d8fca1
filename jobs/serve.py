"""ray job submit --working-dir . -- python jobs/serve.py --model FOLDER --adapters NAME=FOLDER"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
