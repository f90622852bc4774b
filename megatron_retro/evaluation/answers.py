"""Exact match and F1 of short answers, after the normalization of SQuAD (Rajpurkar et al., arXiv 1606.05250)."""

import collections
import re
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation and the articles a, an, the; words one space apart."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, expected: list[str]) -> float:
    """1 if the answer is one of those expected, else 0."""
    return float(any(normalized(answer) == normalized(one) for one in expected))


def f1(answer: str, expected: list[str]) -> float:
    """The best harmonic mean of precision and recall of words, over those expected."""
    return max(_f1(normalized(answer).split(), normalized(one).split()) for one in expected)


def _f1(words: list[str], expected: list[str]) -> float:
    if not (words and expected):
        return float(words == expected)
    shared = sum((collections.Counter(words) & collections.Counter(expected)).values())
    return 2 * shared / (len(words) + len(expected))
