"""The command line: one function per verb, which reads its arguments and calls a function of `verbs/`.

Heavy imports are inside these functions, so that help and errors are printed at once.
"""

import contextlib
import gc
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptjax import __version__
from gptjax.config.dial import DialConfig
from gptjax.config.reader import flag_types, from_dict, is_flag, load_config, read_flags
from gptjax.config.rules import usable_path
from gptjax.config.run import Config
from gptjax.config.start import Start, start_config
from gptjax.config.synonyms import suggest_verb
from gptjax.config.verbs.chat import ChatConfig
from gptjax.config.verbs.data import DataVerbConfig
from gptjax.config.verbs.diagnose import DiagnoseConfig
from gptjax.config.verbs.doctor import DoctorConfig
from gptjax.config.verbs.embed import EmbedConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.config.verbs.exchange import ExportConfig, ImportConfig
from gptjax.config.verbs.inspect import InspectConfig
from gptjax.config.verbs.lr_find import LrFindConfig
from gptjax.config.verbs.plan import PlanConfig
from gptjax.config.verbs.predict import PredictConfig
from gptjax.config.verbs.prepare import PrepareConfig
from gptjax.config.verbs.profile import ProfileConfig
from gptjax.config.verbs.report import ReportConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.config.verbs.scaling_fit import ScalingFitConfig
from gptjax.config.verbs.serve import ServeConfig
from gptjax.config.verbs.sweep import SweepConfig
from gptjax.config.verbs.tokenizer import TokenizerVerbConfig
from gptjax.config.verbs.verify_resume import VerifyResumeConfig
from gptjax.errors import UserError, one_line
from gptjax.machine.accelerator import has_accelerator

Restart = Callable[[str, int], None]
"""Starts the program again with faster memory settings: `allocator.restart`, or nothing."""
NO_RESTART = "--no-restart"
PIPED_COLUMNS = "129"
"""Width of help that is not printed on a terminal: the largest that `tyro` does not cut into columns of options."""


def stay(_cache_dir: str, _processes: int) -> None:
    """Leaves the memory settings of this process as they are."""


def train(args: Sequence[str], restart: Restart = stay) -> int:
    """Trains, or resumes a run: gptjax train [CONFIG.yaml | RUN_DIR | --size small] [--section.key VALUE ...]."""
    start = _start(args, "train")
    restart(start.config.cache_dir, max(1, start.config.cluster.num_processes))
    from gptjax.verbs.train import run_train

    return run_train(start)


def prepare(args: Sequence[str]) -> int:
    """Prepares data and tokenizer as train would: gptjax prepare [CONFIG.yaml | RUN_DIR] [--shard I/N] [...]."""
    place = [] if not args or args[0].startswith("-") else [args[0]]
    own, others = _split_flags(PrepareConfig, args[len(place) :])
    start = _start([*place, *others], "prepare")
    from gptjax.verbs.prepare import run_prepare

    return run_prepare(start, _flags(PrepareConfig, own).shard)


def data(args: Sequence[str]) -> int:
    """Shows the documents of a step, or the hardest and easiest ones: gptjax data RUN_DIR --step N | --rank_loss."""
    run_dir, rest = _positional(args, "data RUN_DIR --step N | --rank_loss")
    config = _flags(DataVerbConfig, rest)
    from gptjax.verbs.data import run_data

    return run_data(run_dir, config)


def tokenizer(args: Sequence[str]) -> int:
    """Measures tokenizers on text, or extends or prunes a run's vocabulary: gptjax tokenizer RUN_DIR --data.path ..."""
    place, rest = _positional(args, "tokenizer RUN_DIR|tokenizer.json|NAME --data.path FILES [--extend N --to RUN_DIR]")
    config = _flags(TokenizerVerbConfig, rest)
    from gptjax.verbs.tokenizer import run_tokenizer

    return run_tokenizer(place, config)


