"""Filters of what goes in and of what comes out: plain functions, and none unless they are given.

    filter(text) -> None, or why the text must not pass

    written     "... how to pick a lo" ──► "... how to pick" leaves; " a lo" is held: it may become "a lockpick"
                "ck"                   ──► "a lo" leaves when it can't any more
                "pick"                 ──► nothing of "a lockpick" ever left

While an answer is written, `Guard` lets out only what no further text can make part of a finding. A filter says how
much that is by a second function, `settled(text) -> characters`; without it, everything waits for the end of the turn.

A filter that raises has found something: what could not be looked at does not pass.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Filter = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Moderation:
    input: tuple[Filter, ...] = ()
    """Look at every text of the conversation that the assistant did not write, before anything is computed."""
    output: tuple[Filter, ...] = ()
    """Look at reasoning, answers and arguments of tool calls, each for itself."""


class Blocked(Exception):
    """A filter's finding; the message says what it is."""


def check(filters: Iterable[Filter], text: str) -> None:
    """Raises Blocked."""
    for look in filters:
        try:
            finding = look(text)
        except Exception as error:
            finding = f"{type(look).__name__} failed: {type(error).__name__}: {error}"
        if finding is not None:
            raise Blocked(finding)


class Guard:
    """One text while it is written: in come pieces, out come those that may be shown."""

    def __init__(self, filters: Sequence[Filter]):
        self._filters = filters
        self._early = [look for look in filters if hasattr(look, "settled")]
        self._held = ""

    def push(self, text: str) -> str:
        """What may leave now. Raises Blocked."""
        self._held += text
        check(self._early, self._held)
        if len(self._early) < len(self._filters):
            return ""
        return self._leave(min((look.settled(self._held) for look in self._early), default=len(self._held)))

    def finish(self) -> str:
        """The rest. Raises Blocked."""
        check(self._filters, self._held)
        return self._leave(len(self._held))

    def _leave(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out


class ListFilter:
    """An example: texts that hold one of some phrases.

    Compared without regard to case, accents, width, runs of white space, and characters that are not seen; also inside
    of words.

    Raises:
        ValueError: a phrase of nothing that can be seen.
    """

    def __init__(self, phrases: Iterable[str]):
        self._phrases = {_plain(phrase).strip(): phrase for phrase in phrases}
        if "" in self._phrases:
            raise ValueError(f"the phrase {self._phrases['']!r} holds nothing that can be seen.")
        self._window = max(map(len, self._phrases), default=1) - 1  # all but the last character of a phrase

    def __call__(self, text: str) -> str | None:
        plain = _plain(text)
        return next((f"the phrase {written!r}" for phrase, written in self._phrases.items() if phrase in plain), None)

    def settled(self, text: str) -> int:
        """How many characters from the beginning no further text can make part of a finding."""
        if not self._window:
            return len(text)
        origin = [index for index, _ in _characters(text)]
        return origin[-self._window] if len(origin) >= self._window else 0


def _plain(text: str) -> str:
    return "".join(character for _, character in _characters(text))


def _characters(text: str) -> Iterator[tuple[int, str]]:
    """What is compared, character by character, and which character of `text` each comes from."""
    after_space = False
    for index, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).casefold():
            if unicodedata.category(part) in ("Mn", "Cf"):
                continue
            if part.isspace():
                if not after_space:
                    yield index, " "
                after_space = True
            else:
                yield index, part
                after_space = False
