"""Text <-> token ids.

A thin layer over the `tokenizers` library that keeps two kinds of text apart, which one `encode` call cannot do:

    markup   text of ours: `<|begin_of_sentence|>` is one id           -> `special_id`, `encode_markup`
    plain    text of other people: the same characters are characters  -> `encode_plain`

A user who types `<|IMAGE_PLACEHOLDER|>` therefore never gets a placeholder into the model's input. Digits 0-9 are
added tokens of the family too, but ordinary ones: they are single tokens in both kinds of text.

Strings and ids: reference 1.3. Ids are always looked up by string, never written down here.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from ernie_model.atomic import atomic_write
from ernie_model.config import MEDIA_TOKEN_FIELDS

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

UNKNOWN, START, STOP = "<unk>", "<s>", "</s>"
BEGIN_OF_SENTENCE, END_OF_SENTENCE = "<|begin_of_sentence|>", "<|end_of_sentence|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
RESPONSE, END_RESPONSE = "<response>", "</response>"
IMAGE, IMAGE_START, IMAGE_END = "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"
VIDEO, VIDEO_START, VIDEO_END = "<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>"
NUM_LOCATIONS = 1001

MEDIA_TOKENS = dict(
    image_token_id=IMAGE,
    image_start_token_id=IMAGE_START,
    image_end_token_id=IMAGE_END,
    video_token_id=VIDEO,
    video_start_token_id=VIDEO_START,
    video_end_token_id=VIDEO_END,
)
"""Field of `ErnieConfig` -> the string whose id it must hold."""
assert tuple(MEDIA_TOKENS) == MEDIA_TOKEN_FIELDS

# In the order in which the family registers them, which is the order of their ids (reference 1.3).
SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_SENTENCE,
    BEGIN_OF_SENTENCE,
    THINK,
    END_THINK,
    TOOL_CALL,
    END_TOOL_CALL,
    RESPONSE,
    END_RESPONSE,
    IMAGE,
    "<|AUDIO_PLACEHOLDER|>",
    *(f"<|LOC_{i}|>" for i in range(NUM_LOCATIONS)),
    "<|LOC_BEGIN|>",
    "<|LOC_END|>",
    "<|LOC_SEP|>",
    "<|CROP_COL_SEP|>",
    "<|CROP_ROW_SEP|>",
    "<|IMAGE_SEP|>",
    IMAGE_START,
    IMAGE_END,
    VIDEO_START,
    VIDEO_END,
    VIDEO,
)
DIGITS = tuple("0123456789")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or that lacks a token the suite needs."""


class Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
        files: name -> content of the tokenizer's files; `tokenizer.json` is required. They are written back unchanged
            by `save`, apart from what `transformers` needs to find the media tokens.
        source: where the files come from, for error messages.
    """

    def __init__(self, files: dict[str, str], source: str = "tokenizer"):
        if TOKENIZER_FILE not in files:
            raise TokenizerError(f"{source} holds no {TOKENIZER_FILE}.")
        self.files = dict(files)
        self.source = source
        try:
            raw = json.loads(files[TOKENIZER_FILE])
            self._markup = tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE])
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(_all_markup_special(raw)))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise TokenizerError(f"{source}: {TOKENIZER_FILE} cannot be read: {error}") from error
        self._plain.encode_special_tokens = True  # in spite of its name: special tokens are encoded as text
        for backend in (self._markup, self._plain):
            backend.no_padding()
            backend.no_truncation()
        self._special_ids = {
            token["content"]: token["id"] for token in raw.get("added_tokens", []) if _is_markup(token["content"])
        }
        self._reserved_ids = frozenset(self._special_ids.values())

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint folder.

        Raises:
            TokenizerError: there is no tokenizer.json, or it cannot be read.
        """
        folder = Path(folder)
        if not (folder / TOKENIZER_FILE).exists():
            found = "only tokenizer.model (sentencepiece)" if (folder / "tokenizer.model").exists() else "none"
            raise TokenizerError(
                f"{folder} must hold a {TOKENIZER_FILE}, and there is {found}. Convert it once, where transformers and "
                f"sentencepiece are installed: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained("
                f"{str(folder)!r})"
            )
        names = [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json"]
        files = {name: (folder / name).read_text("utf-8") for name in names if (folder / name).exists()}
        return cls(files, source=str(folder))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into an existing folder."""
        files = self.files | {TOKENIZER_CONFIG_FILE: json.dumps(self._config_for_transformers(), indent=2) + "\n"}
        for name, content in files.items():
            atomic_write(Path(folder) / name, content)

    def _config_for_transformers(self) -> dict[str, Any]:
        """tokenizer_config.json with the attributes (`image_token`, ...) that transformers' ERNIE processor reads."""
        config = json.loads(self.files.get(TOKENIZER_CONFIG_FILE, "{}"))
        config.pop("chat_template", None)  # the processor writes its own, as a file
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        names = {field.removesuffix("_id"): string for field, string in MEDIA_TOKENS.items()}
        extra = config.get("extra_special_tokens") or {}
        if isinstance(extra, dict):
            config["extra_special_tokens"] = extra | names
        else:  # a bare list of strings carries no names; transformers accepts the names beside it
            config |= names
        return config

    # ---------------------------------------------------------------------------------------------------------- ids

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._markup.get_vocab(with_added_tokens=True).values()) + 1

    def special_id(self, string: str) -> int | None:
        """Id of a special token such as `<think>`; None if this tokenizer writes it as ordinary text."""
        return self._special_ids.get(string)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return self._reserved_ids

    def require(self, string: str) -> int:
        """Id of a special token that the suite cannot work without.

        Raises:
            TokenizerError: this tokenizer has no such token.
        """
        token_id = self.special_id(string)
        if token_id is None:
            raise TokenizerError(f"{self.source} has no token {string!r}, which the chat format needs.")
        return token_id

    def token(self, token_id: int) -> str | None:
        return self._markup.id_to_token(token_id)

    def media_token_ids(self) -> dict[str, int]:
        """The six media token fields of `ErnieConfig`, filled from this tokenizer."""
        return {field: self.require(string) for field, string in MEDIA_TOKENS.items()}

    # ------------------------------------------------------------------------------------------------------- encode

    def encode_markup(self, text: str) -> list[int]:
        """Ids of text in which special strings mean special tokens, as transformers' tokenizer reads it."""
        return self._markup.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of text in which nothing is special, and for each the characters [start, stop) it covers.

        Raises:
            TokenizerError: the text holds half of a surrogate pair, which has no encoding.
        """
        if not text:
            return [], []
        try:
            encoding = self._plain.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"{text[:40]!r}... is not valid Unicode text: {error}") from error
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._reserved_ids and stop - start > 1:
                return self._encode_apart(text)
        return encoding.ids, encoding.offsets

    def _encode_apart(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Merges of a vocabulary may happen to spell a special token: cut the text inside each, so that they cannot."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        waiting = [(0, len(text))]
        while waiting:
            at, end = waiting.pop()
            encoding = self._plain.encode(text[at:end], add_special_tokens=False)
            cuts = [
                at + start + 1
                for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
                if token_id in self._reserved_ids and stop - start > 1
            ]
            if not cuts:
                ids += encoding.ids
                offsets += [(start + at, stop + at) for start, stop in encoding.offsets]
            # a cut may let other merges happen in what is left, so every part is looked at again, the first one first
            waiting += reversed(list(pairwise([at, *cuts, end]))) if cuts else []
        return ids, offsets

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokenise adjacent plain texts as the one text they form, and say which part each token belongs to.

        A token that straddles two parts belongs to the later one, which is where its last character is.

        Returns:
            ids, and for each the index of its part.
        """
        ids, offsets = self.encode_plain("".join(parts))
        starts, position = [], 0
        for part in parts:
            starts.append(position)
            position += len(part)
        return ids, [bisect_right(starts, max(start, stop - 1)) - 1 for start, stop in offsets]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; the inverse of both encodings except for U+2581, which the family uses as its space.

        Bytes that are no UTF-8 become U+FFFD, and only those. (`tokenizers` gives up a whole run of byte tokens for one
        that is wrong, newlines among them, so what it shows of an answer may change with the next token; it does so
        where special tokens are skipped.)
        """
        text = self._markup.decode(list(ids), skip_special_tokens=skip_special)
        if "\N{REPLACEMENT CHARACTER}" not in text or skip_special:
            return text
        return b"".join(self.token_bytes[i] or b"" for i in ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """What each id writes in the middle of a text, as UTF-8; one byte for `<0x0A>`. None: no token has this id."""
        before = self._markup.encode("a", add_special_tokens=False).ids
        texts = self._markup.decode_batch([[*before, i] for i in range(self.vocab_size)], skip_special_tokens=False)
        start = len(self._markup.decode(before))
        names = [self.token(i) for i in range(self.vocab_size)]
        single = [name and _BYTE_TOKEN.fullmatch(name) for name in names]
        return tuple(
            None if name is None else bytes([int(byte[1], 16)]) if byte else text[start:].encode()
            for name, byte, text in zip(names, single, texts, strict=True)
        )


_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
"""How a vocabulary spells the bytes it falls back to."""


def _is_markup(content: str) -> bool:
    """An added token that only our own text may produce: everything but single characters such as digits."""
    return len(content) > 1 and content.startswith("<") and content.endswith(">")


def _all_markup_special(raw: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with every markup token marked special, so that `encode_special_tokens` covers them all.

    Released tokenizers mark tokens such as <think> as ordinary added tokens, which would still match inside user text.
    """
    tokens = [token | {"special": token["special"] or _is_markup(token["content"])} for token in raw["added_tokens"]]
    return raw | {"added_tokens": tokens}


# ------------------------------------------------------------------------------------------------- the tiny tokenizer


def tiny_tokenizer_folder() -> Path:
    """The tokenizer that ships for tiny models: 2048 tokens, every special string of the family."""
    return Path(__file__).parent / "assets" / "tiny_tokenizer"


def load_tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer_folder())


def tiny_tokenizer_ids() -> dict[str, int]:
    """What the `ErnieConfig` of a model that uses the tiny tokenizer must say: vocab_size and the six media ids."""
    tokenizer = load_tiny_tokenizer()
    return {"vocab_size": tokenizer.vocab_size, **tokenizer.media_token_ids()}
