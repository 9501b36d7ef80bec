"""gptjax: pretrain, fine-tune and sample GPT-style decoders on your own text.

    import gptjax
    model = gptjax.load("runs/mine")
    print(model.generate(["Once upon a time"], max_new_tokens=50, seed=1)[0][0])

`load`, `train`, `Config` and `Model` are imported when they are first used: importing the package starts nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.api import Config, Model, load, train

__version__ = "0.1.0"
__all__ = ["Config", "Model", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}; it has {', '.join(__all__)}")
    from gptjax import api

    return getattr(api, name)
