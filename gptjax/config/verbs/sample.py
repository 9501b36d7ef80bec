"""Options of sample."""

import dataclasses

from gptjax.config.rules import different_files, no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.decoding import DecodingConfig, no_empty_text
from gptjax.errors import UserError

MOST_ROWS = 2**16
"""Largest number of continuations in one call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(DecodingConfig):
    """Continues prompts with a trained model."""

    prompt: tuple[str, ...] = ()
    """One or several texts to continue; standard input where neither this nor prompt_file is given."""
    prompt_file: str = ""
    """File whose whole text is the prompt; with `out`, rows of .jsonl .csv .tsv or .parquet, of which each has one."""
    out: str = ""
    """JSONL file to write: the rows of prompt_file with their samples."""
    prompt_template: str = "{prompt}"
    """Prompt of a row of prompt_file: {NAME} stands for the row's field, {{ and }} for braces."""
    batch_size: int = 16
    """Prompts of rows that are continued together."""
    raw: bool = False
    """Give the prompt as it is to a run with task.kind=instruct, instead of as the user's message in its template."""
    num_samples: int = 1
    """Continuations of each prompt."""
    attention_sinks: int = 0
    """First tokens of a text that stay visible when a full context slides (arXiv:2309.17453); 0: as many as
    model.attention_sinks of the run."""
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens, prompt included; 0: n-grams may repeat."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not written, each also with a space before it, as the tokenizer splits them."""
    regex: str = ""
    """Regular expression that a sample matches as a whole."""
    json_schema: str = ""
    """File with a JSON schema that a sample matches; it is written without line breaks and spaces."""
    num_beams: int = 1
    """Continuations that beam search keeps at each step; 1: no beam search."""
    length_penalty: float = 1.0
    """Beam search divides a sum of log-probabilities by the length to this power; above 0 favours long samples."""
    logprobs: int = 0
    """Show the log-probability of each chosen token and of this many most likely ones."""
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
