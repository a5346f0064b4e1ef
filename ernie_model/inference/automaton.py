"""A regular expression -> a table of transitions over bytes, made by outlines-core in a process of its own.

Some short patterns need an automaton that fills any memory (`(a|b)*a(a|b){40}`), and outlines-core knows no limit. The
process has one for time, memory and states, and whoever sent such a pattern gets an error, not the server's end.

The vocabulary that outlines-core is shown is the 256 bytes. What it would do for 100,000 tokens and every state
(seconds, and gigabytes for a text of up to 1000 characters), `grammar.Compiled` does for the states that are visited.

outlines-core builds the automaton for matches that start anywhere, which needs exponentially many states even for
`"[^"]{0,20}"`. So each pattern begins with a character that cannot occur in the rest (`FENCE`): a match then starts
nowhere else, and the automaton stays as small as the anchored one. It is crossed here and never seen again.
"""

import re
import subprocess
import sys
from array import array
from itertools import chain

FENCE = "\U0010ffff"
"""Not a character, by the Unicode standard."""
MAX_STATES = 20_000
_MAX_SECONDS = 10
_MAX_BYTES = 3 << 30


class PatternError(ValueError):
    """A pattern without an automaton: wrong, too large, or nothing matches it."""


def transitions(pattern: str) -> tuple[bytes, tuple[int, ...]]:
    """The automaton of all of a text matching `pattern` (Rust's syntax; nothing in it may match `FENCE`).

    Returns:
        uint16 table [state, byte] -> state, in which state 0 is the dead end and state 1 the start; and the states in
        which the text may end. From every state but 0 such a state can be reached.

    Raises:
        PatternError
    """
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(
            command, input=f"{FENCE}(?:{pattern})".encode(), capture_output=True, timeout=3 * _MAX_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise PatternError("it needs too much time to prepare") from None
    if done.returncode == 1:
        raise PatternError(done.stderr.decode().strip())
    if done.returncode:
        raise PatternError(f"it needs more than {_MAX_SECONDS} s or {_MAX_BYTES >> 30} GiB to prepare")
    table = array("H", done.stdout)
    num_final = table[0]
    return table[1 + num_final :].tobytes(), tuple(table[1 : 1 + num_final])


def fenced(pattern: str, *, in_string: bool = False) -> str:
    """Somebody's pattern for a whole text, so that nothing in it matches `FENCE`; `^` and `$` at its ends are dropped.

    Args:
        in_string: the text is the inside of a JSON string. Quotes, backslashes and newlines that the pattern spells out
            are written with a backslash; classes match none of them.

    Raises:
        PatternError: what an automaton has no states for: look-around, back references, positions inside.
    """
    hidden = r"\x{10FFFF}" + (r'"\\\x00-\x1F\x7F-\x9F' if in_string else "")
    out, at, end = [], 0, len(pattern)
    at += 1 if pattern.startswith("^") else 2 if pattern.startswith(r"\A") else 0
    if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern[at:]):
        end -= 1
    open_groups = 0
    while at < end:
        atom = _ATOM.match(pattern, at, end)
        if atom is None:
            raise PatternError(f"{pattern[at : at + 8]!r} at character {at}: a bracket or an escape is not complete")
        text, kind = atom[0], atom.lastgroup
        if kind == "refused" or FENCE in text:
            raise PatternError(f"{text!r} at character {at}: {_why(text)}")
        # One bracket too many would end the group that the whole pattern is put into.
        open_groups += (text[0] == "(" and text != "(?i)") - (text == ")")
        if open_groups < 0:
            raise PatternError(f"')' at character {at}: no bracket is open")
        if kind == "class":
            out.append(f"[{text}&&[^{hidden}]]")
        elif kind == "any":
            out.append(rf"[^\n{hidden}]")
        elif in_string and text in _IN_STRING:
            out.append(_IN_STRING[text])
        elif in_string and ord(text[0]) < 32:
            raise PatternError(f"{text!r} at character {at}: a JSON string has no control characters")
        else:
            out.append(text)
        at = atom.end()
    return "".join(out)


_ATOM = re.compile(
    r"""(?xs)
    (?P<refused> \\[1-9bBAzZGkK<>] | \(\?(?!:|P?<[A-Za-z_]|i\)|i:) .{0,2} | [\^$] )
  | (?P<class> \[\^?\]?(?:\\.|\[(?:\\.|[^\[\]\\])*\]|[^\[\]\\])*\] | \\[pP]\{[^}]*\} | \\[dDwWsSpP]
             | \\[xuU]\{[^}]*\} | \\x.. | \\u.... | \\U........ )
  | (?P<any> \. )
  | (?P<escape> \\. )
  | (?P<other> \(\?(?:P?<\w+>|:|i\)|i:) | [^\\\[] )
    """
)
_IN_STRING = {'"': r"\\\"", '\\"': r"\\\"", r"\\": r"\\\\"}
for _letter, _character in zip("nrtf", "\n\r\t\f", strict=True):
    _IN_STRING |= dict.fromkeys((rf"\{_letter}", _character), rf"\\{_letter}")


def _why(text: str) -> str:
    if text.startswith("(?"):
        return "look-around, conditions and flags other than (?i) are not supported"
    if text[-1:].isdigit() or text in (r"\k", r"\K"):
        return "back references are not supported"
    if FENCE in text:
        return "this is not a character"
    return "positions are not supported except ^ at the start and $ at the end"


def _main() -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_SECONDS, _MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    from outlines_core import Index, Vocabulary

    end = 256
    try:
        index = Index(sys.stdin.buffer.read().decode(), Vocabulary(end, {bytes([byte]): [byte] for byte in range(end)}))
    except ValueError as error:
        nothing = "no transitions" in str(error)  # its own words quote the fence
        print("no text matches it" if nothing else f"it is not understood ({error})", file=sys.stderr)
        return 1
    after = {state: {b: to for b, to in row.items() if b != end} for state, row in index.get_transitions().items()}
    state = index.get_initial_state()
    for byte in FENCE.encode():
        state = after.get(state, {}).get(byte)
    alive = _leading_to(index.get_final_states(), after)
    if state not in alive:
        print("no text matches it", file=sys.stderr)
        return 1
    number = {state: 1}  # in the order in which they are reached
    waiting = [state]
    while waiting:
        for to in after.get(waiting.pop(), {}).values():
            if to in alive and to not in number:
                number[to] = len(number) + 1
                waiting.append(to)
    if len(number) > MAX_STATES:
        print(f"its automaton has {len(number)} states; at most {MAX_STATES} are allowed", file=sys.stderr)
        return 1
    final = [number[state] for state in index.get_final_states() if state in number]
    table = array("H", chain([len(final)], final))
    table.extend([0] * 256)
    for state in number:
        row = [0] * 256
        for byte, to in after.get(state, {}).items():
            row[byte] = number.get(to, 0)
        table.extend(row)
    sys.stdout.buffer.write(table.tobytes())
    return 0


def _leading_to(final: set[int], after: dict[int, dict[int, int]]) -> set[int]:
    before: dict[int, set[int]] = {}
    for state, row in after.items():
        for to in set(row.values()):
            before.setdefault(to, set()).add(state)
    alive, waiting = set(final), list(final)
    while waiting:
        new = before.get(waiting.pop(), set()) - alive
        alive |= new
        waiting += new
    return alive


if __name__ == "__main__":
    sys.exit(_main())
