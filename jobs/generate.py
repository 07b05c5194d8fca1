"""ray job submit --working-dir . -- python jobs/generate.py --model FOLDER --prompts FILE --out FILE"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