def sample(args: Sequence[str], restart: Restart = stay) -> int:
    """Continues prompts: gptjax sample --run_dir DIR --prompt TEXT, or --prompt_file IN.jsonl --out OUT.jsonl."""
    config = _flags(SampleConfig, args)
    restart(Config.cache_dir, 1)
    if config.out:
        from gptjax.verbs.sample_rows import run_sample_rows

        return run_sample_rows(config)
    from gptjax.verbs.sample import read_prompts, run_sample

    return run_sample(config, read_prompts(config))


def chat(args: Sequence[str], restart: Restart = stay) -> int:
    """Talks with a model: gptjax chat --run_dir DIR [--system TEXT] [--option VALUE ...]."""
    config = _flags(ChatConfig, args)
    restart(Config.cache_dir, 1)
    from gptjax.verbs.chat import run_chat

    return run_chat(config)


def serve(args: Sequence[str], restart: Restart = stay) -> int:
    """Serves a model over HTTP, with a web page: gptjax serve --run_dir DIR [--port N] [--option VALUE ...]."""
    config = _flags(ServeConfig, args)
    restart(Config.cache_dir, 1)
    from gptjax.verbs.serve import run_serve

    return run_serve(config)


def evaluate(args: Sequence[str]) -> int:
    """Measures a run on its validation data or other text: gptjax evaluate --run_dir DIR [--data.path ...]."""
    config = _flags(EvaluateConfig, args)
    from gptjax.verbs.evaluate import run_evaluate

    return run_evaluate(config)


def predict(args: Sequence[str]) -> int:
    """Labels texts: gptjax predict --run_dir DIR --text TEXT, or --file IN --out OUT.jsonl."""
    config = _flags(PredictConfig, args)
    from gptjax.verbs.predict import run_predict

    return run_predict(config)


def embed(args: Sequence[str]) -> int:
    """Writes a vector for each text: gptjax embed --run_dir DIR --file IN.jsonl --out OUT.parquet."""
    config = _flags(EmbedConfig, args)
    from gptjax.verbs.embed import run_embed

    return run_embed(config)


def import_model(args: Sequence[str]) -> int:
    """Converts a model to a run directory: gptjax import HF_DIR|FILE.gguf --to RUN_DIR [--tokenizer gpt2]."""
    source, rest = _positional(args, "import HF_DIR|FILE.gguf --to RUN_DIR")
    config = _flags(ImportConfig, rest)
    from gptjax.verbs.exchange import run_import

    return run_import(source, config)


def export_model(args: Sequence[str]) -> int:
    """Converts a run to a Hugging Face model or GGUF file: gptjax export RUN_DIR --to HF_DIR|FILE.gguf [--merge]."""
    source, rest = _positional(args, "export RUN_DIR --to HF_DIR|FILE.gguf [--merge]")
    config = _flags(ExportConfig, rest)
    from gptjax.verbs.exchange import run_export

    return run_export(source, config)


def verify_resume(args: Sequence[str]) -> int:
    """Kills and resumes a short run, then compares its bits: gptjax verify-resume CONFIG.yaml [--steps N] [...]."""
    config, options = _config_and_options(
        args, VerifyResumeConfig, "verify-resume CONFIG.yaml [--steps N] [--section.key VALUE ...]"
    )
    from gptjax.verbs.verify_resume import run_verify_resume

    return run_verify_resume(config, options)


def plan(args: Sequence[str]) -> int:
    """Estimates memory and time on other chips: gptjax plan CONFIG.yaml --devices N --chip NAME [--section.key ...]."""
    config, options = _config_and_options(
        args, PlanConfig, "plan CONFIG.yaml --devices N --chip NAME [--section.key VALUE ...]"
    )
    from gptjax.verbs.plan import run_plan

    return run_plan(config, options)


def doctor(args: Sequence[str]) -> int:
    """Describes this machine and verifies data and runs in full: gptjax doctor [CONFIG | RUN_DIR | DATA_DIR ...]."""
    config = _flags(DoctorConfig, _places(args, "check"))
    from gptjax.verbs.doctor import run_doctor

    return run_doctor(config)


def report(args: Sequence[str]) -> int:
    """Shows a run, or compares several, in one HTML file: gptjax report RUN_DIR ... [--out FILE] [--png DIR]."""
    config = _flags(ReportConfig, _places(args, "runs"))
    from gptjax.verbs.report import run_report

    return run_report(config)


