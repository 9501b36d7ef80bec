"""`gptjax embed`: writes an embedding for each row of a file."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.embed import EmbedConfig
from gptjax.errors import UserError
from gptjax.evaluation.embeddings import EmbeddingOptions, check_layer, document, embed_ids
from gptjax.files import atomic_file
from gptjax.machine import compile_cache
from gptjax.model.gpt import Compute
from gptjax.report.progress import RowProgress, notify
from gptjax.text.counts import counted
from gptjax.text.formats import Row
from gptjax.text.rows import read_rows, text_field
from gptjax.verbs.output_rows import renamed, without_nan

CHUNK = 1024
"""Number of rows in memory at a time."""
OUTPUT = "embedding"
Batch = tuple[list[Row], np.ndarray]
"""Rows and their embeddings, float32 `[rows, n_embd]`."""


def run_embed(options: EmbedConfig) -> int:
    """Writes embeddings, and prints their number."""
    compile_cache.start()
    print(f"{options.out}: {embed_rows(options, notify):,} vectors")
    return 0


def embed_rows(options: EmbedConfig, notify: Callable[[str], None] = print) -> int:
    """Writes an embedding for each row, in input order; the file is written atomically.

    Returns:
        The number of embeddings.

    Raises:
        UserError: The run has no tokenizer or no such layer, a row has no text, or the file cannot be written.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    if run.tokenizer is None:
        raise UserError(f"{options.run_dir}: has no tokenizer; import the model again with --tokenizer")
    tokenizer, model, counts = run.tokenizer, run.config.model, Counter[str]()
    check_layer(model, options.layer)
    compute = Compute(options.compute_dtype, unroll=1)
    chosen = EmbeddingOptions(options.layer, options.pooling, options.normalized)
    rows = read_rows([options.file], "file", counts=counts)
    cut = 0

    def batches() -> Iterator[Batch]:
        nonlocal cut
        while chunk := list(itertools.islice(rows, CHUNK)):
            texts = [document(tokenizer, tokenizer.encode(text_field(row, options.text_field))) for row in chunk]
            cut += sum(len(ids) > model.block_size for ids in texts)
            texts = [ids[: model.block_size] for ids in texts]
            yield chunk, embed_ids(model, run.params, texts, chosen, compute, options.batch_size)
            progress.advance(len(chunk))

    progress = RowProgress(None, 0, "rows")
    path = Path(options.out).expanduser()
    try:
        count = _write(batches(), path, counts)
    finally:
        progress.close()
    if cut:
        notify(f"{cut:,} of {count:,} texts were cut at model.block_size={model.block_size} tokens")
    if counts["renamed"]:
        notify(f'{counts["renamed"]:,} rows have a field named {OUTPUT}; the output has it as "input.{OUTPUT}"')
    for line in counted(counts):
        notify(line)
    return count


def _write(batches: Iterable[Batch], path: Path, counts: Counter[str]) -> int:
    try:
        with atomic_file(path) as file:
            count = WRITERS[path.suffix](batches, file, counts)
            if not count:
                raise UserError("file: has no rows")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return count


def _write_jsonl(batches: Iterable[Batch], file: IO[bytes], counts: Counter[str]) -> int:
    count = 0
    for rows, vectors_ED in batches:
        for row, vector_D in zip(rows, vectors_ED, strict=True):
            values = without_nan(renamed(row, (OUTPUT,), counts)) | {OUTPUT: vector_D.tolist()}
            file.write((json.dumps(values, ensure_ascii=False, allow_nan=False, default=str) + "\n").encode())
        count += len(rows)
    return count


def _write_npy(batches: Iterable[Batch], file: IO[bytes], counts: Counter[str]) -> int:
    """Writes only the embeddings, `[rows, n_embd]`."""
    del counts
    found = [vectors_ED for _, vectors_ED in batches]
    if not found:
        return 0
    np.save(file, np.concatenate(found))
    return sum(map(len, found))


def _write_parquet(batches: Iterable[Batch], file: IO[bytes], counts: Counter[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    count = 0
    try:
        for rows, vectors_ED in batches:
            values = [renamed(row, (OUTPUT,), counts) for row in rows]
            names = list(dict.fromkeys(name for row in values for name in row))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ED.reshape(-1)), vectors_ED.shape[1])
            if writer is None:
                columns = {name: pa.array([row.get(name) for row in values]) for name in names}
                table = pa.table(columns | {OUTPUT: vectors})
                writer = pq.ParquetWriter(file, table.schema)
            else:
                fields = list(writer.schema)[:-1]
                if new := set(names) - {field.name for field in fields}:
                    raise UserError(f"{rows[0].where} and after: new fields {', '.join(sorted(new))}; write .jsonl")
                columns = {f.name: pa.array([row.get(f.name) for row in values], f.type) for f in fields}
                table = pa.table(columns | {OUTPUT: vectors}, writer.schema)
            writer.write_table(table)
            count += len(rows)
    except pa.ArrowException as error:
        raise UserError(f"the fields do not fit into columns of one type each: {error}; write .jsonl") from None
    finally:
        if writer is not None:
            writer.close()
    return count


WRITERS: dict[str, Callable[[Iterable[Batch], IO[bytes], Counter[str]], int]] = {
    ".jsonl": _write_jsonl,
    ".npy": _write_npy,
    ".parquet": _write_parquet,
}
