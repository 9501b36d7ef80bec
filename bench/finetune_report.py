"""make finetune-report: trains the recipes of configs/finetune/ and writes the tables of docs/finetuning.md.

The data is not part of the repository: docs/finetuning.md says where it comes from. Tables whose data is missing are
skipped, with the reason.

Runs that are trained already are not trained again, so an interrupted report can be continued. Arguments after `--`
are passed to every training, such as `-- --cache_dir DIR`; `--only spam tags` makes some of the tables. Times and
memory depend on the machine and its load: let nothing else run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RUNS = Path("runs/finetune")
SPEECHES, SHAKESPEARE = DATA / "state_of_the_union.jsonl", DATA / "tinyshakespeare.txt"
BASE = [SPEECHES, DATA / "spam", DATA / "brown"]
NEEDED = {"spam": BASE, "tags": BASE, "domain": [SPEECHES, SHAKESPEARE]}
TABLES = tuple(NEEDED)

# Each way to fine-tune, and its flags: methods with few trainable parameters need a higher rate and more steps.
LONG = ("--train.num_steps", "600")
FAST = ("--optim.learning_rate", "3e-3", *LONG)
METHODS: dict[str, Sequence[str]] = {
    "full": (),
    "head": ("--finetune.train", "new", *FAST),
    "top 2 blocks": ("--finetune.train", "top", "--finetune.top_k", "2", "--optim.learning_rate", "1e-3", *LONG),
    "lora": (
        *("--finetune.train", "new", "--model.adapter.kind", "lora", "--model.adapter.rank", "5"),
        *("--model.adapter.targets", "attn/w_qkv", "mlp/w_in", "--optim.learning_rate", "5e-3"),
        *("--train.num_steps", "900", "--train.batch_size", "32", "--train.ema", "0.99"),
    ),
    "bottleneck": ("--finetune.train", "new", "--model.adapter.kind", "bottleneck", *FAST),
    "prompt": ("--finetune.train", "new", "--model.adapter.kind", "prompt", "--optim.learning_rate", "1e-2", *LONG),
    "prefix": ("--finetune.train", "new", "--model.adapter.kind", "prefix", "--optim.learning_rate", "1e-2", *LONG),
}
# The base after one step at 1 % of its learning rate: its tokenizer and its shape, without what it learned.
UNTRAINED = ("--train.num_steps", "1", "--train.sample_tokens", "0")
SAME_SCRATCH = ("--init_from", str(RUNS / "untrained"), "--optim.learning_rate", "1e-3")
OWN_SCRATCH = (
    *("--init_from", "", "--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "8192", "--model.n_layer", "4"),
    *("--model.n_head", "4", "--model.n_embd", "256", "--model.block_size", "256", "--optim.learning_rate", "1e-3"),
)


def main() -> None:
    """Makes the tables, one after another, in runs/finetune/report.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=TABLES, choices=TABLES)
    options, extra = parser.parse_known_args()
    extra = [word for word in extra if word != "--"]
    made = {"spam": spam, "tags": tags, "domain": domain}
    for name in options.only:
        missing = [str(path) for path in NEEDED[name] if not path.exists()]
        if missing:
            print(f"{name}: skipped: {', '.join(missing)} is missing; docs/finetuning.md says where to get it")
            continue
        text = "\n".join(made[name](extra)) + "\n"
        print(text, flush=True)
        (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
        (ROOT / RUNS / f"report-{name}.md").write_text(text, encoding="utf-8")


def spam(extra: list[str]) -> Iterable[str]:
    """Proofs 1, 3 and 4: every way to fine-tune on spam, its cost, and what the language model forgets."""
    base = train("base", "base", (), extra)
    yield "| spam | macro F1 | accuracy | trained parameters | step memory | peak | CPU time | base's loss after |"
    yield "|---|---|---|---|---|---|---|---|"
    yield f"| base alone | | | | | | | {loss_of(base, [])} |"
    yield f"| TF-IDF, logistic regression | {tfidf():.4f} | | | | | | |"
    for name, flags in METHODS.items():
        yield spam_row(name, train(f"spam-{name.replace(' ', '-')}", "spam", flags, extra), forgets=True)
    train("untrained", "base", UNTRAINED, extra)
    yield spam_row("full, from scratch", train("spam-untrained", "spam", SAME_SCRATCH, extra), forgets=False)
    own = train("spam-scratch", "spam", OWN_SCRATCH, extra)
    yield spam_row("full, from scratch, with a tokenizer of the mails alone", own, forgets=False)


def spam_row(name: str, run: Path, forgets: bool) -> str:
    """A row of the first table."""
    scores, told = evaluate(run), json.loads((run / "report.json").read_text())
    loss = loss_of(run, ["--language_model"]) if forgets else ""
    return (
        f"| {name} | {found(r'macro F1 ([0-9.]+)', scores)} | {found(r'accuracy ([0-9.]+)', scores)} |"
        f" {told['trainable']} | {told['memory']} | {told['peak_mb']} MB | {minutes(told)} | {loss} |"
    )


def tags(extra: list[str]) -> Iterable[str]:
    """Proof 2: part-of-speech tags of Brown."""
    train("base", "base", (), extra)
    run = train("tags", "tags", (), extra)
    scores, told = evaluate(run), json.loads((run / "report.json").read_text())
    yield "| tags | accuracy | CPU time |"
    yield "|---|---|---|"
    yield f"| most frequent tag of the word | {most_frequent():.4f} | |"
    yield f"| fine-tuned | {found(r'accuracy ([0-9.]+)', scores)} | {minutes(told)} |"


def minutes(told: dict) -> str:
    """Processor time of a training, as minutes and seconds."""
    return f"{told['cpu_seconds'] // 60}:{told['cpu_seconds'] % 60:02}"


def domain(extra: list[str]) -> Iterable[str]:
    """Proof 5: speeches, then Shakespeare; both losses before and after, on all of each text."""
    before, after = (train(name, name, (), extra) for name in ("speeches", "shakespeare"))
    texts = {"speeches": SPEECHES, "Shakespeare": SHAKESPEARE}
    yield "| loss on all of the text, nats per token | " + " | ".join(texts) + " |"
    yield "|---|---|---|"
    for name, run in {"speeches": before, "continued on Shakespeare": after}.items():
        losses = (loss_of(run, ["--data.path", str(file)]) for file in texts.values())
        yield f"| {name} | {' | '.join(losses)} |"


def train(name: str, config: str, flags: Sequence[str], extra: Sequence[str]) -> Path:
    """Trains a recipe once, in a process of its own; stores what it printed, its processor time and its peak memory."""
    run = ROOT / RUNS / name
    if (run / "report.json").exists():
        return run
    # A run resumes by itself; the time of its first start counts.
    command = [sys.executable, "train.py", f"configs/finetune/{config}.yaml", "--run_dir", str(RUNS / name)]
    output, peak, seconds = call_measured([*command, *flags, *extra])
    parameters = found(r"parameters +([^,]+)", output)
    told = {
        "cpu_seconds": seconds,
        "peak_mb": peak,
        "trainable": found(r"parameters +[^,]+, (.+? trainable \(.+?\))", output).replace(" trainable", "")
        if " trainable (" in output
        else parameters,
        "memory": found(r"memory +(\S+ \S+) per device", output),
    }
    (run / "train.log").write_text(output, encoding="utf-8")
    (run / "report.json").write_text(json.dumps(told), encoding="utf-8")
    return run


def evaluate(run: Path) -> str:
    """What gptjax evaluate says of a run that names labels."""
    return call([sys.executable, "-m", "gptjax", "evaluate", "--run_dir", str(run)])


def loss_of(run: Path, flags: list[str]) -> str:
    """The next token's loss, as gptjax evaluate prints it."""
    output = call([sys.executable, "-m", "gptjax", "evaluate", "--run_dir", str(run), "--windows", "256", *flags])
    return found(r"loss ([0-9.]+) · perplexity", output)


def call(command: list[str]) -> str:
    """Runs a program in the repository; ends the report where it fails."""
    return call_measured(command)[0]


def call_measured(command: list[str]) -> tuple[str, int, int]:
    """As `call`, with the most memory that the program held, in MB, and the seconds of all cores together."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        output = told.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output[-2000:]}")
    return output, usage.ru_maxrss // 1024, round(usage.ru_utime + usage.ru_stime)


def found(pattern: str, text: str) -> str:
    """The first group of a pattern that must be there."""
    match = re.search(pattern, text)
    if match is None:
        sys.exit(f"{pattern!r} is not in:\n{text[-2000:]}")
    return match.group(1)


def tfidf() -> float:
    """Macro F1 of TF-IDF with logistic regression on the same rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    sides = {}
    for side in ("train", "validation"):
        lines = (DATA / "spam" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
        sides[side] = [json.loads(line) for line in lines]
    texts, labels = ({s: [row[key] for row in rows] for s, rows in sides.items()} for key in ("text", "label"))
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    predicted = model.fit(texts["train"], labels["train"]).predict(texts["validation"])
    return float(f1_score(labels["validation"], predicted, average="macro"))


def most_frequent() -> float:
    """Accuracy of each word's most frequent training tag; of words never seen, the most frequent tag of all."""
    counts: dict[str, dict[str, int]] = {}
    total: dict[str, int] = {}
    for word, tag in tagged("train"):
        of_word = counts.setdefault(word, {})
        of_word[tag] = of_word.get(tag, 0) + 1
        total[tag] = total.get(tag, 0) + 1
    default = max(total, key=lambda tag: total[tag])
    best = {word: max(of_word, key=lambda tag: of_word[tag]) for word, of_word in counts.items()}
    right = [best.get(word, default) == tag for word, tag in tagged("validation")]
    return sum(right) / len(right)


def tagged(side: str) -> Iterable[tuple[str, str]]:
    """Words of Brown and their tags."""
    for line in (DATA / "brown" / f"{side}.conll").read_text(encoding="utf-8").splitlines():
        if line:
            word, tag = line.split("\t")
            yield word, tag


if __name__ == "__main__":
    main()
