"""ray job submit --working-dir . -- python jobs/prepare.py --source PATH --tokenizer gpt2 --out FOLDER"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
