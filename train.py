"""python train.py CONFIG.yaml [--section.key VALUE ...]: the same as `gptjax train`."""

from gptjax.cli import run

if __name__ == "__main__":
    run("train")