def inspect(args: Sequence[str]) -> int:
    """Shows attention, probabilities and layers for a text in one HTML file: gptjax inspect RUN_DIR --text TEXT."""
    run_dir, rest = _positional(args, "inspect RUN_DIR --text TEXT [--out FILE]")
    config = _flags(InspectConfig, rest)
    from gptjax.verbs.inspect import run_inspect

    return run_inspect(run_dir, config)


def diagnose(args: Sequence[str]) -> int:
    """Shows where a run's loss comes from: positions, rare tokens, calibration, repetition: gptjax diagnose RUN_DIR."""
    run_dir, rest = _positional(args, "diagnose RUN_DIR [--windows N]")
    config = _flags(DiagnoseConfig, rest)
    from gptjax.verbs.diagnose import run_diagnose

    return run_diagnose(run_dir, config)


def profile(args: Sequence[str]) -> int:
    """Shows where the time of a training step goes: gptjax profile CONFIG.yaml | RUN_DIR [--steps N] [--out DIR]."""
    own, others = _split_flags(ProfileConfig, args)
    options, start = _flags(ProfileConfig, own), _start(others, "profile")
    from gptjax.verbs.profile import run_profile

    return run_profile(start.config, options)


def lr_find(args: Sequence[str]) -> int:
    """Tries rising learning rates and suggests one: gptjax lr-find CONFIG.yaml [--low R] [--high R] [--steps N]."""
    config, options = _config_and_options(args, LrFindConfig, "lr-find CONFIG.yaml [--section.key VALUE ...]")
    from gptjax.verbs.lr_find import run_lr_find

    return run_lr_find(config, options)


def sweep(args: Sequence[str]) -> int:
    """Trains a config with several values of its options: gptjax sweep SWEEP.yaml [--parallel N]."""
    path, rest = _positional(args, "sweep SWEEP.yaml [--parallel N] [--section.key VALUE ...]")
    own, others = _split_flags(SweepConfig, rest)
    options, overrides = _flags(SweepConfig, own), read_flags(Config, others)
    from gptjax.verbs.sweep import run_sweep

    return run_sweep(path, options, overrides)


def scaling_fit(args: Sequence[str]) -> int:
    """Fits a scaling law to small runs and predicts a larger one: gptjax scaling-fit SWEEP_DIR [--params N ...]."""
    config = _flags(ScalingFitConfig, _places(args, "runs"))
    from gptjax.verbs.scaling_fit import run_scaling_fit

    return run_scaling_fit(config)


RESTARTING = (train, sample, chat, serve)
"""Verbs that compute on a CPU for long."""
VERBS: dict[str, tuple[Callable[..., int], type]] = {
    "prepare": (prepare, Config),
    "train": (train, Config),
    "data": (data, DataVerbConfig),
    "tokenizer": (tokenizer, TokenizerVerbConfig),
    "sample": (sample, SampleConfig),
    "chat": (chat, ChatConfig),
    "serve": (serve, ServeConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "predict": (predict, PredictConfig),
    "embed": (embed, EmbedConfig),
    "import": (import_model, ImportConfig),
    "export": (export_model, ExportConfig),
    "verify-resume": (verify_resume, VerifyResumeConfig),
    "plan": (plan, PlanConfig),
    "doctor": (doctor, DoctorConfig),
    "report": (report, ReportConfig),
    "sweep": (sweep, SweepConfig),
    "scaling-fit": (scaling_fit, ScalingFitConfig),
    "lr-find": (lr_find, LrFindConfig),
    "inspect": (inspect, InspectConfig),
    "profile": (profile, ProfileConfig),
    "diagnose": (diagnose, DiagnoseConfig),
}


def run(*verb: str) -> None:
    """The program's entry: `gptjax VERB ...`, or `train.py ...` with the verb given."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # samples hold characters that the terminal may not have
    # Imports and tracing make a million objects that stay. At Python's thresholds, a fifth of the time until the first
    # token of `sample` went into looking for garbage among them.
    gc.set_threshold(50_000, 20, 50)
    sys.exit(main([*verb, *sys.argv[1:]], _restart))


def main(argv: Sequence[str] | None = None, restart: Restart = stay) -> int:
    """Runs a verb; a mistake of the user is one line on standard error and status 2.

    Args:
        argv: The verb and its arguments.
        restart: What verbs of `RESTARTING` call after they have read their arguments.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args, restart)
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


