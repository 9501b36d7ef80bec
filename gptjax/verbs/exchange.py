"""`gptjax import` and `gptjax export`."""

from pathlib import Path

from gptjax.config.verbs.exchange import ExportConfig, ImportConfig
from gptjax.exchange.runs import export_run, import_run
from gptjax.report.progress import notify


def run_import(source: str, config: ImportConfig) -> int:
    """Creates a run directory from a Hugging Face model folder, a GGUF file or a PEFT folder."""
    run_dir = Path(config.to).expanduser()
    model = import_run(Path(source).expanduser(), run_dir, config.tokenizer, notify, config.base).model
    print(f"{run_dir}: {model.n_layer} layers, {model.n_embd} wide, vocabulary {model.vocab_size:,}")
    return 0


def run_export(source: str, config: ExportConfig) -> int:
    """Writes a run as a Hugging Face model folder or a GGUF file."""
    export_run(Path(source).expanduser(), config, notify=notify)
    print(f"{config.to}: written")
    return 0
