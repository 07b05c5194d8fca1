"""ray job submit --working-dir . -- python jobs/finetune.py --model FOLDER --rank 64 --out FOLDER"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
