"""A JSON schema -> a regular expression for texts that it allows.

Every text that matches is valid; not every valid text matches. Chosen, so that answers are short and end, and automata
stay small:

    - one line, with at most one space after `:` and `,`
    - the properties of an object in the order of the schema, and none that it does not name
    - numbers of at most 16 digits before and after the point, and two in the exponent
    - strings without \\u escapes; a `pattern` matches the whole string, which then holds no quotes or backslashes
    - what nests without bound (`{}`, or a `$ref` to itself) is written out three levels deep

A keyword that would constrain the answer and cannot be honoured raises; none is skipped silently. Not expressible:
`not`, `if`, `allOf` of several, `oneOf` whose branches may overlap, `patternProperties`, `propertyNames`,
`uniqueItems`, `contains`, `multipleOf`, `dependent...`, `unevaluated...`, bounds of a `number` that are not whole,
references outside the schema. (outlines-core's own translation passes over several of these, bounds of numbers among
them.)
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

from ernie_model.inference.automaton import FENCE, PatternError, fenced
from ernie_model.inference.request import ConstraintError

MAX_DEPTH = 3
"""Of what nests without bound."""
MAX_LENGTH = 200_000
"""Characters of the regular expression."""
_PART = 40
"""Characters that a part of the schema counts for at least: one that comes to nothing takes time, too."""
DIGITS = 16

_SPACE = "[ ]?"
STRING_CHARACTER = r'(?:[^"\\\x00-\x1F\x7F-\x9F\x{10FFFF}]|\\["\\/bfnrt])'
_STRING = f'"{STRING_CHARACTER}*"'
_INTEGER = f"-?(?:0|[1-9][0-9]{{0,{DIGITS - 1}}})"
_FRACTION = rf"\.[0-9]{{1,{DIGITS}}}"
_NUMBER = rf"{_INTEGER}(?:{_FRACTION})?(?:[eE][+-]?[0-9]{{1,2}})?"
_SCALARS = {"boolean": "(?:true|false)", "null": "null", "integer": _INTEGER, "number": _NUMBER, "string": _STRING}

_DATE = (
    r"[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-z0-9]{1,20}(?:-[a-z0-9]{1,20})?"
_FORMATS = {  # as far as they are commonly used: ASCII, lower case, http
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){7}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "email": rf"[A-Za-z0-9_]{{1,20}}(?:[.+-][A-Za-z0-9_]{{1,20}}){{0,3}}@{_LABEL}(?:\.{_LABEL}){{1,3}}",
    "uri": rf"https?://{_LABEL}(?:\.{_LABEL}){{0,3}}(?::[1-9][0-9]{{0,3}})?(?:/[A-Za-z0-9._~-]{{0,40}}){{0,8}}",
}

_ANNOTATIONS = {
    *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly"),
}
_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
}


def json_regex(schema: Mapping[str, Any] | str | bool) -> str:
    """A regular expression in Rust's syntax, for `automaton.transitions`.

    Raises:
        ConstraintError: no schema, one that no answer can satisfy, or a part that cannot be expressed.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ConstraintError(f"The JSON schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise ConstraintError(f"The JSON schema is {schema!r}; it must be an object.")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        regex = _Writer(schema).write(schema, "#", {})
    except jsonschema.SchemaError as error:
        where = "/".join(map(str, error.absolute_path))
        raise ConstraintError(f"The JSON schema is not valid at #/{where}: {error.message}") from None
    except RecursionError:
        raise ConstraintError("The JSON schema is nested too deeply. Use fewer levels.") from None
    if regex is None:
        raise ConstraintError(
            f"No JSON text satisfies the schema (with numbers of at most {DIGITS} digits; within three levels, if it "
            "refers to itself)."
        )
    return regex


class _Writer:
    """Methods return None where nothing is valid. `depth` counts how often each reference is open."""

    def __init__(self, root: Any):
        self.root = root
        self.length = 0

    def write(self, schema: Any, at: str, depth: Mapping[str, int]) -> str | None:
        regex = self._write(schema, at, depth)
        self.length += _PART + len(regex or "")
        if self.length > 20 * MAX_LENGTH or len(regex or "") > MAX_LENGTH:
            raise _refusal(at, "is too large when written out", "Use smaller bounds or fewer references.")
        return regex

    def _write(self, schema: Any, at: str, depth: Mapping[str, int]) -> str | None:
        if schema is False:
            return None
        if schema is True:
            return _anything(MAX_DEPTH)
        used = schema.keys() - _ANNOTATIONS
        if "$ref" in used:
            self.only(used, {"$ref"}, at)
            return self.reference(schema["$ref"], at, depth)
        for key in ("const", "enum"):
            if key in used:
                self.only(used, {key, "type"}, at)
                values = [schema["const"]] if key == "const" else schema["enum"]
                return _either([_literal(v, f"{at}/{key}") for v in values if _has_type(v, schema.get("type"))])
        for key in ("anyOf", "oneOf", "allOf"):
            if key in used:
                self.only(used, {key}, at)
                branches = schema[key]
                if key == "allOf" and len(branches) > 1:
                    raise _refusal(f"{at}/allOf", "has several parts", "Write them as one schema.")
                if key == "oneOf":
                    self.distinct(branches, f"{at}/oneOf")
                return _either([self.write(part, f"{at}/{key}/{n}", depth) for n, part in enumerate(branches)])
        types = schema["type"] if "type" in schema else _implied_types(used, at)
        types = [types] if isinstance(types, str) else list(types)
        self.only(used, {"type"}.union(*(_KEYWORDS[name] for name in types)), at)
        if "type" not in schema and not used:
            return _anything(MAX_DEPTH)
        return _either([getattr(self, name, self.scalar)(schema, at, depth, name) for name in types])

    def only(self, used: set[str], allowed: set[str], at: str) -> None:
        for key in sorted(used - allowed):
            beside = ", ".join(sorted(used - {key})) or "nothing"
            raise _refusal(
                f"{at}/{key}", f"cannot be honoured beside {beside}", "Leave it out, and check it afterwards."
            )

    def reference(self, target: str, at: str, depth: Mapping[str, int]) -> str | None:
        schema = self.resolve(target, at)
        if depth.get(target, 0) == MAX_DEPTH:
            return None
        return self.write(schema, target, {**depth, target: depth.get(target, 0) + 1})

    def resolve(self, target: str, at: str) -> Any:
        if target != "#" and not target.startswith("#/"):
            raise _refusal(f"{at}/$ref", f"is {target!r}", "Only references inside the schema (#/...) are followed.")
        schema = self.root
        for step in target.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            inside = (
                schema[int(step)] if isinstance(schema, list) and step.isdigit() and int(step) < len(schema) else None
            )
            schema = schema.get(step) if isinstance(schema, Mapping) else inside
            if schema is None:
                raise _refusal(f"{at}/$ref", f"is {target!r}, which does not exist", "Check the path.")
        if not isinstance(schema, Mapping | bool):
            raise _refusal(f"{at}/$ref", f"is {target!r}, which is no schema", "Check the path.")
        return schema

    # -------------------------------------------------------------------------------------------------------- scalars

    def scalar(self, schema: Mapping[str, Any], at: str, depth: Mapping[str, int], name: str) -> str:
        return _SCALARS[name]

    def string(self, schema: Mapping[str, Any], at: str, depth: Mapping[str, int], name: str) -> str | None:
        shortest, longest = int(schema.get("minLength", 0)), schema.get("maxLength")
        ways = [key for key in ("pattern", "format") if key in schema]
        if len(ways) + ("minLength" in schema or "maxLength" in schema) > 1:
            raise _refusal(f"{at}/{ways[0]}", "cannot be combined with another bound", "Say it all in the pattern.")
        if "pattern" in schema:
            try:
                return f'"(?:{fenced(schema["pattern"], in_string=True)})"'
            except PatternError as error:
                raise _refusal(f"{at}/pattern", f"is {schema['pattern']!r}: {error}", "Use a simpler one.") from None
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                known = ", ".join(_FORMATS)
                raise _refusal(f"{at}/format", f"is {schema['format']!r}", f"Known are {known}; or use a pattern.")
            return f'"{_FORMATS[schema["format"]]}"'
        if longest is not None and longest < shortest:
            return None
        return f'"{STRING_CHARACTER}{{{shortest},{"" if longest is None else int(longest)}}}"'

    def integer(self, schema: Mapping[str, Any], at: str, depth: Mapping[str, int], name: str) -> str | None:
        low, high = _bounds(schema, at)
        if low is None and high is None:
            return _INTEGER
        least = -math.inf if low is None else math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])
        most = math.inf if high is None else math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])
        limit = 10**DIGITS - 1
        least, most = int(max(least, -limit)), int(min(most, limit))
        negative = _naturals(max(1, -most), -least)
        return _either([negative and f"-(?:{negative})", _naturals(max(0, least), most)])

    def number(self, schema: Mapping[str, Any], at: str, depth: Mapping[str, int], name: str) -> str | None:
        low, high = _bounds(schema, at)
        if low is None and high is None:
            return _NUMBER
        for bound in (low, high):
            if bound is not None and bound[0] != int(bound[0]):
                raise _refusal(at, f"has a bound of {bound[0]}", "Bounds of a number must be whole.")
        limit = 10**DIGITS
        least, open_low = (int(low[0]), low[1]) if low else (-limit, True)
        most, open_high = (int(high[0]), high[1]) if high else (limit, True)
        negative = None
        if least < 0:
            negative = _reals(max(0, -most), open_high and most <= 0, -least, open_low)
        positive = _reals(max(0, least), open_low and least >= 0, most, open_high) if most >= 0 else None
        return _either([negative and f"-(?:{negative})", positive])

    # ------------------------------------------------------------------------------------------------------ containers

    def array(self, schema: Mapping[str, Any], at: str, depth: Mapping[str, int], name: str) -> str | None:
        first = [self.write(s, f"{at}/prefixItems/{n}", depth) for n, s in enumerate(schema.get("prefixItems", []))]
        rest = self.write(schema["items"], f"{at}/items", depth) if "items" in schema else _anything(MAX_DEPTH - 1)
        if schema.get("items", True) is True:
            rest = _anything(MAX_DEPTH - 1)
        return _array(first, rest, int(schema.get("minItems", 0)), schema.get("maxItems"))

    def object(self, schema: Mapping[str, Any], at: str, depth: Mapping[str, int], name: str) -> str | None:
        properties, required = schema.get("properties", {}), list(dict.fromkeys(schema.get("required", [])))
        others = schema.get("additionalProperties", True)
        least, most = int(schema.get("minProperties", 0)), schema.get("maxProperties")
        if not properties and not required:
            value = (
                _anything(MAX_DEPTH - 1) if others is True else self.write(others, f"{at}/additionalProperties", depth)
            )
            if least > 1:
                raise _refusal(
                    f"{at}/minProperties", "cannot be honoured: a key may come twice", "Name the properties."
                )
            if value is None:
                return r"\{\}" if not least else None
            return _object_of(value, least, most)
        members: list[tuple[str, bool]] = []
        for key in [*properties, *(key for key in required if key not in properties)]:
            part = properties.get(key, others)
            where = f"{at}/properties/{key}" if key in properties else f"{at}/additionalProperties"
            value = self.write(part, where, depth)
            if value is not None:
                members.append((f"{_literal(key, at)}:{_SPACE}{value}", key in required))
            elif key in required:
                return None
        num_required = sum(needed for _, needed in members)
        if least > num_required or (most is not None and most < len(members)):
            if most is not None and most < num_required:
                return None
            key = "minProperties" if least > num_required else "maxProperties"
            raise _refusal(f"{at}/{key}", "cannot be honoured beside properties", "Say which are `required`.")
        return rf"\{{{_members(members)}\}}"

    # ----------------------------------------------------------------------------------------------------------- oneOf

    def distinct(self, branches: Sequence[Any], at: str) -> None:
        """`oneOf` is `anyOf` if no two branches share a value; what is looked at says so, or the schema is refused."""
        seen = [self.resolved(branch, at) for branch in branches]
        for n, one in enumerate(seen):
            for other in seen[:n]:
                if not self.apart(one, other, at):
                    raise _refusal(
                        at, "has branches that may overlap", "Use anyOf, or a `const` that tells them apart."
                    )

    def resolved(self, schema: Any, at: str) -> Any:
        for _ in range(10):
            if not (isinstance(schema, Mapping) and "$ref" in schema):
                break
            schema = self.resolve(schema["$ref"], at)
        return schema

    def apart(self, one: Any, other: Any, at: str) -> bool:
        if one is False or other is False:
            return True
        if one is True or other is True:
            return False
        values, others = _values(one), _values(other)
        if values is not None and others is not None:
            return not any(_equal(v, w) for v in values for w in others)
        types, other_types = _types(one), _types(other)
        if not types & other_types:
            return True
        if types & other_types != {"object"}:
            return False
        keys = set(one.get("required", [])) & set(other.get("required", []))
        for key in keys & set(one.get("properties", {})) & set(other.get("properties", {})):
            a, b = (self.resolved(s["properties"][key], at) for s in (one, other))
            if isinstance(a, Mapping) and isinstance(b, Mapping) and _values(a) and _values(b) and self.apart(a, b, at):
                return True
        return False


