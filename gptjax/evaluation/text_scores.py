"""BLEU, chrF and ROUGE-L of generated answers, by the libraries that define them."""

from collections.abc import Sequence

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.statistics import mean


def require_text_scores() -> None:
    """Raises `UserError` where the libraries are missing."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(f"text_scores need {error.name}, of the extra evaluate: pip install -e '.[evaluate]'") from None


def text_scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> str:
    """One line of scores.

    BLEU and chrF are those of the whole corpus, from 0 to 100, against all accepted answers of each item (sacrebleu).
    ROUGE-L is the mean over items of the F-measure, from 0 to 1, with the accepted answer that gives the highest one
    (rouge_score).
    """
    require_text_scores()
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(map(len, accepted))
    # Repeating an answer changes no score, and gives all items the same number of them.
    references = [[texts[min(n, len(texts) - 1)] for texts in accepted] for n in range(most)]
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts) for answer, texts in
            zip(answers, accepted, strict=True)]  # fmt: skip
    texts = list(answers)
    bleu, chrf = sacrebleu.corpus_bleu(texts, references), sacrebleu.corpus_chrf(texts, references)
    return f"BLEU {bleu.score:.2f} · chrF {chrf.score:.2f} · ROUGE-L {mean(np.array(best))}"
