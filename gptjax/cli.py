"""The command line: one function per verb. Heavy imports stay inside them, so that help and errors come at once."""

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax import __version__, allocator, runtime
from gptjax.checks import usable_path
from gptjax.config import Config
from gptjax.config_io import flag_types, from_dict, load_config, read_flags
from gptjax.errors import UserError, did_you_mean, one_line
from gptjax.verb_options import (
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    PlanConfig,
    PredictConfig,
    SampleConfig,
    VerifyResumeConfig,
)


def train(args: Sequence[str]) -> int:
    """Trains: gptjax train CONFIG.yaml [--section.key VALUE ...]; goes on where the run directory has a checkpoint."""
    config = _config(args, "train")
    runtime.start(config.cache_dir)
    from gptjax.parallel import cluster

    with cluster.joined(config.cluster):
        from gptjax.training import trainer

        return trainer.train(config)


def prepare(args: Sequence[str]) -> int:
    """Prepares data and tokenizer as train would: gptjax prepare CONFIG.yaml [--section.key VALUE ...]."""
    config = _config(args, "prepare")
    from gptjax.text.prepare import describe
    from gptjax.text.prepare import prepare as prepare_data

    prepared = prepare_data(config.data, config.tokenizer, Path(config.cache_dir).expanduser(), report=print)
    print(describe(prepared))
    print(prepared.folder)
    return 0


def sample(args: Sequence[str]) -> int:
    """Continues prompts: gptjax sample --run_dir DIR --prompt TEXT [--option VALUE ...]."""
    config = _flags(SampleConfig, args)
    prompts = _prompts(config)
    runtime.start()
    from gptjax.generation.sample import sample_texts
    from gptjax.training.runs import load_run

    run = load_run(Path(config.run_dir).expanduser(), config.checkpoint, config.strict, _notify, config.base)
    if run.tokenizer is None:
        raise UserError(f"{config.run_dir}: has no tokenizer; import the model again with --tokenizer gpt2")
    one = len(prompts) * config.num_samples == 1
    if one:
        _write(prompts[0])
    texts = sample_texts(
        run.config.model,
        run.params,
        run.tokenizer,
        prompts,
        config,
        on_text=(lambda _prompt, _sample, piece: _write(piece)) if one else None,
        notify=_notify,
    )
    if one:
        _write("\n")
    else:
        for prompt, continuations in zip(prompts, texts, strict=True):
            for text in continuations:
                _write(f"{prompt}{text}\n---------------\n")
    return 0


def evaluate(args: Sequence[str]) -> int:
    """Measures a run on validation text or labels: gptjax evaluate --run_dir DIR [--data.path ...]."""
    config = _flags(EvaluateConfig, args)
    runtime.start()
    from gptjax.training.evaluate import evaluate_run

    print(evaluate_run(config, _notify))
    return 0


def predict(args: Sequence[str]) -> int:
    """Labels texts: gptjax predict --run_dir DIR --text TEXT, or --file IN --out OUT.jsonl."""
    config = _flags(PredictConfig, args)
    runtime.start()
    from gptjax.training.predict import predict_run

    count = predict_run(config, _notify)
    if config.out:
        print(f"{config.out}: {count:,} rows")
    return 0


def import_model(args: Sequence[str]) -> int:
    """Makes a run directory of a Hugging Face model: gptjax import HF_DIR --to RUN_DIR [--tokenizer gpt2]."""
    source, rest = _positional(args, "import HF_DIR --to RUN_DIR")
    config = _flags(ImportConfig, rest)
    from gptjax.exchange.runs import import_run

    run_dir = Path(config.to).expanduser()
    imported = import_run(Path(source).expanduser(), run_dir, config.tokenizer, notify=_notify)
    model = imported.model
    print(f"{run_dir}: {model.n_layer} layers, {model.n_embd} wide, vocabulary {model.vocab_size:,}")
    return 0


def export_model(args: Sequence[str]) -> int:
    """Writes a run as a Hugging Face model: gptjax export RUN_DIR --to HF_DIR [--merge]."""
    source, rest = _positional(args, "export RUN_DIR --to HF_DIR [--merge]")
    config = _flags(ExportConfig, rest)
    from gptjax.exchange.runs import export_run

    export_run(Path(source).expanduser(), config, notify=_notify)
    print(f"{config.to}: written")
    return 0


def verify_resume(args: Sequence[str]) -> int:
    """Kills a short run, goes on with it, compares its bits: gptjax verify-resume CONFIG.yaml [--steps N] [...]."""
    path, rest = _positional(args, "verify-resume CONFIG.yaml [--steps N] [--section.key VALUE ...]")
    own, others = _split_flags(VerifyResumeConfig, rest)
    options, config = _flags(VerifyResumeConfig, own), load_config(path, read_flags(Config, others))
    runtime.start(config.cache_dir)
    from gptjax.training import verify_resume

    difference = verify_resume.verify_resume(config, options)
    if difference:
        print(f"DIFFERENT: {difference}{verify_resume.hint()}")
        return 1
    print(f"the same: all arrays and metrics of {options.steps} steps, after {options.kills} kills, bit for bit")
    return 0


