"""Documents → windows of a fixed length, so that few documents are cut: best-fit-decreasing bin packing.

P is the number of pieces, W of windows, T the window's length in tokens.

Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830, section 3.
"""

from typing import NamedTuple

import numpy as np

from gptjax.text.shards import TokenSplit


class Packing(NamedTuple):
    """Which pieces of a stream fill each window. A piece is a document, or a part of one longer than T."""

    start_P: np.ndarray
    """Position in the stream, int64."""
    length_P: np.ndarray
    """Tokens, int64."""
    first_W: np.ndarray
    """Window w has the pieces from `first_W[w]` up to `first_W[w + 1]`; one more element than windows."""
    n_cut: int
    """Documents longer than T, which are cut every T tokens."""

    @property
    def n_windows(self) -> int:
        """W."""
        return len(self.first_W) - 1

    def padding_share(self, block_size: int) -> float:
        """Share of the positions of all windows that hold no token."""
        return 1 - int(self.length_P.sum()) / (self.n_windows * block_size)


def pack_split(split: TokenSplit, block_size: int) -> Packing:
    """Packs the documents of a stream, each with the end-of-text before it."""
    starts = split.document_starts(0, split.n_tokens)
    last = split.n_tokens - (split.end_of_text is not None)  # the closing end-of-text is a target alone
    return pack_best_fit(starts, np.diff(np.append(starts, last)), block_size)


def pack_best_fit(start_N: np.ndarray, length_N: np.ndarray, block_size: int) -> Packing:
    """Packs documents: the longest first, each into the fullest window that has room for it.

    All pieces of one length are placed together, which gives the same result as one after another: once a piece is in a
    window, that window is the fullest one for the next piece of this length, as long as it has room.

    Args:
        start_N: Positions of documents in the stream.
        length_N: Their tokens.
        block_size: T.
    """
    T = block_size
    whole_N, rest_N = length_N // T, length_N % T
    whole = np.repeat(np.arange(len(start_N)), whole_N)
    nth = np.arange(len(whole)) - np.repeat(np.cumsum(whole_N) - whole_N, whole_N)
    order = np.argsort(-rest_N, kind="stable")
    order = order[rest_N[order] > 0]
    rest = rest_N[order]
    window = np.zeros(len(rest), np.int64)
    spaces: dict[int, list[np.ndarray]] = {}
    open_spaces, n_windows = 0, len(whole)  # bit s of open_spaces: there is a window with room for s tokens

    def add(space: int, windows: np.ndarray) -> None:
        nonlocal open_spaces
        if len(windows) and space:
            spaces.setdefault(space, []).append(windows)
            open_spaces |= 1 << space

    def take(space: int, n: int) -> np.ndarray:
        """Up to n windows that have this much room."""
        nonlocal open_spaces
        arrays, found, missing = spaces[space], [], n
        while arrays and missing:
            last = arrays.pop()
            found.append(last[:missing])
            if len(last) > missing:
                arrays.append(last[missing:])
            missing -= len(found[-1])
        if not arrays:
            open_spaces &= ~(1 << space)
        return np.concatenate(found)

    bounds = np.flatnonzero(np.diff(rest, prepend=0, append=0)) if len(rest) else np.zeros(1, np.int64)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        length = int(rest[begin])
        while begin < end:
            if fitting := open_spaces >> length:
                space = length + (fitting & -fitting).bit_length() - 1
                windows = take(space, -(-(end - begin) // (space // length)))
            else:
                space = T
                windows = n_windows + np.arange(-(-(end - begin) // (T // length)))
                n_windows += len(windows)
            each = space // length
            taken = min(len(windows) * each, end - begin)
            window[begin : begin + taken] = np.repeat(windows, each)[:taken]
            in_last = taken - (len(windows) - 1) * each
            add(space - each * length, windows[:-1])
            add(space - in_last * length, windows[-1:])
            begin += taken
    window_P = np.concatenate([np.arange(len(whole)), window])
    by_window = np.argsort(window_P, kind="stable")
    start_P = np.concatenate([start_N[whole] + nth * T, start_N[order] + whole_N[order] * T])
    length_P = np.concatenate([np.full(len(whole), T), rest])
    first_W = np.searchsorted(window_P[by_window], np.arange(n_windows + 1))
    return Packing(start_P[by_window], length_P[by_window], first_W, int((length_N > T).sum()))
