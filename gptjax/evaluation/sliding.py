"""Sliding windows over a token stream that score each token once."""

from collections.abc import Iterator

from gptjax.evaluation.likelihood import Span
from gptjax.text.shards import TokenSplit


def sliding_spans(split: TokenSplit, block_size: int, stride: int, attend_across_documents: bool) -> Iterator[Span]:
    """Yields windows of `block_size` inputs that move forward by `stride` tokens.

    The first window of a document scores all its targets; each later window scores only targets that no earlier window
    scored. So a target after the first window has at least `block_size - stride` tokens of context. The targets are
    those of `batches.pretraining.evaluation_batches`.

    Args:
        split: The stream.
        block_size: Context length of the model.
        stride: From 1 to `block_size`.
        attend_across_documents: Whether the stream is read as one document.
    """
    for start, stop in _documents(split, attend_across_documents):
        scored_until, last = start, stop - 1
        for begin in range(start, last, stride):
            end = min(begin + block_size, last)
            yield Span(split.slice(begin, end + 1), end - scored_until)
            scored_until = end
            if end == last:
                break


def _documents(split: TokenSplit, attend_across_documents: bool) -> Iterator[tuple[int, int]]:
    """The start of each document and the end of its last target, which is the end-of-text after it if there is one."""
    starts = [0] if attend_across_documents else split.document_starts(0, split.n_tokens).tolist() or [0]
    after = 0 if split.end_of_text is None else 1
    yield from zip(starts, [*(start + after for start in starts[1:]), split.n_tokens], strict=True)