def plan(args: Sequence[str]) -> int:
    """Says what a run needs on other machines: gptjax plan CONFIG.yaml --devices N --chip NAME [--section.key ...]."""
    path, rest = _positional(args, "plan CONFIG.yaml --devices N --chip NAME [--section.key VALUE ...]")
    own, others = _split_flags(PlanConfig, rest)
    options, config = _flags(PlanConfig, own), load_config(path, read_flags(Config, others))
    runtime.start(config.cache_dir)
    runtime.pretend_devices(options.devices)
    from gptjax.planning.describe import as_values, describe
    from gptjax.planning.plan import plan_run

    given, suggested = plan_run(config, options, _notify)
    print(json.dumps(as_values(given, suggested, options)) if options.json else describe(given, suggested, options))
    return 0


def doctor(args: Sequence[str]) -> int:
    """Describes this machine and verifies data and runs in full: gptjax doctor [CONFIG | RUN_DIR | DATA_DIR ...]."""
    places = list(itertools.takewhile(lambda arg: not arg.startswith("--"), args))
    config = _flags(DoctorConfig, [*(["--check", *places] if places else []), *args[len(places) :]])
    from gptjax.training.doctor import examine

    return 0 if examine(config) else 1


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], type]] = {
    "prepare": (prepare, Config),
    "train": (train, Config),
    "sample": (sample, SampleConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "predict": (predict, PredictConfig),
    "import": (import_model, ImportConfig),
    "export": (export_model, ExportConfig),
    "verify-resume": (verify_resume, VerifyResumeConfig),
    "plan": (plan, PlanConfig),
    "doctor": (doctor, DoctorConfig),
}


def run(*verb: str) -> None:
    """The program's entry: `gptjax VERB ...`, or `train.py ...` with the verb given."""
    allocator.restart()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # samples hold characters that the terminal may not have
    sys.exit(main([*verb, *sys.argv[1:]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; a mistake of the user is one line on standard error and status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except BrokenPipeError:  # the reader of standard output went away, as `| head` does
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("gptjax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"gptjax: {line}", file=sys.stderr)
        return 2


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print("gptjax VERB ...\n")
        for name, (verb, _) in VERBS.items():
            print(f"  {name:13} {verb.__doc__}")
        print("\ngptjax VERB --help lists a verb's options.")
        return 0
    if args[0] == "--version":
        print(f"gptjax {__version__}")
        return 0
    if args[0] not in VERBS:
        raise UserError(f"unknown verb {args[0]!r}.{did_you_mean(args[0], VERBS)} Verbs: {', '.join(VERBS)}.")
    verb, options = VERBS[args[0]]
    if "-h" in args or "--help" in args:
        _print_help(args[0], verb, options)
        return 0
    return verb(args[1:])


def _print_help(name: str, verb: Callable, options: type) -> None:
    import tyro

    print(verb.__doc__)
    with contextlib.suppress(SystemExit):  # how tyro ends after --help
        tyro.cli(
            options, prog=f"gptjax {name}", args=["--help"], use_underscores=True, config=(tyro.conf.FlagConversionOff,)
        )


def _config(args: Sequence[str], verb: str) -> Config:
    path, rest = _positional(args, f"{verb} CONFIG.yaml [--section.key VALUE ...]")
    return load_config(path, read_flags(Config, rest))


def _positional(args: Sequence[str], usage: str) -> tuple[str, Sequence[str]]:
    if not args or args[0].startswith("-"):
        raise UserError(f"usage: gptjax {usage}")
    usable_path("command line", args[0])
    return args[0], args[1:]


def _flags(cls: type, args: Sequence[str]) -> Any:
    return from_dict(cls, read_flags(cls, args), "command line")


def _split_flags(cls: type, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags that are fields of `cls`, with their values, and all others."""
    own: list[str] = []
    others: list[str] = []
    current = others
    for word in args:
        if word.startswith("--"):
            current = own if word[2:].partition("=")[0] in flag_types(cls) else others
        current.append(word)
    return own, others


def _prompts(config: SampleConfig) -> list[str]:
    """The texts to continue: from the flags, a file, or standard input."""
    if not config.run_dir:
        raise UserError("command line: --run_dir is missing; name the folder of a trained run")
    if config.prompt:
        for number, prompt in enumerate(config.prompt, 1):
            if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"prompt {number} is not UTF-8; write it to a file in UTF-8 and give --prompt_file")
        return list(config.prompt)
    try:
        if config.prompt_file:
            text = Path(config.prompt_file).expanduser().read_text(encoding="utf-8")
        else:
            text = sys.stdin.buffer.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.prompt_file or 'standard input'}: the prompt cannot be read: {error}") from None
    if not text:
        raise UserError("the prompt is empty; give --prompt TEXT, --prompt_file FILE or text on standard input")
    return [text]


def _notify(message: str) -> None:
    print(f"gptjax: {message}", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
