"""Answers that are texts.

    exact           1 if equal after `normalised`, else 0
    edit_distance   1 - d / longer length, d the Levenshtein distance
    anls            the same, and 0 below one half: a text that is more wrong than right earns nothing (A. F. Biten et
                    al., "Scene Text Visual Question Answering", 2019; at exactly one half we keep it, as most do)

    "Kitten" for "sitting"    d = 3    edit_distance 4/7 = 0.571    anls 0.571    exact 0

`also` are other right answers; the best one counts.
"""

import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from train.rewards.base import Attempt

QUOTES = "\"'`“”‘’«»"


def normalised(text: str) -> str:
    """What `exact` compares: Unicode NFKC, no case, single spaces, without one pair of quotes around it and without
    full stops at the end.

    "  The  Cat. " and "the cat" are the same; "the cat" and "cat" are not, nor "1,000" and "1000" (use `number`).
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(text.split()).rstrip(".。 ")
    if len(text) >= 2 and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1].strip().rstrip(".。 ")
    return text


def boxed(text: str) -> str:
    """What stands in the last \\boxed{...} of a text, or the text itself where there is none."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for at, letter in enumerate(rest) if found else ():
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:at]
    return rest if found else text


def exact(attempt: Attempt, expected: str, *, also: Sequence[str] = ()) -> float | None:
    answer = normalised(attempt.answer)
    return float(any(answer == normalised(one) for one in (expected, *also)))


def similarity(answer: str, expected: str) -> float:
    """1 - d / max(length), of the normalised texts; two empty ones are equal."""
    return Levenshtein.normalized_similarity(normalised(answer), normalised(expected))


def edit_distance(attempt: Attempt, expected: str, *, also: Sequence[str] = ()) -> float | None:
    return max(similarity(attempt.answer, one) for one in (expected, *also))


def anls(attempt: Attempt, expected: str, *, threshold: float = 0.5, also: Sequence[str] = ()) -> float | None:
    best = max(similarity(attempt.answer, one) for one in (expected, *also))
    return best if best >= threshold else 0.0
