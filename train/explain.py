"""What Hydra and OmegaConf say in ten lines, in one or two sentences that name the key and the way out."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from train.compose import (
    ALGORITHMS,
    DATA_SCHEMAS,
    ENTRIES,
    GROUPS,
    known_keys,
)
from train.config import suggestion

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def explain(error: BaseException, entry: str = "sft", words: Sequence[str] = ()) -> str:
    """One or two sentences for what Hydra and OmegaConf say in ten lines.

    Args:
        words: the command line's, as the user wrote them.
    """
    chain: list[BaseException] = []
    cursor: BaseException | None = error
    while cursor is not None and cursor not in chain:
        chain.append(cursor)
        cursor = cursor.__cause__ or cursor.__context__
    known = sorted(set(known_keys(ENTRIES[entry])))
    for link in chain:
        text = str(link)
        if "is not in struct" in text or "not in '" in text and "Key '" in text:
            key = getattr(link, "full_key", None) or _search(r"full_key: (\S+)", text) or ""
            if key in known:  # the schema of another choice of the same group has it
                owners = [kind for kind, variant in DATA_SCHEMAS.items() if key[5:] in variant.__dataclass_fields__]
                belongs = " and ".join(f"data={kind}" for kind in owners)
                rule = f"is not a setting of the chosen data; it belongs to {belongs}."
                recipe = next((word for word in words if word.startswith("experiment=")), None)
                if recipe is None or any(word.lstrip("+").startswith(f"{key}=") for word in words):
                    return f"{key} {rule}"
                return (
                    f"{recipe} sets {key}, which {rule} Leave {recipe} out, and say what else is wanted of it, and "
                    f"which model, on the command line: configs/experiment/{recipe.partition('=')[2]}.yaml."
                )
            return f"{key} is not a setting of {entry}{suggestion(key, known)}"
        if match := re.match(r"Error parsing override '([^'=]+)'\s*missing EQUAL", text):
            return f"{match[1]} is not a setting: settings are written as key=value."
        if match := re.match(r"LexerNoViableAltException: ([^=]+)=(.*)", text):
            key, value = match[1], match[2].splitlines()[0]
            return (
                f"{key}={value} cannot be read: a character in it has a meaning of its own. Put quotes inside the "
                f"shell's: '{key}=\"...\"', and write out what ~ stands for."
            )
        if match := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
            key = match[1]
            return f"{key} is not a group or a setting of {entry}{suggestion(key, [*known, *GROUPS])}"
        if match := re.search(r"Could not find '([^']+)'", text):
            group, _, name = match[1].rpartition("/")
            options = _search(r"Available options in '[^']*':\n(.*?)\nConfig search path", text, re.S)
            names = [name for name in options.split() if not name.endswith("_schema")] if options else []
            if group == "objective":
                names = [name for name in names if _fits(name, entry)]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {group}={near[0]}?" if near else ""
            listing = f" It can be {', '.join(names)}." if names else ""
            return f"there is no configs/{match[1]}.yaml{hint}{'' if hint else '.'}{listing}"
    override = _search(r"Error merging override (.+)", str(error))
    for link in reversed(chain):
        if isinstance(link, OmegaConfBaseException):
            rule = str(link).splitlines()[0].strip()
            # OmegaConf's templates leave these words in when Hydra's wrapper formats them a second time.
            rule = rule.replace("Value '$VALUE' of type '$VALUE_TYPE' ", "").replace("Invalid value '$VALUE', ", "")
            if override and "str is not a ListConfig" in rule:
                key, _, value = override.partition("=")
                return f"{override}: {key} is a list. Write {key}=[{value}]."
            return f"{override or getattr(link, 'full_key', None) or 'config'}: {rule.rstrip('.')}."
    return str(error).strip()


def _fits(objective: str, entry: str) -> bool:
    """Whether the file of an objective is one for this command; any is, where a command is for no objective."""
    text = (CONFIGS / "objective" / f"{objective}.yaml").read_text("utf-8")
    return entry not in ALGORITHMS or _search(r"^kind: (\w+)", text, re.M) == entry


def _search(pattern: str, text: str, flags: int = 0) -> str | None:
    match = re.search(pattern, text, flags)
    return match[1] if match else None
