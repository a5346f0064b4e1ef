"""Recorded rollouts as one HTML page that needs nothing else: no network, no other files.

    header     what this is; the mean reward over the run; which rollout is shown; what colours tokens
    rollout    where its attempts and tokens went
    groups     left: the prompt, its pictures; right: attempts, best ones first, then the worst: reward by parts,
               advantage, what became of it, pictures with the boxes that were looked at, every token

The page's script (train/assets/rollouts.js) builds what is shown of JSON, by text nodes alone: what a model writes is
never HTML. The same rows go to the trackers as a table.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ernie_model.inference.grounding import Box, draw, parse_grounding
from train.evaluation.shown import BLUE
from train.page_parts import ASSETS, data_url, head, script_json, text
from train.reinforcement.zero_gradient import FATES, Asked, Taught, table
from train.tracking import Cell

LONGEST_CELL = 2000
"""Characters of a text in the trackers' tables."""
WORST = 2
FIRST, LAST = 1200, 400
"""Tokens of a longer attempt that the page shows."""

Lines = Sequence[Mapping[str, Any]]


def write_page(
    title: str,
    lines: Lines,
    learned: Lines,
    zero: Lines,
    rewards: Sequence[tuple[int, float]],
    *,
    folder: Path,
    attempts: int,
    recorded: int,
    band: Sequence[float],
) -> str:
    """The page's HTML.

    Args:
        lines, learned, zero: of rollouts.jsonl, learned.jsonl and zero_gradient.jsonl.
        rewards: (rollout, mean reward) over the whole run.
        attempts: of a group, at most.
        recorded: rollouts that there are, those that are not shown included.
        band: objective.band.
    """
    shown = sorted({line["rollout"] for line in lines})
    pictures = _Pictures(folder)
    later = {(one["group"], one["attempt"]): one for one in learned}
    by_rollout: dict[int, list[Mapping[str, Any]]] = {number: [] for number in shown}
    for line in lines:
        by_rollout[line["rollout"]].append(line)
    data = {
        "rollouts": [
            {
                "number": number,
                "step": by_rollout[number][0]["step"],
                "zero": _zero(number, zero),
                "groups": [_group(own, later, attempts, pictures) for own in _groups(by_rollout[number])],
            }
            for number in shown
        ],
        "rewards": [list(one) for one in rewards],
        "pictures": pictures.urls,
        "band": list(band),
        "fates": FATES,
    }
    about = f"{recorded} rollout{'s' * (recorded != 1)} recorded"
    about += f", {len(shown)} of them shown" if len(shown) < recorded else ""
    return "\n".join(
        [
            head(title, ["preview.css", "rollouts.css"]),
            f"<header><h1>{text(title)}</h1><p class=sub>{about}; of a group, the attempts with the highest reward and "
            f"the {WORST} with the lowest</p></header>",
            "<nav class=legend id=bar></nav><main id=main></main><div id=tip hidden></div>",
            "<noscript>This page needs JavaScript; rollouts.jsonl holds the same.</noscript>",
            f"<script>const DATA={script_json(data)};</script>",
            f"<script>{(ASSETS / 'rollouts.js').read_text('utf-8')}</script></body></html>",
        ]
    )


