"""python train.py CONFIG.yaml [--section.key VALUE ...]: the same as `gptjax train`."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
