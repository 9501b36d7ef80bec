"""python sample.py --run_dir DIR --prompt TEXT [--option VALUE ...]: the same as `gptjax sample`."""

from gptjax.cli import run

if __name__ == "__main__":
    run("sample")
