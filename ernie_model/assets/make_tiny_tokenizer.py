"""Train the tokenizer of the tiny models, on text that this file writes itself.

    python -m ernie_model.assets.make_tiny_tokenizer [folder]

The result has the shape of the released tokenizers: byte-pair encoding with byte fallback, spaces written as U+2581,
digits as single tokens, no token added in front of a text, and every special string of the family. Ids:

    0 <unk>   1 <s>   2 </s>   3-258 <0x00>..<0xFF>   characters   merges   digits   special tokens        (2048 in all)

The same script gives the same bytes: the text comes from a seeded generator and the training is deterministic.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ernie_model.tokenizer import (
    BEGIN_OF_SENTENCE,
    DIGITS,
    END_OF_SENTENCE,
    MEDIA_TOKENS,
    SPECIAL_TOKENS,
    START,
    STOP,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    UNKNOWN,
    tiny_tokenizer_folder,
)

VOCAB_SIZE = 2048
NUM_LINES = 6000
SPACE = "\u2581"
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
FIRST = (UNKNOWN, START, STOP)


def files() -> dict[str, str]:
    """Name -> content of the tokenizer's files."""
    return {
        TOKENIZER_FILE: build().to_str(pretty=False) + "\n",
        TOKENIZER_CONFIG_FILE: json.dumps(config(), indent=2) + "\n",
    }


