"""ray job submit --working-dir . -- python jobs/ui.py --run.storage FOLDER   (open to the head alone: use a tunnel)"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["ui", *sys.argv[1:]]))
