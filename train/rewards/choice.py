"""Answers that are one of several options.

multiple_choice     right answer "B", options ["a cat", "a dog", "a fox"]

B    (b)    B.    B) a dog    Answer: B    \\boxed{B}    a dog    It is a dog.      1
A or B    a cat or a dog    not B, A                                               0: it has not chosen
"""

import re
from collections.abc import Sequence

from train.rewards.base import Attempt
from train.rewards.text import boxed, normalised

LONGEST = 2000
"""Characters of an answer that are looked at, from its end."""

# A letter that stands for an option; "A dog" and "I think" begin with words.
_LETTER = r"(?:[B-HJ-Z]|A(?!\s+(?!(?:or|and|is|not|but|because|since|as)\b)[a-z])|I(?![' ’]))(?![\w'’])"
_STANDING = re.compile(rf"(?<![\w'’])({_LETTER})")
_SAID = re.compile(rf"(?i:answer|choice)\s*(?i:is|:)[\s(\[*]*({_LETTER})(?!\W*(?:or|and|/|,)\W*{_LETTER})")
_COMMITTED = re.compile(r"(?:answer|choice)\s*(?:is|:)", re.IGNORECASE)
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LEADING = re.compile(r"\W*([A-Za-z])\s*[).:](?=\s|$)")


def multiple_choice(attempt: Attempt, expected: str, *, options: Sequence[str] = ()) -> float | None:
    """1 if the answer's letter is the right one, or its text names the right option and no other; else 0.

    Args:
        expected: a letter; or with `options` the text of one.
        options: the texts of A, B, C, ...
    """
    right = _letter(expected, options)
    if right is None:
        return None
    return float(_letter(attempt.answer, options) == right)


def _letter(text: str, options: Sequence[str]) -> str | None:
    """The option that a text chooses; None when it chooses none, or several."""
    text = boxed(text[-LONGEST:]).strip()
    texts = [normalised(str(option)) for option in options]
    if said := _SAID.findall(text):
        return _within(said[-1], options)
    for part in dict.fromkeys((_COMMITTED.split(text)[-1].strip(), text)):
        plain = normalised(part)
        if texts.count(plain) == 1:
            return chr(ord("A") + texts.index(plain))
        if match := _ALONE.fullmatch(part):
            return _within(match[1], options)
        leading = _LEADING.match(part)
        letters = set(_STANDING.findall(part)) | ({leading[1].upper()} if leading else set())
        if len(letters) == 1:
            return _within(letters.pop(), options)
        if not letters and (named := _named(plain, texts)):
            return chr(ord("A") + named.pop()) if len(named) == 1 else None
    return None


def _named(plain: str, texts: Sequence[str]) -> set[int]:
    """The options whose text occurs as whole words, unless inside a longer option that occurs."""
    found = {i for i, text in enumerate(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)}
    return {i for i in found if not any(j != i and texts[i] in texts[j] and texts[i] != texts[j] for j in found)}


def _within(letter: str, options: Sequence[str]) -> str | None:
    letter = letter.upper()
    return letter if not options or ord(letter) - ord("A") < len(options) else None