def _restart(cache_dir: str, processes: int) -> None:
    from gptjax.machine import allocator

    allocator.restart(cache_dir, processes)


def _dispatch(args: list[str], restart: Restart) -> int:
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
        raise UserError(f"unknown verb {args[0]!r}.{suggest_verb(args[0], VERBS)} Verbs: {', '.join(VERBS)}.")
    verb, options = VERBS[args[0]]
    if "-h" in args or "--help" in args:
        _print_help(args[0], verb, options)
        return 0
    if verb not in RESTARTING:
        return verb(args[1:])
    words = [word for word in args[1:] if word != NO_RESTART]
    return verb(words, restart if len(words) == len(args) - 1 else stay)


def _print_help(name: str, verb: Callable, options: type) -> None:
    import tyro

    print(verb.__doc__)
    if verb in (train, prepare):
        print("--size small|medium|large, or --depth N: without a config file, choose shape, batch, rate and steps.")
    if verb in RESTARTING:
        print(f"{NO_RESTART}: on Linux, do not restart once with huge pages and a cache of large buffers.")
    with _wide_without_terminal(), contextlib.suppress(SystemExit):  # how tyro ends after --help
        tyro.cli(
            options, prog=f"gptjax {name}", args=["--help"], use_underscores=True, config=(tyro.conf.FlagConversionOff,)
        )


@contextlib.contextmanager
def _wide_without_terminal() -> Iterator[None]:
    """Sets the width of lines, which is 80 by default where standard output is a file or a pipe."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        yield
        return
    os.environ["COLUMNS"] = PIPED_COLUMNS
    try:
        yield
    finally:
        del os.environ["COLUMNS"]


def _start(args: Sequence[str], verb: str) -> Start:
    """The config of a run, from a file, a run directory, or flags alone."""
    if not args:
        raise UserError(f"usage: gptjax {verb} [CONFIG.yaml | RUN_DIR] [--section.key VALUE ...]")
    place, rest = ("", args) if args[0].startswith("-") else _positional(args, "")
    own, others = _split_flags(DialConfig, rest)
    dial, flags = _flags(DialConfig, own), read_flags(Config, others)
    size = 0
    if dial.layers and not place and flags.get("data", {}).get("path"):
        from gptjax.text.sources import corpus_bytes

        size = corpus_bytes(flags["data"]["path"])
    return start_config(place, flags, has_accelerator(), dial, size)


def _config_and_options(args: Sequence[str], cls: type, usage: str) -> tuple[Config, Any]:
    """The config of a run and the verb's own options, whose flags may come in any order."""
    path, rest = _positional(args, usage)
    own, others = _split_flags(cls, rest)
    return load_config(path, read_flags(Config, others)), _flags(cls, own)


def _positional(args: Sequence[str], usage: str) -> tuple[str, Sequence[str]]:
    if not args or args[0].startswith("-"):
        raise UserError(f"usage: gptjax {usage}")
    if not args[0]:
        raise UserError("command line: the first word is an empty path; name a file or folder")
    usable_path("command line", args[0])
    return args[0], args[1:]


def _places(args: Sequence[str], option: str) -> list[str]:
    """The arguments, with the words before the first option as values of `option`."""
    places = list(itertools.takewhile(lambda arg: not arg.startswith("--"), args))
    return [*([f"--{option}", *places] if places else []), *args[len(places) :]]


def _flags(cls: type, args: Sequence[str]) -> Any:
    return from_dict(cls, read_flags(cls, args), "command line")


def _split_flags(cls: type, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags that are fields of `cls`, with their values, and all others."""
    own: list[str] = []
    others: list[str] = []
    current = others
    for word in args:
        if is_flag(word):
            current = own if word[2:].partition("=")[0] in flag_types(cls) else others
        current.append(word)
    return own, others