def build() -> Tokenizer:
    vocab, merges = learn(VOCAB_SIZE - len(FIRST) - len(BYTES) - len(DIGITS) - len(SPECIAL_TOKENS))
    ids = {piece: index for index, piece in enumerate((*FIRST, *BYTES, *vocab))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = word_boundaries()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in FIRST])
    tokenizer.add_tokens([AddedToken(digit, normalized=False, special=False) for digit in DIGITS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size(with_added_tokens=True) == VOCAB_SIZE
    return tokenizer


def word_boundaries() -> pre_tokenizers.PreTokenizer:
    """Merges stay inside a word with the space before it, or inside one kind of punctuation; a newline stands alone."""
    punctuation = rf"(?:(?!{SPACE})[\p{{P}}\p{{S}}])"  # U+2581 is itself a symbol
    pattern = Regex(rf"\n|{SPACE}?[^\s\d\p{{P}}\p{{S}}]+|{SPACE}?{punctuation}+|{SPACE}+|\d")
    return pre_tokenizers.Split(pattern, behavior="isolated")


def learn(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces (characters, then merges in the order they were learned) and merge rules."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # Digits are added tokens and a newline is the byte token <0x0A>: neither may become a piece of its own.
    removed = pre_tokenizers.Split(Regex(r"[\d\n]"), behavior="removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([removed, word_boundaries()])
    alphabet = [chr(i) for i in range(33, 127) if chr(i) not in DIGITS] + [SPACE]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator(text(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(vocab) != size:
        raise SystemExit(f"the text gives only {len(vocab)} pieces, {size} are needed; write more of it")
    return vocab, [tuple(merge) for merge in model["merges"]]


def config() -> dict[str, Any]:
    """tokenizer_config.json as transformers reads it."""
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=START,
        eos_token=STOP,
        pad_token=UNKNOWN,
        unk_token=UNKNOWN,
        cls_token=BEGIN_OF_SENTENCE,
        sep_token=END_OF_SENTENCE,
        extra_special_tokens={field.removesuffix("_id"): string for field, string in MEDIA_TOKENS.items()},
        add_bos_token=False,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


# ----------------------------------------------------------------------------------------------------------- the text

COLOURS = "red green blue yellow orange purple black white grey brown pink".split()
SHAPES = "circle square triangle rectangle star cross line arrow ring diamond".split()
THINGS = "dog cat car tree house bird boat ball book chair table cup lamp door window flower sign clock".split()
PLACES = "left right top bottom middle corner front back".split()
CITIES = "Paris London Berlin Beijing Madrid Rome Tokyo Cairo Lima Oslo".split()
VERBS = "see find count read describe compare explain show name list".split()
SUMS = ("plus", "minus", "times", "divided by")
SENTENCES = """The quick brown fox jumps over the lazy dog.
You are a helpful assistant. Answer the question and explain your reasoning step by step.
I think the answer is not in the picture, so I need to look at it more closely.
Let me zoom in on this region of the image to read the small text.
First I will look at the whole picture, then I will check each part of it.
The question asks for one number, so I should count them again to be sure.
Wait, that is not right. Let me check the last step before I answer.
This would be the case if there were no other objects between them.
What is the difference between the first and the second image?
Which of the following statements is true? Choose one letter and explain why.
Write a short story about a child who finds an old map under the floor.
How many people can you see, and what are they doing?
Please write the number that is shown in the image.
Sorry, I can not help with that, because the picture does not show it.
Here is a function that returns the value of the key: def get(key, value): return value
In the video a person walks from the house to the street and then comes back.
It was a warm day in the summer, and most of the people had gone to the river.
The chart shows that the price went up from January to March and then went down again.
Therefore the total is the sum of all of the rows in the table.
They have been working on this problem for a long time, but it is still open.
""".splitlines()


def text() -> Iterator[str]:
    """Questions and answers about images, arithmetic, tool calls, JSON and everyday English; always the same."""
    rng = random.Random(0)
    makers = (about_picture, about_video, arithmetic, reasoning, tool_call, record, grounding, english)
    for index in range(NUM_LINES):
        yield makers[index % len(makers)](rng)


def about_picture(rng: random.Random) -> str:
    colour, shape, thing, place = (rng.choice(words) for words in (COLOURS, SHAPES, THINGS, PLACES))
    question = rng.choice(
        (
            f"User: What is this?Picture 1:\nAssistant: This is a {colour} {thing}.",
            f"User: Picture 1:How many {thing}s are in the image?\nAssistant: There are {rng.randrange(20)}.",
            f"User: Picture 1:Picture 2:Compare.\nAssistant: The first image shows a {thing}, the second a {shape}.",
            f"User: What colour is the {shape}?\nAssistant: The {shape} on the {place} is {colour}.",
            f"User: Describe the picture.\nAssistant: The image shows a {colour} {thing} and a small {shape}.",
            f"User: Which digit is written in the {place} of the image?\nAssistant: {rng.randrange(10)}",
            f"User: Can you {rng.choice(VERBS)} the {thing} at the {place}?\nAssistant: Yes, it is {colour}.",
        )
    )
    return question


def about_video(rng: random.Random) -> str:
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return (
        f"User: Video 1:What happens in the video?\nAssistant: At {rng.randrange(60)} seconds a {thing} moves to the "
        f"{place}. time: 00:00:{rng.randrange(60):02d}.50"
    )


def arithmetic(rng: random.Random) -> str:
    a, b, word = rng.randrange(100), rng.randrange(1, 100), rng.choice(SUMS)
    result = {"plus": a + b, "minus": a - b, "times": a * b, "divided by": a // b}[word]
    return (
        f"User: What is {a} {word} {b}?\nAssistant: {a} {word} {b} equals {result}. The answer is \\boxed{{{result}}}."
    )


def reasoning(rng: random.Random) -> str:
    return f"<think>\n{rng.choice(SENTENCES)} {rng.choice(SENTENCES)}\n</think>\nThe answer is {rng.choice('ABCD')}."


def tool_call(rng: random.Random) -> str:
    x, y = rng.randrange(500), rng.randrange(500)
    arguments = rng.choice(
        (
            {"bbox_2d": [x, y, x + 300, y + 200], "label": rng.choice(THINGS)},
            {"location": rng.choice(CITIES), "unit": rng.choice("cf")},
            {"query": f"{rng.choice(COLOURS)} {rng.choice(THINGS)}", "image": 1},
        )
    )
    name = rng.choice(("image_zoom_in_tool", "get_weather", "image_search"))
    if rng.random() < 0.2:
        tool = {"name": name, "description": "Look at a part of the image.", "parameters": {"type": "object"}}
        tool["parameters"] |= {"properties": {"label": {"type": "string"}}, "required": ["bbox_2d"]}
        return f"<tool_list>\n{json.dumps([{'type': 'function', 'function': tool}])}\n</tool_list>"
    if rng.random() < 0.3:
        return f"User: \n<tool_output>\nPicture 2:{rng.choice(SENTENCES)}\n</tool_output>\n\nAssistant: "
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>\n"


def record(rng: random.Random) -> str:
    return json.dumps(
        {
            "id": rng.randrange(1000),
            "name": rng.choice(CITIES),
            "colour": rng.choice(COLOURS),
            "value": rng.random() < 0.5,
        }
    )


def grounding(rng: random.Random) -> str:
    x, y = rng.randrange(900), rng.randrange(900)
    box = [{"bbox_2d": [x, y, x + 50, y + 90], "label": f"{rng.choice(COLOURS)} {rng.choice(SHAPES)}"}]
    return f"User: Where is the {rng.choice(SHAPES)}? Answer in JSON.\nAssistant: {json.dumps(box)}"


def english(rng: random.Random) -> str:
    return " ".join(rng.choices(SENTENCES, k=3))


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny_tokenizer_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_text(content, "utf-8")
        print(folder / name)
