"""Options of sample."""

import dataclasses

from gptjax.config.rules import different_files, no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.decoding import DecodingConfig, no_empty_text
from gptjax.errors import UserError

MOST_ROWS = 2**16
"""Largest number of samples in one call."""
OF_STREAMS = ("attention_sinks", "draft_run_dir", "draft_ngram", "regex", "json_schema")
"""Options that neither beam search nor contrastive search supports."""


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
    beam_groups: int = 1
    """Number of groups of beams: each group prefers tokens that earlier groups did not choose (diverse beam search,
    arXiv:1610.02424)."""
    diversity_penalty: float = 0.5
    """Penalty of a token in a group of beams, for each beam of earlier groups that chose it in the same step."""
    contrastive_alpha: float = 0.0
    """Contrastive search (arXiv:2202.06417) among the top_k most likely tokens: weight of the penalty for a hidden
    state similar to an earlier one; 0: off."""
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
        for name in ("length_penalty", "beam_groups"):
            no_effect("", self, name, self.num_beams > 1, "num_beams above 1")
        positive("", self, "beam_groups", "diversity_penalty")
        no_effect("", self, "diversity_penalty", self.beam_groups > 1, "beam_groups above 1")
        if self.num_beams % self.beam_groups:
            raise UserError(f"num_beams={self.num_beams} must be a multiple of beam_groups={self.beam_groups}")
        if self.num_beams > 1:
            if self.temperature > 0:
                raise UserError(f"num_beams={self.num_beams} needs temperature=0: beam search draws nothing")
            if self.num_samples > self.num_beams:
                raise UserError(f"num_samples={self.num_samples} must be at most num_beams={self.num_beams}")
            for name in ("stop", "logprobs", "contrastive_alpha", *OF_STREAMS):
                no_effect("", self, name, False, "num_beams=1")
        self._check_contrastive()
        no_effect("", self, "attention_sinks", not self.speculates, "a context that slides: with a draft it does not")
        if self.regex and self.json_schema:
            raise UserError("regex and json_schema are both set; give one")
        if self.regex or self.json_schema:
            unfit = ("ignore_end_of_text", "min_new_tokens", "no_repeat_ngram", "bad_words")
            for name in (*unfit, "draft_run_dir", "draft_ngram"):
                no_effect("", self, name, False, "free text: regex and json_schema decide which tokens may follow")

    def _check_contrastive(self) -> None:
        if not 0 <= self.contrastive_alpha <= 1:
            raise UserError(f"contrastive_alpha={self.contrastive_alpha} must lie in [0, 1]")
        if not self.contrastive_alpha:
            return
        if self.temperature > 0:
            raise UserError(
                f"contrastive_alpha={self.contrastive_alpha} needs temperature=0: contrastive search draws nothing"
            )
        if self.top_k < 2:
            raise UserError(
                f"contrastive_alpha={self.contrastive_alpha} needs top_k of at least 2, its number of candidates"
            )
        for name in ("num_samples", *OF_STREAMS):
            no_effect("", self, name, False, "contrastive_alpha=0")

    @property
    def uses_top_k(self) -> bool:
        """Whether `top_k` has an effect."""
        return self.temperature > 0 or self.contrastive_alpha > 0
