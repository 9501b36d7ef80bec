"""Scores TF-IDF with logistic regression, the baseline that a fine-tuned classifier must beat.

    python bench/tfidf.py TRAIN.jsonl VALIDATION.jsonl [TEST.jsonl]

Features are words and pairs of words with sublinear term frequencies. C and min_df are chosen by the accuracy on the
validation rows; the test rows are scored once, with that choice. Needs the extra finetune (scikit-learn).
"""

import argparse
import itertools
import json
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

STRENGTHS = (3, 10, 30, 100)
"""Values of C."""


def read(path: Path) -> tuple[list[str], list[str]]:
    """The texts and the labels of a file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def main() -> None:
    """Prints the scores of each choice, and of the best one on the test rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    train, validation, *test = (read(path) for path in parser.parse_args().files)
    found = []
    for min_df, strength in itertools.product((1, 2), STRENGTHS):
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=min_df)
        model = make_pipeline(words, LogisticRegression(C=strength, max_iter=300)).fit(*train)
        accuracy = accuracy_score(validation[1], model.predict(validation[0]))
        print(f"min_df {min_df}, C {strength}: validation accuracy {accuracy:.4f}", flush=True)
        found.append((accuracy, model))
    _, best = max(found, key=lambda pair: pair[0])
    for name, (texts, labels) in zip(("validation", "test"), (validation, *test), strict=False):
        predicted = best.predict(texts)
        scores = accuracy_score(labels, predicted), f1_score(labels, predicted, average="macro")
        print(f"best, {name}: accuracy {scores[0]:.4f}, macro F1 {scores[1]:.4f}")


if __name__ == "__main__":
    main()
