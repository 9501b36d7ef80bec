"""Trains a WordPiece vocabulary (arXiv:1609.08144, section 4.1) on a corpus, with the tokenizers library.

It works on bytes, like byte-level BPE, so every text can be encoded and decodes to the same bytes. BERT's vocabularies
are different: they convert text to lower case and drop white space.
"""

from collections.abc import Callable, Iterable

from gptjax.errors import UserError
from gptjax.text.train_bpe import byte_of_character, leading_part, make_byte_level

CONTINUES = "\u2581"
"""Prefix of tokens that continue a word; it is not the character of a byte."""
LONGEST_WORD = 10**6


def train_wordpiece(texts: Iterable[str], n_tokens: int, end_token: str, report: Callable[[str], object]) -> str:
    """Returns the tokenizer.json of a vocabulary of at most `n_tokens`, of which the last one is `end_token`.

    A small corpus can give fewer tokens; `report` then receives a line.

    Raises:
        UserError: The corpus is empty, or `n_tokens` is too small for every byte at the start and inside of a word.
    """
    from tokenizers import decoders, models
    from tokenizers.trainers import WordPieceTrainer

    characters = sorted(byte_of_character())
    alphabet = [*characters, *(CONTINUES + character for character in characters)]
    if n_tokens <= len(alphabet):
        raise UserError(
            f"tokenizer.vocab_size={n_tokens} must be above {len(alphabet)} for tokenizer.kind=wordpiece: every byte,"
            " at the start and inside of a word"
        )
    tokenizer = make_byte_level(models.WordPiece({}, unk_token="", continuing_subword_prefix=CONTINUES))
    trainer = WordPieceTrainer(
        vocab_size=n_tokens - 1,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=characters,
        continuing_subword_prefix=CONTINUES,
    )
    read = []
    tokenizer.train_from_iterator(leading_part(texts, report, read), trainer)
    if not sum(read):
        raise UserError("tokenizer.kind=wordpiece: the corpus has no text to learn from")
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    learned = [name for name, _ in by_rank if name not in alphabet][: n_tokens - 1 - len(alphabet)]
    names = [*alphabet, *learned, end_token]
    if len(names) < n_tokens:
        report(
            f"tokenizer: the corpus has only {len(names)} tokens to learn, fewer than tokenizer.vocab_size={n_tokens}"
        )
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer.model = models.WordPiece(
        vocabulary, unk_token=end_token, max_input_chars_per_word=LONGEST_WORD, continuing_subword_prefix=CONTINUES
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=False)
    return tokenizer.to_str()