def evenly(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many, the first and the last among them."""
    if len(numbers) <= most:
        return list(numbers)
    if most == 1:
        return [numbers[-1]]
    return [numbers[round(place * (len(numbers) - 1) / (most - 1))] for place in range(most)]


class _Pictures:
    def __init__(self, folder: Path):
        self.folder = folder
        self.urls: dict[str, str] = {}

    def use(self, names: Iterable[str]) -> list[str]:
        """Those that there are still."""
        found = []
        for name in names:
            path = self.folder / name
            if name not in self.urls and path.exists():
                self.urls[name] = data_url(path.read_bytes(), "png" if path.suffix == ".png" else "jpeg")
            if name in self.urls:
                found.append(name)
        return found


def _groups(lines: Lines) -> Iterator[list[Mapping[str, Any]]]:
    """Those whose attempts differ come first."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(line)
    yield from sorted(groups.values(), key=lambda own: own[0]["kind"] != "mixed")


def best_and_worst(attempts: Lines, most: int) -> list[Mapping[str, Any]]:
    """By reward, those without one last; of more than `most`, the first ones and the WORST last ones."""
    ordered = sorted(attempts, key=lambda one: -1e9 if one["reward"] is None else one["reward"], reverse=True)
    return ordered if len(ordered) <= most else [*ordered[: most - WORST], *ordered[-WORST:]]


def _group(
    attempts: Lines, learned: Mapping[tuple[int, int], Mapping[str, Any]], most: int, pictures: _Pictures
) -> dict[str, Any]:
    first = attempts[0]
    distinct, same = _distinct(attempts)
    shown = best_and_worst(distinct, most)
    return {
        **{name: first[name] for name in ("group", "id", "domain", "kind", "question", "prompt", "expected")},
        "pictures": pictures.use(first["pictures"]),
        "right": _boxes(first["expected"]),
        "rewards": [one["reward"] for one in attempts],
        "left": len(distinct) - len(shown),
        "attempts": [
            _attempt(one, learned.get((one["group"], one["attempt"])), pictures) | {"same": same[number]}
            for number, one in ((one["attempt"], one) for one in shown)
        ],
    }


def _distinct(attempts: Lines) -> tuple[list[Mapping[str, Any]], Counter[int]]:
    """The first of those that wrote the same tokens to the same end, and how many others there are of each."""
    first: dict[str, Mapping[str, Any]] = {}
    same: Counter[int] = Counter()
    for one in attempts:
        what = str([one["key"] or one["attempt"], one["status"], one["fate"], one["reward"]])
        if what in first:
            same[first[what]["attempt"]] += 1
        else:
            first[what] = one
    return list(first.values()), same


def _attempt(line: Mapping[str, Any], learned: Mapping[str, Any] | None, pictures: _Pictures) -> dict[str, Any]:
    kept = "attempt fate version status error problem reward accuracy parts tokens".split()
    gaps = [] if learned is None else learned["gaps"]
    pieces, at = [], 0
    for piece in line["pieces"]:
        if "count" in piece:
            pieces.append(piece)
            at += piece["count"]
            continue
        stop = at + len(piece["texts"])
        own = gaps[at:stop] if "logprobs" in piece else []
        pieces.append({**piece, "gaps": own} if any(gap is not None for gap in own) else piece)
        at = stop
    pieces = shortened(pieces)
    return {
        **{name: line[name] for name in kept},
        "advantage": line["advantage"] if learned is None else learned["advantage"],
        "learned": None if learned is None else learned["step"],
        "said": _boxes(line["answer"]) if _boxes(line["expected"]) else [],
        "calls": [{**call, "pictures": pictures.use(call["pictures"])} for call in line["calls"]],
        "pieces": pieces,
    }


def shortened(pieces: Sequence[Mapping[str, Any]], first: int = FIRST, last: int = LAST) -> list[Mapping[str, Any]]:
    """The first and the last tokens of an attempt that has more, between them how many are left out; pictures stay."""
    tokens = sum(len(piece.get("ids", ())) for piece in pieces)
    if tokens <= first + last:
        return list(pieces)
    out: list[Mapping[str, Any]] = []
    at = 0
    for piece in pieces:
        start, at = at, at + len(piece.get("ids", ()))
        if "count" in piece:
            out.append(piece)
        if start < first:
            out += _part(piece, 0, first - start)
        if start <= first < at:
            out.append({"kind": "cut", "left_out": tokens - first - last})
        out += _part(piece, max(0, tokens - last - start), at - start)
    return out


def _part(piece: Mapping[str, Any], start: int, stop: int) -> list[Mapping[str, Any]]:
    """Its tokens from `start` to `stop`; none, no piece."""
    if not piece.get("ids", ())[start:stop]:
        return []
    return [{key: value[start:stop] if isinstance(value, list) else value for key, value in piece.items()}]


def _boxes(answer: str) -> list[list[float]]:
    return [list(box.xyxy) for box in parse_grounding(answer, most=50).boxes]


def _zero(rollout: int, zero: Lines) -> dict[str, Any] | None:
    """Of the last update that is known of the rollout."""
    own = [one for one in zero if one["attempts"] is not None and one["attempts"]["rollout"] == rollout]
    if not own:
        return None
    asked, taught = own[-1]["attempts"], own[-1]["tokens"]
    lines = table(Asked(**asked), None if taught is None else Taught(**taught))
    return {"step": own[-1]["step"], "lines": [list(line) for line in lines]}


# ------------------------------------------------------------------------------------------------------------ trackers

COLUMNS = (
    *("prompt pictures", "tool pictures", "question", "right answer", "reward", "advantage", "accuracy", "parts"),
    *("ended", "became", "text", "calls", "tokens", "id", "group", "attempt"),
)


def table_of(lines: Lines, attempts: int, folder: Path) -> tuple[Sequence[str], list[list[Cell]]]:
    """Columns and rows for `Tracker.log_table`; where a tool looked at is drawn on a copy of the prompt's picture."""
    rows: list[list[Cell]] = []
    for group in _groups(lines):
        for one in best_and_worst(_distinct(group)[0], attempts):
            calls = "\n".join(
                f"{call['name'] or 'unreadable'}({call['arguments']}){' failed' if call['failed'] else ''}"
                for call in one["calls"]
            )
            parts = ", ".join(
                f"{name} {'none' if value is None else f'{value:g}'}" for name, value in one["parts"].items()
            )
            crops = [folder / name for call in one["calls"] for name in call["pictures"]]
            words = (one["question"], one["expected"])
            rows.append(
                [
                    _with_boxes(one, folder),
                    crops or None,
                    *(_cut(word) for word in words),
                    one["reward"],
                    one["advantage"],
                    one["accuracy"],
                    parts,
                    one["status"],
                    FATES[one["fate"]],
                    _cut(one["text"]),
                    _cut(calls),
                    one["tokens"],
                    one["id"],
                    one["group"],
                    one["attempt"],
                ]
            )
    return COLUMNS, rows


def _cut(word: str) -> str:
    return word if len(word) <= LONGEST_CELL else f"{word[:LONGEST_CELL]} ..."


def _with_boxes(line: Mapping[str, Any], folder: Path) -> list[Path] | None:
    paths = [folder / name for name in line["pictures"]]
    boxes = [(call["on"], Box(*box)) for call in line["calls"] for box in call["boxes"]]
    for number in {on for on, _ in boxes if on is not None and on < len(paths)}:
        own = [box for on, box in boxes if on == number]
        with Image.open(paths[number]) as picture:
            drawn = draw(picture, own, color=BLUE)
        path = folder / "rollouts" / f"{line['group']}-{line['attempt']}-{number}.png"
        drawn.save(path)
        paths[number] = path
    return paths or None
