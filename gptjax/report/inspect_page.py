"""The page of `gptjax inspect`."""

import base64
from collections.abc import Callable

import numpy as np

from gptjax.evaluation.inside import Inspection
from gptjax.report.page import escape, page

LARGEST = 2**16 - 1
"""Attention weights are stored as 16-bit fractions of 1."""


def render_inspection(inspection: Inspection, name: str, text_of: Callable[[int], str]) -> str:
    """Returns the page.

    Args:
        inspection: Measurements on a text.
        name: Name of the run.
        text_of: Returns a token's text.
    """
    log_p = inspection.log_probabilities_T[1:]
    mean = float(-log_p.mean())
    ids = {int(i) for a in (inspection.tokens_T, inspection.top_tokens_TK, inspection.lens_tokens_NTK) for i in a.flat}
    data = {
        "tokens": inspection.tokens_T.tolist(),
        "texts": {str(token): text_of(token) for token in sorted(ids)},
        "surprisal": [None, *_rounded(-log_p / np.log(2))],
        "ranks": inspection.ranks_T.tolist(),
        "top": inspection.top_tokens_TK.tolist(),
        "topLogits": [_rounded(row) for row in inspection.top_logits_TK],
        "topProbabilities": [_rounded(row) for row in inspection.top_probabilities_TK],
        "lens": inspection.lens_tokens_NTK.tolist(),
        "lensProbabilities": [[_rounded(row) for row in layer] for layer in inspection.lens_probabilities_NTK],
        "lensNext": [_rounded(layer) for layer in inspection.lens_next_NT],
        "layers": inspection.weights_NHTS.shape[0],
        "heads": inspection.weights_NHTS.shape[1],
        "entropies": [_rounded(row) for row in inspection.entropies_NH],
        "weights": _packed(inspection.weights_NHTS),
    }
    body = f"""<h1>Inside {escape(name)}</h1>
<p class="soft">{len(inspection.tokens_T):,} tokens, mean surprisal {mean / np.log(2):.3f} bits
({mean:.4f} nats) per token, {int((inspection.ranks_T[1:] == 0).sum()):,} of {len(log_p):,} predicted as the most
likely token.</p>
<h2>Text</h2>
<p class="hint">The colour is the surprisal of a token. Point at a token, or click it to keep it: the tokens that the
chosen head attends to from there are underlined, and the tables below show what the model expects to follow.</p>
<div id="text" class="tokens"></div>
<div class="charts">
<figure><figcaption>Candidates for the next token</figcaption><div id="candidates" class="scroll"></div></figure>
<figure><figcaption>Logit lens: what each layer would predict</figcaption><div id="lens" class="scroll"></div></figure>
</div>
<h2>Attention</h2>
<div class="controls" id="heads"></div>
<p class="hint">Rows are queries, columns keys. Click one of the small matrices to see it large.</p>
<div class="charts"><figure><figcaption id="which"></figcaption><canvas id="matrix"></canvas>
<p id="cell" class="hint"></p></figure>
<figure><figcaption>All heads: a row for each layer</figcaption><div id="all" class="scroll"></div></figure></div>"""
    return page(f"Inside {name} · gptjax", body, data, "inspect.js")


def _packed(weights_NHTS: np.ndarray) -> str:
    """The weights on and below the diagonal, row by row, as 16-bit numbers in base64. Those above it are 0."""
    T = weights_NHTS.shape[-1]
    rows, columns = np.tril_indices(T)
    fractions = np.rint(weights_NHTS[:, :, rows, columns] * LARGEST).astype("<u2")
    return base64.b64encode(fractions.tobytes()).decode()


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
