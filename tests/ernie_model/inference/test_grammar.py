"""Constrained answers: whatever the model prefers, what ends by itself satisfies the schema or the pattern."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_model.inference import grammar, json_regex
from ernie_model.inference.automaton import PatternError, transitions
from ernie_model.inference.grammar import compile_constraint
from ernie_model.inference.request import JsonSchema, Regex, RequestError, SamplingParams
from ernie_model.inference.sampling import Sampler, Vocabulary, sample
from ernie_model.tokenizer import load_tiny_tokenizer

TINY = load_tiny_tokenizer()
VOCABULARY = Vocabulary(TINY)
# A model of noise would write strings for ever: it likes what ends things, and digits, a little more.
LIKED = [TINY.token_bytes.index(character.encode()) for character in '"]},ab'] + TINY.encode_plain("07")[0]


def write(constraint, seed: int, prompt=(), most=400, first: str = "", **params) -> tuple[str, bool]:
    """What a model of noise answers, and whether it ended by itself. `first` is what it wants to say at first."""
    sampler = Sampler(SamplingParams(constraint=constraint, seed=seed, **params), prompt, VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    wanted, ids = TINY.encode_markup(first), []
    for step in range(most):
        logit_1V = torch.randn(1, VOCABULARY.size, generator=generator) * 2
        logit_1V[0, LIKED] += 5
        if step < len(wanted):
            logit_1V[0, wanted[step]] += 100
        sampled = sample(logit_1V, [sampler])[0]
        assert sampled.error is None
        sampler.accept(sampled.token_id)
        if sampled.token_id in VOCABULARY.terminators:
            return TINY.decode(ids), True
        ids.append(sampled.token_id)
    return TINY.decode(ids), False


def check(schema, seeds=range(3)) -> list:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    values = []
    for seed in seeds:
        text, ended = write(JsonSchema(schema=schema), seed)
        if ended:
            values.append(json.loads(text))
            validator.validate(values[-1])
    return values


# ------------------------------------------------------------------------------------------------------------ schemas

ADDRESS = {"type": "object", "properties": {"street": {"type": "string", "maxLength": 9}}, "required": ["street"]}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"], "additionalProperties": False}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": -5, "maximum": 500},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", "children"],
        }
    },
}
SCHEMAS = [
    {"type": "object"},
    {},
    True,
    {"type": ["integer", "null"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "minItems": 3, "maxItems": 4},
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": False},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": r'^[^b]{2}"\\\.\n(?i:k).\S$'},
    {"type": "string", "pattern": "a.c"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "hostname"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "uri"},
    {"type": "integer", "exclusiveMinimum": 7, "maximum": 23},
    {"type": "integer", "maximum": -98.5, "minimum": -1203},
    {"type": "number", "minimum": 0, "maximum": 1000},
    {"type": "number", "exclusiveMinimum": -2, "exclusiveMaximum": 1},
    {"type": "number", "exclusiveMinimum": 0},
    {"enum": ["a", 1, None, 'é"\\\u2028', [1, 2], {"a": 1.5, "b": []}, True, "\U0001f600", "^.$"]},
    {"type": "integer", "enum": ["a", 1, 3.0]},
    {"const": {"a b": [1, "x.y"]}},
    {"type": "object", "properties": {"a": {"type": "null"}, 'b"': {"type": "null"}, "c": False}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a", "z"], "additionalProperties": {"const": 2}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "additionalProperties": False},
    {"properties": {"home": {"$ref": "#/$defs/Address"}}, "required": ["home"], "$defs": {"Address": ADDRESS}},
    {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Count"},
    {"allOf": [{"$ref": "#/definitions/x~1y"}], "definitions": {"x/y": {"type": "null"}}},
    {"oneOf": [CAT, DOG, {"type": "null"}]},
    TREE,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_answers_satisfy_their_schema(schema):
    assert check(schema)


def leaves():
    numbers = st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={"minimum": st.integers(-1200, 5), "maximum": st.integers(5, 1200)},
    )
    strings = st.fixed_dictionaries(
        {"type": st.just("string")}, optional={"minLength": st.integers(0, 2), "maxLength": st.integers(2, 5)}
    )
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text('aé"\\\n.*', max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text('k"', max_size=2), inner, max_size=2),
        max_leaves=3,
    )
    enums = st.lists(json_values, min_size=1, max_size=3).map(lambda values: {"enum": values})
    return st.one_of(numbers, strings, enums, st.sampled_from([{"type": "boolean"}, {"type": "null"}]))


def containers(inner):
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(2, 4),
        },
    )
    properties = st.dictionaries(st.sampled_from(["a", "b", "c d"]), inner, max_size=3)
    objects = st.builds(
        lambda parts, needed, others: {
            "type": "object",
            "properties": parts,
            "required": sorted(set(parts) & needed),
            "additionalProperties": others,
        },
        properties,
        st.sets(st.sampled_from(["a", "b", "c d"])),
        st.booleans(),
    )
    return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}))


@settings(max_examples=40)
@given(st.recursive(leaves(), containers, max_leaves=5), st.integers(0, 2**32))
def test_answers_satisfy_any_schema(schema, seed):
    check(schema, [seed])


@pytest.mark.parametrize(
    "schema, part",
    [
        ({"type": "array", "items": {"type": "integer", "multipleOf": 3}}, "#/items/multipleOf"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
        ({"type": "object", "patternProperties": {"^a": {}}}, "#/patternProperties"),
        ({"not": {"type": "null"}}, "#"),
        ({"type": "null", "if": {}, "then": {}}, "#/if"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "#/type"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "#/allOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
        ({"oneOf": [CAT, {"type": "object"}]}, "#/oneOf"),
        ({"oneOf": [{"enum": [1, 2]}, {"const": 2}]}, "#/oneOf"),
        ({"type": "number", "minimum": 0.5}, "0.5"),
        ({"type": "string", "format": "iri"}, "#/format is 'iri'"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "#/pattern"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"$ref": "#/$defs/x"}, "#/$ref is '#/$defs/x', which does not exist"),
        ({"$ref": "http://example.com"}, "inside the schema"),
        ({"type": "foo"}, "#/type"),
        ({"type": "object", "properties": {"a": {"minItems": "x"}}}, "#/properties/a/minItems"),
        ({"type": "object", "minProperties": 2}, "#/minProperties"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, "#/maxProperties"),
        (False, "No JSON text"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "No JSON text"),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 3}, "No JSON text"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1}}}, "No"),
        ({"enum": ["\ud800"]}, "#/enum"),
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ({"type": "string", "pattern": "a{30000}"}, "states"),
        (json.loads('{"type": "integer", "minimum": 1e999}'), "# has a bound of inf"),
        (json.loads('{"type": "number", "exclusiveMaximum": NaN}'), "# has a bound of nan"),
        ({"type": "integer", "minimum": 10**20}, "at most 16 digits"),
        ({"type": "integer", "minimum": 10**400}, "at most 16 digits"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(schema, part):
    with pytest.raises(RequestError, match=re.escape(part)):
        compile_constraint(SamplingParams(constraint=JsonSchema(schema=schema)), VOCABULARY)


def test_schemas_that_never_end_are_refused():
    names = [f"#/$defs/{name}" for name in "abcdef"]
    each = {"anyOf": [{"$ref": name} for name in names]}  # nothing but references: 6**18 ways, none of which ends
    for schema in ({"$ref": names[0], "$defs": dict.fromkeys("abcdef", each)}, deep(3000)):
        with pytest.raises(RequestError, match="too large|too deeply"):
            json_regex.json_regex(schema)


def deep(levels: int) -> dict:
    schema = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 12_000))
def test_ranges_of_naturals(least, most, n):
    regex = json_regex._naturals(least, most)
    assert (regex is not None) == (least <= most)
    if regex is not None:
        assert bool(re.fullmatch(regex, str(n))) == (least <= n <= most)
        assert not re.fullmatch(regex, f"0{n}")


@given(st.integers(-30, 30), st.integers(-30, 30), st.booleans(), st.booleans(), st.decimals(-40, 40, places=2))
def test_ranges_of_numbers(least, most, open_low, open_high, x):
    low = {("exclusiveMinimum" if open_low else "minimum"): least}
    high = {("exclusiveMaximum" if open_high else "maximum"): most}
    try:
        regex = json_regex.json_regex({"type": "number", **low, **high})
    except RequestError:
        assert least > most or (least == most and (open_low or open_high))
        return
    for text in (f"{x}", f"{int(x)}", f"{least}", f"{most}", f"{least}.00", f"{most}.0", "-0", "0.0"):
        value = float(text)
        above = value > least if open_low else value >= least
        below = value < most if open_high else value <= most
        if re.fullmatch(regex, text):
            assert above and below
        elif above and below:
            assert value == 0 or (text.endswith("0") and int(value) in (least, most))


# ----------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    "pattern",
    [
        "yes|no",
        r"^\d{3}-[a-c]+\.$",
        r'"[^"]{0,50}"',
        r"(?:.*a){3}b",
        r"[\]a-]{3}[^\]]",
        "(?P<year>[0-9]{4})é😀?",
        r"(?i)straße",
        r"(?i)(?:a\))(?P<x>b)[)]\(",
        "a*?b",
        "",
    ],
)
def test_answers_match_their_pattern(pattern):
    ended = [text for text, done in (write(Regex(pattern=pattern), seed) for seed in range(4)) if done]
    assert ended and all(re.fullmatch(pattern, text) for text in ended)


@pytest.mark.parametrize(
    "pattern, why",
    [
        ("a(?=b)", "look-around"),
        ("a(?!b)", "look-around"),
        ("(?<!b)a", "look-around"),
        (r"(a)\1", "back references"),
        (r"a\b", "positions"),
        ("a|^b", "positions"),
        ("(?s).", "flags"),
        ("[a", "not complete"),
        ("a\\", "not complete"),
        ("(a", "not understood"),
        ("a)|(b", "no bracket is open"),
        (r"(?i)(?:a\))(?P<x>b)[)]\(c)", "no bracket is open"),
        ("[^\\s\\S]", "no text matches"),
        ("\U0010ffff", "not a character"),
        ("a{30000}", "at most 20000"),
    ],
)
def test_patterns_that_are_refused(pattern, why):
    with pytest.raises(RequestError, match=why):
        Sampler(SamplingParams(constraint=Regex(pattern=pattern)), (), VOCABULARY)


def test_a_pattern_inside_a_string_cannot_leave_it():
    schema = {"type": "string", "pattern": r'^.[^b]\S\D"\\\n$'}
    compiled = compile_constraint(SamplingParams(constraint=JsonSchema(schema=schema)), VOCABULARY)
    assert compiled.after(1, rb'"aaaa\"\\\n"') != 0
    for wrong in (
        rb'""',
        rb'"a"',
        rb'"aa"',
        rb'"aaa"',
        rb'"aaaa"',
        rb'"\n',
        b'"a\n',
        rb'"aa\n',
        '"\U0010ffff'.encode(),
    ):
        assert compiled.after(1, wrong) == 0, wrong


@pytest.mark.slow
def test_a_pattern_that_would_fill_the_memory_is_stopped():
    with pytest.raises(RequestError, match="prepare"):
        Sampler(SamplingParams(constraint=Regex(pattern="(a|b)*a(a|b){40}")), (), VOCABULARY)


# --------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize(
    "prefix", ["", '{"', '{"label": "caf', '{"label": "', '{"label": "x", "n": 1', '{"label":"","n":12}']
)
def test_the_tokens_of_a_state_by_definition(prefix):
    """Those whose bytes, one after the other, the automaton takes; the terminators where the text may end."""
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string", "maxLength": 30}, "n": {"type": "integer"}},
        "required": ["label", "n"],
    }
    compiled = compile_constraint(SamplingParams(constraint=JsonSchema(schema=schema)), VOCABULARY)
    state = compiled.after(1, prefix.encode())
    assert state != 0
    ordinary = set(range(VOCABULARY.size)) - TINY.special_ids - set(VOCABULARY.banned_ids)
    allowed = {i for i in ordinary if compiled.after(state, TINY.token_bytes[i] or b"?") != 0}
    if prefix.endswith("}"):
        allowed |= VOCABULARY.terminators
    assert set(np.flatnonzero(~compiled.forbidden(state)).tolist()) == allowed != set()
    assert set(np.flatnonzero(~compiled.forbidden(state)).tolist()) == allowed  # and once more, from what was kept


def test_after_the_end_only_the_end():
    sampler = Sampler(SamplingParams(constraint=Regex(pattern="a")), (), VOCABULARY)
    for token_id in (*TINY.encode_plain("a")[0], min(VOCABULARY.terminators)):
        sampler.accept(token_id)
    assert sample(torch.randn(1, VOCABULARY.size), [sampler])[0].token_id in VOCABULARY.terminators


def test_an_equal_constraint_is_prepared_once():
    one, other = (
        compile_constraint(SamplingParams(constraint=JsonSchema(schema=dict(type="null", title=t))), VOCABULARY)
        for t in "ab"
    )
    assert one is other


def test_many_who_ask_at_once_for_the_same_wait_for_one(monkeypatch):
    made = []

    def prepare(pattern):
        made.append(pattern)
        time.sleep(0.1)
        if "bad" in pattern:
            raise PatternError("no")
        return transitions(pattern)

    monkeypatch.setattr(grammar, "transitions", prepare)
    vocabulary = Vocabulary(TINY)

    def ask(pattern):
        try:
            return compile_constraint(SamplingParams(constraint=Regex(pattern=pattern)), vocabulary)
        except RequestError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        good = list(pool.map(ask, ["good"] * 8))
        bad = list(pool.map(ask, ["bad"] * 8))
    assert len(set(good)) <= 2 and {type(one) for one in good} == {grammar.Compiled}
    assert set(bad) == {"regex 'bad' cannot be used: no. Use a simpler one, or smaller bounds."}
    assert 2 <= len(made) <= 4  # two may begin before either is done


# ----------------------------------------------------------------------------------------------------- constrain_after


def test_the_constraint_holds_from_a_text_on():
    text, ended = write(JsonSchema(schema={"type": "null"}), 0, first="Well 1</think>\n\n", constrain_after="</think>")
    assert ended and text == "Well 1</think>\n\nnull"
    text, ended = write(Regex(pattern="ab"), 0, first="Well 1</think>", constrain_after="</think>")
    assert ended and text == "Well 1</think>ab"


def test_a_text_in_several_tokens_is_found_too():
    text, ended = write(Regex(pattern="ab"), 0, first="Answer: ", constrain_after="Answer: ")
    assert ended and text == "Answer: ab"


def test_a_prompt_that_skips_the_reasoning_constrains_from_the_first_token():
    prompt = TINY.encode_markup("\nAssistant: <think>\n\n</think>\n\n")
    assert write(Regex(pattern="ab"), 0, prompt, constrain_after="</think>") == ("ab", True)
    text, _ = write(Regex(pattern="ab"), 0, TINY.encode_markup("</think>x"), most=30, constrain_after="</think>")
    assert not text.startswith("ab")
