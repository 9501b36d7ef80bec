"""python -m gptjax: the same as `gptjax`."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
