"""Find texts that share a run of words with an evaluation set."""

from collections.abc import Iterable, Iterator


def words_of(text: str) -> list[str]:
    """Return the words that are compared: lower-cased, split at white space."""
    return text.lower().split()


def word_ngrams(text: str, n: int) -> Iterator[str]:
    """Yield every run of `n` words of a text, joined by single spaces; none if it has fewer words."""
    words = words_of(text)
    for first in range(len(words) - n + 1):
        yield " ".join(words[first : first + n])


class NgramIndex:
    """The word n-grams of an evaluation set.

    The same rule serves pretraining data (13 words are usual) and small reasoning sets (8 words, arXiv 2501.19393).
    Evaluation texts of fewer than `n` words cannot be matched; `too_short` counts them.

    Args:
        texts: the evaluation set.
        n: words of an n-gram.
    """

    def __init__(self, texts: Iterable[str], n: int) -> None:
        if n < 1:
            raise ValueError(f"n is {n}; an n-gram has at least one word")
        self.n = n
        self.ngrams: set[str] = set()
        self.too_short = 0
        for text in texts:
            found = set(word_ngrams(text, n))
            self.too_short += not found
            self.ngrams |= found

    def overlap(self, text: str) -> str | None:
        """Return the first n-gram of `text` that the evaluation set contains too, or None."""
        return next((ngram for ngram in word_ngrams(text, self.n) if ngram in self.ngrams), None)
