"""python sample.py --run_dir DIR --prompt TEXT [--option VALUE ...]: the same as `gptjax sample`."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
