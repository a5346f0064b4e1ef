"""A tokenizer for models whose vocabulary means nothing: token i is written as the number i."""

from collections.abc import Mapping

from ernie_model.tokenizer import Tokenizer


class PlainTokens(Tokenizer):
    """
    Args:
        special: string -> id of the special tokens that the engine asks for.
    """

    def __init__(self, vocab_size: int, special: Mapping[str, int]):
        self._written = tuple(f"{i} ".encode() for i in range(vocab_size))
        self._special = dict(special)

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._written

    @property
    def vocab_size(self) -> int:
        return len(self._written)

    def special_id(self, string: str) -> int | None:
        return self._special.get(string)
