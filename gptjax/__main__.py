"""python -m gptjax: the same as `gptjax`."""

from gptjax.cli import run

if __name__ == "__main__":
    run()
