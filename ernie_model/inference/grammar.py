r"""Answers that are JSON of a schema, or match a pattern: which tokens may come next.

    JSON schema ─► regular expression ─► automaton over bytes ─► for the state the answer is in: the tokens whose bytes
                                                                 it takes, and the terminators where it may end

The automaton is outlines-core's (`automaton`), the translation of schemas our own (`json_regex`, which lists what it
cannot express). Special tokens never come inside: `<think>` or a location are not text that a pattern speaks of.

The tokens of a state are found when an answer first gets there, for all of the vocabulary at once (a few ms for 100,000
tokens), and kept, by request after request. A pattern is prepared once (50 ms and more, in another process):
`compile_constraint` can be called beforehand, from any thread.

What is guaranteed, and what not: an answer that ends by a terminator satisfies its constraint; one that is cut off, by
`max_new_tokens` or a stop text, is only the beginning of one that does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from ernie_model.inference.automaton import PatternError, fenced, transitions
from ernie_model.inference.json_regex import json_regex
from ernie_model.inference.request import Constraint, ConstraintError, JsonSchema, SamplingParams

if TYPE_CHECKING:
    from ernie_model.inference.sampling import Vocabulary

KEPT_PATTERNS = 32
_KEPT_STATES = 512
"""For each pattern; a set of tokens takes a bit for each of the vocabulary, 13 kB for 103,424."""
_DEAD, _START, _ENDED = 0, 1, -1


class TokenBytes:
    """The tokens that may be written under a constraint, the longest first, and their bytes as one matrix."""

    def __init__(self, vocabulary: "Vocabulary"):
        special = vocabulary.tokenizer.special_ids | vocabulary.terminators | set(vocabulary.banned_ids)
        written = vocabulary.tokenizer.token_bytes
        texts = [(i, text) for i, text in enumerate(written[: vocabulary.size]) if text and i not in special]
        texts.sort(key=lambda pair: -len(pair[1]))
        self.id_N = np.array([i for i, _ in texts], np.int64)
        longest = len(texts[0][1]) if texts else 0
        length_N = np.array([len(text) for _, text in texts], np.int64)
        self.num_longer_B = [int((length_N > length).sum()) for length in range(1, longest + 1)]
        """How many have more than 1, 2, ... bytes: those stand first."""
        joined = b"".join(text.ljust(longest, b"\0") for _, text in texts)
        self.byte_BN = np.ascontiguousarray(np.frombuffer(joined, np.uint8).reshape(len(texts), longest).T)


class Compiled:
    """A constraint for one vocabulary; shared by the requests that have it.

    Raises:
        PatternError: the pattern has no automaton.
    """

    def __init__(self, pattern: str, vocabulary: "Vocabulary"):
        table, final = transitions(pattern)
        self._next_flat = np.frombuffer(table, np.uint16)  # [state x 256 + byte]
        self._final = frozenset(final)
        self._vocabulary = vocabulary
        self._forbidden: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def after(self, state: int, text: bytes) -> int:
        """The state behind these bytes; 0 if they do not fit."""
        for byte in text:
            state = int(self._next_flat[state << 8 | byte])
        return state

    def forbidden(self, state: int) -> np.ndarray:
        """bool (V,): the tokens that must not come next."""
        V = self._vocabulary.size
        with self._lock:
            packed = self._forbidden.get(state)
            if packed is not None:
                self._forbidden.move_to_end(state)
        if packed is None:
            forbidden_V = np.ones(V, bool)
            forbidden_V[self._allowed(state)] = False
            packed = np.packbits(forbidden_V)
            with self._lock:
                self._forbidden[state] = packed
                if len(self._forbidden) > _KEPT_STATES:
                    self._forbidden.popitem(last=False)
        return np.unpackbits(packed, count=V).view(bool)

    def _allowed(self, state: int) -> np.ndarray:
        ends = list(self._vocabulary.terminators) if state == _ENDED or state in self._final else []
        if state == _ENDED:
            return np.array(ends, np.int64)
        tokens = self._vocabulary.token_bytes
        # All tokens go through the automaton together, byte by byte; those it stops at drop out, and those that are
        # whole, the shortest of the rest, have arrived.
        alive_A = np.arange(len(tokens.id_N))
        state_A = np.full(len(alive_A), state, np.uint16)
        arrived = [np.array(ends, np.int64)]
        for byte_N, num_longer in zip(tokens.byte_BN, tokens.num_longer_B, strict=True):
            state_A = self._next_flat.take((state_A.astype(np.int64) << 8) | byte_N.take(alive_A))
            fits_A = np.flatnonzero(state_A)
            if len(fits_A) < len(alive_A):
                alive_A, state_A = alive_A.take(fits_A), state_A.take(fits_A)
            num_left = int(np.searchsorted(alive_A, num_longer))
            arrived.append(tokens.id_N.take(alive_A[num_left:]))
            alive_A, state_A = alive_A[:num_left], state_A[:num_left]
            if not num_left:
                break
        return np.concatenate(arrived)


class Guide:
    """Where one answer stands.

    Args:
        prompt_ids: an answer that starts where the prompt has already written `constrain_after` (spaces and newlines
            apart: `</think>` of a prompt that skips the reasoning) is constrained from its first token.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocabulary: "Vocabulary"):
        self._compiled = compile_constraint(params, vocabulary)
        self._vocabulary = vocabulary
        self._after = (params.constrain_after or "").encode()
        self._tail = b""
        self._state: int | None = _START
        if self._after:
            ending = vocabulary.tokenizer.decode(list(prompt_ids[-32 - len(self._after) :])).rstrip()
            if not ending.endswith(self._after.decode().rstrip()):
                self._state = None  # nothing is forbidden yet

    def forbidden(self) -> np.ndarray | None:
        """bool (V,): the tokens that must not come next; None if all may."""
        return None if self._state is None else self._compiled.forbidden(self._state)

    def accept(self, token_id: int) -> None:
        written = self._vocabulary.written(token_id)
        if self._state is None:
            self._wait(written)
        elif token_id in self._vocabulary.terminators:
            self._state = _ENDED
        elif self._state != _ENDED:
            self._state = self._compiled.after(self._state, written)

    def _wait(self, written: bytes) -> None:
        """For `constrain_after`. What its last token writes behind it is the answer's beginning if it fits; otherwise
        the answer begins with the next token."""
        text = self._tail + written
        found = text.find(self._after)
        if found < 0:
            self._tail = text[-len(self._after) :]
            return
        behind = self._compiled.after(_START, text[found + len(self._after) :])
        self._state = behind if behind != _DEAD else _START


def compile_constraint(params: SamplingParams, vocabulary: "Vocabulary") -> Compiled:
    """Prepare `params.constraint`; a second call with an equal one finds it ready. From any thread.

    Raises:
        ConstraintError: no schema or pattern, or one that cannot be expressed; it names the part.
    """
    constraint = params.constraint
    assert constraint is not None
    pattern = _pattern(constraint, may_wait=params.constrain_after is not None)
    try:
        return vocabulary.compiled(pattern)
    except PatternError as error:
        what = "regex" if not isinstance(constraint, JsonSchema) else "The JSON schema"
        shown = f" {constraint.pattern!r}" if not isinstance(constraint, JsonSchema) else ""
        raise ConstraintError(f"{what}{shown} cannot be used: {error}. Use a simpler one, or smaller bounds.") from None


def _pattern(constraint: Constraint, may_wait: bool) -> str:
    if isinstance(constraint, JsonSchema):
        # what the family writes between </think> and the answer; JSON may begin with it
        return (r"\n{0,2}" if may_wait else "") + json_regex(constraint.schema)
    try:
        return fenced(constraint.pattern)
    except PatternError as error:
        raise ConstraintError(f"regex {constraint.pattern!r}: {error}.") from None
