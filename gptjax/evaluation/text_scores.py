"""BLEU, chrF and ROUGE-L of generated answers, computed by sacrebleu and rouge_score."""

from collections.abc import Sequence

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.statistics import mean


def require_text_scores() -> None:
    """Raises `UserError` if the libraries are missing."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(f"text_scores need {error.name}, of the extra evaluate: pip install -e '.[evaluate]'") from None


def text_scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> str:
    """One line of scores.

    BLEU and chrF are corpus scores from 0 to 100, with all accepted answers of an item as references (sacrebleu).
    ROUGE-L is the F-measure from 0 to 1 with the best-matching accepted answer, averaged over items (rouge_score).
    """
    require_text_scores()
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(map(len, accepted))
    # sacrebleu needs the same number of references for each item. Repeating one does not change a score.
    references = [[texts[min(n, len(texts) - 1)] for texts in accepted] for n in range(most)]
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts) for answer, texts in
            zip(answers, accepted, strict=True)]  # fmt: skip
    texts = list(answers)
    bleu, chrf = sacrebleu.corpus_bleu(texts, references), sacrebleu.corpus_chrf(texts, references)
    return f"BLEU {bleu.score:.2f} · chrF {chrf.score:.2f} · ROUGE-L {mean(np.array(best))}"
