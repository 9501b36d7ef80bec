"""Options of sample."""

import dataclasses

from gptjax.config.rules import different_files, no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.decoding import DecodingConfig, no_empty_text
from gptjax.errors import UserError

MOST_ROWS = 2**16
"""Largest number of samples in one call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(DecodingConfig):
    """Continues prompts with a trained model."""

    prompt: tuple[str, ...] = ()
    """One or several prompts to continue; standard input if neither this nor prompt_file is given."""
    prompt_file: str = ""
    """File whose whole text is the prompt. With --out: a file of rows (.jsonl .csv .tsv .parquet), each with a
    prompt."""
    out: str = ""
    """JSONL file to write the rows of prompt_file and their samples to; empty: print samples."""
    prompt_template: str = "{prompt}"
    """Template of the prompt of a row of prompt_file: {NAME} is a field of the row, {{ and }} are braces."""
    batch_size: int = 16
    """Number of rows of prompt_file that are decoded together."""
    raw: bool = False
    """For a run with task.kind=instruct: use the prompt as it is, without the chat template."""
    num_samples: int = 1
    """Number of samples for each prompt."""
    attention_sinks: int = 0
    """Number of first tokens of a text that stay in the context when it slides (attention sinks, arXiv:2309.17453); 0:
    model.attention_sinks of the run."""
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens, prompt included; 0: n-grams may repeat."""
    bad_words: tuple[str, ...] = ()
    """Banned texts, also with a space before them; only the tokenizer's own encoding of a text is banned."""
    regex: str = ""
    """Regular expression that the whole sample must match; empty: none."""
    json_schema: str = ""
    """File with a JSON schema that the sample must match, as JSON without line breaks and spaces; empty: none."""
    num_beams: int = 1
    """Number of beams of beam search; 1: no beam search."""
    length_penalty: float = 1.0
    """Length penalty of beam search: sums of log-probabilities are divided by the length to this power; larger values
    favour long samples."""
    logprobs: int = 0
    """Show the log-probability of each chosen token and of this many most likely tokens; 0: none."""
    json: bool = False
    """Print one JSON object per sample."""
    allow_special: bool = False
    """Read the tokenizer's end token, such as <|endoftext|>, in a prompt as that token instead of plain text."""

    def __post_init__(self):
        super().__post_init__()
        positive("", self, "num_samples", "num_beams")
        not_negative("", self, "no_repeat_ngram", "logprobs", "attention_sinks")
        usable_paths("", self, "prompt_file", "out", "json_schema")
        different_files(self, "prompt_file", "out")
        positive("", self, "batch_size")
        no_effect("", self, "out", bool(self.prompt_file), "prompt_file")
        no_effect("", self, "json", not self.out, "standard output")
        for name in ("prompt_template", "batch_size"):
            no_effect("", self, name, bool(self.out), "out")
        if max(1, len(self.prompt)) * self.num_samples > MOST_ROWS:
            raise UserError(
                f"num_samples={self.num_samples} of {max(1, len(self.prompt))} prompts: at most {MOST_ROWS}"
            )
        if self.prompt and self.prompt_file:
            raise UserError("prompt and prompt_file are both set; give one")
        no_empty_text(self, "bad_words")
        no_effect("", self, "length_penalty", self.num_beams > 1, "num_beams above 1")
        if self.num_beams > 1:
            if self.temperature > 0:
                raise UserError(f"num_beams={self.num_beams} needs temperature=0: beam search draws nothing")
            if self.num_samples > self.num_beams:
                raise UserError(f"num_samples={self.num_samples} must be at most num_beams={self.num_beams}")
            for name in ("stop", "logprobs", "attention_sinks", "draft_run_dir", "draft_ngram", "regex", "json_schema"):
                no_effect("", self, name, False, "num_beams=1")
        no_effect("", self, "attention_sinks", not self.speculates, "a context that slides: with a draft it does not")
        if self.regex and self.json_schema:
            raise UserError("regex and json_schema are both set; give one")
        if self.regex or self.json_schema:
            unfit = ("ignore_end_of_text", "min_new_tokens", "no_repeat_ngram", "bad_words")
            for name in (*unfit, "draft_run_dir", "draft_ngram"):
                no_effect("", self, name, False, "free text: regex and json_schema decide which tokens may follow")
