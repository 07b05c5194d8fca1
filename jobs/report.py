"""ray job submit --working-dir . -- python jobs/report.py --run.storage /shared/runs --out /shared/report"""

import sys

from finhpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
