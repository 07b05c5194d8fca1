"""ray job submit --working-dir . -- python jobs/finetune.py --model.path BASE --data.source FILE"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
