"""Token ids -> text, as the ids come: what is returned is final, and nothing that must not be shown is.

    ids        ▁wei  <0xE2>  <0x82>  <0xAC>  S      TO     P
    returned   " wei"  ""      ""     "€"   ""      ""     ""       stop=("STOP",): the answer ends before it

Two things are held back: bytes of a character that is not complete, and text that may be the start of a stop text.
"""

import codecs
from collections.abc import Collection, Sequence

from ernie_model.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer.

    The pieces that `push` and `finish` return, put together, are `Tokenizer.decode` of all ids before the terminator,
    cut before the first stop text. First is the one that is complete first, whatever the tokens it came in; of two
    that end together, the longer one.

    Args:
        stop: texts that end the answer and are not part of it.
        terminators: ids that end the answer and write nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], terminators: Collection[int]):
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(dict.fromkeys(stop))
        self._starts = {text[:length] for text in self._stop for length in range(1, len(text))}
        self._longest_start = max(map(len, self._starts), default=0)
        self._terminators = frozenset(terminators)
        self._held = ""
        self._shown: list[str] = []
        self.stopped: str | int | None = None
        """The stop text or the terminator that ended the answer."""

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._shown)

    def push(self, token_id: int) -> str:
        """Take in the next id; return the text that is final now. After the end nothing more comes."""
        if self.stopped is not None:
            return ""
        if token_id in self._terminators:
            text = self.finish()
            if self.stopped is None:
                self.stopped = token_id
            return text
        written = self._bytes[token_id] if token_id < len(self._bytes) else None
        return self._show(self._decoder.decode(written or b""))

    def finish(self) -> str:
        """No more ids come: return what was held back."""
        if self.stopped is not None:
            return ""
        text = self._show(self._decoder.decode(b"", final=True))
        if self.stopped is None:
            self._shown.append(self._held)
            text += self._held
        self._held = ""
        return text

    def _show(self, new: str) -> str:
        if not new:
            return ""
        text = self._held + new
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            final, self._held = text[:at], ""
        else:
            lengths = range(min(len(text), self._longest_start), 0, -1)
            held = next((length for length in lengths if text[-length:] in self._starts), 0)
            final, self._held = text[: len(text) - held], text[len(text) - held :]
        self._shown.append(final)
        return final
