"""gptjax: pretrain, fine-tune and sample GPT-style decoders on your own text."""

__version__ = "0.1.0"
