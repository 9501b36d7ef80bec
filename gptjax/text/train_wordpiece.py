"""Learns a WordPiece vocabulary (arXiv:1609.08144, section 4.1) from a corpus, with the tokenizers library.

Words are of bytes, as in byte-level BPE, so every text can be encoded and decodes to the same bytes. BERT's own
vocabularies are not of this kind: they lower text and drop white space.
"""

from collections.abc import Callable, Iterable

from gptjax.errors import UserError
from gptjax.text.train_bpe import byte_of_character, leading_part, make_byte_level

CONTINUES = "\u2581"
"""Begins the name of a token that continues a word; no byte has this name."""
LONGEST_WORD = 10**6


def train_wordpiece(texts: Iterable[str], n_tokens: int, end_token: str, report: Callable[[str], object]) -> str:
    """Returns the tokenizer.json of a vocabulary of at most `n_tokens`, `end_token` included, which is the last one.

    A small corpus can have fewer, which `report` is told.

    Raises:
        UserError: The corpus is empty, or `n_tokens` has no room for every byte at the start and inside of a word.
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