def _refusal(at: str, what: str, way_out: str) -> ConstraintError:
    return ConstraintError(f"JSON schema: {at} {what}. {way_out}")


def _either(parts: Sequence[str | None]) -> str | None:
    possible = list(dict.fromkeys(part for part in parts if part is not None))
    if not possible:
        return None
    return possible[0] if len(possible) == 1 else f"(?:{'|'.join(possible)})"


def _implied_types(used: set[str], at: str) -> list[str]:
    """Keywords without `type` allow every other type as well: written is the type that they speak of."""
    speak = [name for name, keys in _KEYWORDS.items() if keys and used <= keys]
    if used and not speak:
        raise _refusal(at, f"has {', '.join(sorted(used))} and no type", "Give it a `type`.")
    return speak[:1] if used else list(_KEYWORDS)


# ------------------------------------------------------------------------------------------------------------- values


def _has_type(value: Any, types: str | Sequence[str] | None) -> bool:
    if types is None:
        return True
    names = {types} if isinstance(types, str) else set(types)
    own = _type_of(value)
    return own in names or (own == "integer" and "number" in names) or (_is_whole(value) and "integer" in names)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return kinds[type(value)]


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other  # 1 is not true


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _types(schema: Mapping[str, Any]) -> set[str]:
    values = _values(schema)
    if values is not None:
        types = {_type_of(value) for value in values}
    elif "type" in schema:
        types = {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    else:
        types = set(_KEYWORDS)
    return types | ({"integer", "number"} if types & {"integer", "number"} else set())


def _literal(value: Any, at: str) -> str:
    """The value itself, spaces as everywhere."""
    if isinstance(value, dict):
        inner = f",{_SPACE}".join(f"{_literal(key, at)}:{_SPACE}{_literal(part, at)}" for key, part in value.items())
        return rf"\{{{inner}\}}"
    if isinstance(value, list):
        return rf"\[{f',{_SPACE}'.join(_literal(part, at) for part in value)}\]"
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        if FENCE in text:
            raise ValueError("no character")
    except ValueError as error:
        raise _refusal(at, f"holds {value!r}, which JSON cannot say ({error})", "Leave it out.") from None
    return escape(text)


def escape(text: str) -> str:
    """The text itself, as a regular expression of Rust's."""
    return "".join(rf"\x{{{ord(c):X}}}" if c in "\\.+*?()|[]{}^$#&-~" or not c.isprintable() else c for c in text)


def _anything(depth: int) -> str:
    scalars = ["(?:true|false)", "null", _NUMBER, _STRING]
    if depth == 0:
        return f"(?:{'|'.join(scalars)})"
    inner = _anything(depth - 1)
    return f"(?:{'|'.join([*scalars, _array([], inner, 0, None) or '', _object_of(inner, 0, None) or ''])})"


def _array(first: Sequence[str | None], rest: str | None, least: int, most: int | None) -> str | None:
    """`first` one by one, then `rest` again and again."""
    # where an item is impossible the array ends before it
    possible = list(first[: first.index(None)] if None in first else first)
    if len(possible) < len(first):
        rest = None
    longest = math.inf if most is None else int(most)
    if rest is None:
        longest = min(longest, len(possible))
    if longest < least:
        return None
    regex = ""
    if longest > len(possible):
        need = max(least - len(possible), 0)
        many = "" if longest == math.inf else int(longest - len(possible))
        if possible:
            regex = f"(?:,{_SPACE}{rest}){{{need},{many}}}"
        else:
            limit = "" if many == "" else int(many) - 1
            regex = f"{rest}(?:,{_SPACE}{rest}){{{max(need - 1, 0)},{limit}}}"
            regex = regex if need else f"(?:{regex})?"
    for n in reversed(range(int(min(longest, len(possible))))):
        regex = f"{f',{_SPACE}' if n else ''}{possible[n]}{regex}"
        regex = regex if n < least else f"(?:{regex})?"
    return rf"\[{regex}\]"


def _object_of(value: str, least: int, most: int | None) -> str | None:
    if most is not None and most < least:
        return None
    if most == 0:
        return r"\{\}"
    member = f"{_STRING}:{_SPACE}{value}"
    regex = f"{member}(?:,{_SPACE}{member}){{0,{'' if most is None else int(most) - 1}}}"
    return rf"\{{{regex if least else f'(?:{regex})?'}\}}"


def _members(members: Sequence[tuple[str, bool]]) -> str:
    """Members in order, those not needed left out at will, commas between."""
    # behind[n]: members n, n+1, ... when something stands before them
    behind = [""]
    for member, needed in reversed(members):
        part = f",{_SPACE}{member}"
        behind.append((part if needed else f"(?:{part})?") + behind[-1])
    behind.reverse()
    starts, all_optional = [], True
    for n, (member, needed) in enumerate(members):
        starts.append(member + behind[n + 1])
        if needed:
            all_optional = False
            break
    if not starts:
        return ""
    regex = f"(?:{'|'.join(starts)})"
    return f"{regex}?" if all_optional else regex


# ------------------------------------------------------------------------------------------------------------ numbers

Bound = tuple[float, bool]
"""A value, and whether it is itself excluded."""


def _bounds(schema: Mapping[str, Any], at: str) -> tuple[Bound | None, Bound | None]:
    lows = [(schema[key], key.startswith("ex")) for key in ("minimum", "exclusiveMinimum") if key in schema]
    highs = [(schema[key], key.startswith("ex")) for key in ("maximum", "exclusiveMaximum") if key in schema]
    for value, _ in (*lows, *highs):
        if isinstance(value, float) and not math.isfinite(value):
            raise _refusal(at, f"has a bound of {value}", "Leave it out.")
    return max(lows, default=None), min(highs, key=lambda b: (b[0], not b[1]), default=None)


def _naturals(least: int, most: int) -> str | None:
    """least, ..., most, 0 or more, without leading zeros."""
    parts = []
    for length in range(1, len(str(max(most, 0))) + 1):
        low, high = max(least, 10 ** (length - 1) if length > 1 else 0), min(most, 10**length - 1)
        if low <= high:
            parts.append(_same_length(str(low), str(high)))
    return _either(parts)


def _same_length(low: str, high: str) -> str:
    if low == high:
        return low
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{low[0]}-{high[0]}]" + (f"[0-9]{{{rest}}}" if rest else "")
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    parts = [low[0] + _same_length(low[1:], "9" * rest)]
    if int(high[0]) - int(low[0]) > 1:
        parts.append(_same_length(f"{int(low[0]) + 1}" + "0" * rest, f"{int(high[0]) - 1}" + "9" * rest))
    parts.append(high[0] + _same_length("0" * rest, high[1:]))
    return f"(?:{'|'.join(parts)})"


def _reals(least: int, open_low: bool, most: int, open_high: bool) -> str | None:
    """Decimals from least to most, 0 or more; an open end is not reached."""
    if most < least or (most == least and (open_low or open_high)):
        return None
    parts = []
    below = _naturals(least + open_low, most - 1)
    if below is not None:
        parts.append(f"(?:{below})(?:{_FRACTION})?")
    if open_low:
        parts.append(rf"{least}\.[0-9]{{0,{DIGITS - 1}}}[1-9]")
    if not open_high:
        parts.append(rf"{most}(?:\.0{{1,{DIGITS}}})?")
    return _either(parts)
