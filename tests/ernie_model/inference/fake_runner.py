"""A runner whose logits are a hash of all that a request's pages hold, which proves that they hold what they should.

Every place of the cache remembers token, position, feature and the version of the weights. The logits of a token follow
from a chain of hashes over its request's places up to it, read from the pages; `expected` computes the same chain from
the tokens alone. A wrong page, position or feature, a stale page, or one that is read before it is written, changes
every logit behind it or raises.
"""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ernie_model.config import ErnieConfig
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import MediaItem, Prompt
from ernie_model.inference.runner import Row, Runner, StepOutput
from ernie_model.inference.sampling import Vocabulary
from ernie_model.rope import num_media_tokens, position_ids

Place = tuple[int, tuple[int, ...], bytes, int]
"""Token, position, feature and version."""


class FakeRunner:
    def __init__(self, config: ErnieConfig, num_pages: int, page_tokens: int):
        self.config, self.page_tokens = config, page_tokens
        self.places: list[list[Place | None]] = [[None] * page_tokens for _ in range(num_pages)]
        self.version = 0
        self.computed = 0
        """Tokens."""
        self.media = 0
        """Images and videos."""
        self.poison: int | None = None
        """A token that makes all logits behind it NaN."""
        self.bad_media: bytes | None = None
        """The digest of an image that raises."""
        self.fails = 0
        """So many steps raise."""
        self.steps: list[list[Row]] = []

    def weights_changed(self) -> None:
        self.version += 1

    def media_features(self, media: Sequence[MediaItem]) -> list[Tensor]:
        if any(item.digest == self.bad_media for item in media):
            raise RuntimeError("no picture")
        self.media += len(media)
        return [fake_features(item, self.version) for item in media]

    def run(self, rows: Sequence[Row]) -> StepOutput:
        if self.fails:
            self.fails -= 1
            raise MemoryError("no room")
        self.steps.append(list(rows))
        written: set[tuple[int, int]] = set()
        read: set[int] = set()
        new: list[tuple[int, int, Place]] = []
        logits, experts = [], []
        for row in rows:
            n, size = len(row.token_ids), self.page_tokens
            assert row.position_3T.shape == (3, n) and n > 0 and row.position_3T.dtype == torch.int64
            assert len(row.pages) * size >= row.start + n, "too few pages"
            self.computed += n
            places = self._read(row)
            read |= set(row.pages[: -(-row.start // size)])
            feature_MD = torch.cat(list(row.features)) if row.features else torch.zeros(0, 2)
            place_M = [i for i, token in enumerate(row.token_ids) if token in self.config.placeholder_token_ids]
            assert len(place_M) == len(feature_MD), "features do not fit placeholders"
            feature = dict(zip(place_M, feature_MD, strict=True))
            for i, token in enumerate(row.token_ids):
                pixel = feature[i].numpy().tobytes() if i in feature else b""
                place = (token, tuple(row.position_3T[:, i].tolist()), pixel, self.version)
                page, slot = row.pages[(row.start + i) // size], (row.start + i) % size
                assert (page, slot) not in written, "two rows write the same place"
                written.add((page, slot))
                new.append((page, slot, place))
                places.append(place)
            chain = hashes(places)
            for at in range(len(places) - row.num_logits, len(places)):
                logit_V = fake_logits(chain[at], self.config.vocab_size)
                if self.poison in [token for token, *_ in places[: at + 1]]:
                    logit_V[:] = torch.nan
                logits.append(logit_V)
            experts.append(fake_experts(chain[row.start :]) if row.experts else None)
        for page, slot, place in new:
            self.places[page][slot] = place
            own = sum(page in row.pages for row in rows)
            assert own == 1, "a page that others read is written"
        V = self.config.vocab_size
        return StepOutput(torch.stack(logits) if logits else torch.zeros(0, V), experts)

    def _read(self, row: Row) -> list[Place]:
        """As it was before the step: rows of one step do not see each other's tokens."""
        places = []
        for at in range(row.start):
            place = self.places[row.pages[at // self.page_tokens]][at % self.page_tokens]
            assert place is not None, "read before it is written"
            places.append(place)
        return places


def fake_features(item: MediaItem, version: int) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(item.digest + str((item.grid, version)).encode(), digest_size=7).digest())
    return torch.randn(num_media_tokens(item.grid), 2, generator=torch.Generator().manual_seed(seed))


def fake_logits(state: bytes, vocab_size: int) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(int.from_bytes(state))).random(vocab_size) * 8).float()


def fake_experts(chain: Sequence[bytes]) -> Tensor:
    """int16 (T, L = 1, K = 2)"""
    return torch.tensor([[[state[0] % 4, state[1] % 4]] for state in chain], dtype=torch.int16)


def hashes(places: Sequence[Place]) -> list[bytes]:
    """The state of every place: the hash of it and all before it."""
    state, chain = b"", []
    for place in places:
        state = hashlib.blake2b(state + repr(place).encode(), digest_size=8).digest()
        chain.append(state)
    return chain


def expected_chain(config: ErnieConfig, prompt: Prompt, answer: Sequence[int] = (), version: int = 0) -> list[bytes]:
    """By definition: positions of prompt and answer as one, features in order."""
    ids = [*prompt.token_ids, *answer]
    position_3T = position_ids(torch.tensor(ids), [item.grid for item in prompt.media], config)
    features = iter([row for item in prompt.media for row in fake_features(item, version)])
    return hashes(
        [
            (
                token,
                tuple(position_3T[:, i].tolist()),
                next(features).numpy().tobytes() if token in config.placeholder_token_ids else b"",
                version,
            )
            for i, token in enumerate(ids)
        ]
    )


def greedy_token(config: ErnieConfig, state: bytes, vocabulary: Vocabulary) -> int:
    logit_V = fake_logits(state, config.vocab_size)
    logit_V[list(vocabulary.banned_ids)] = -torch.inf
    return int(logit_V.argmax())


def make_engine(
    config: ErnieConfig, tokenizer, *, num_pages: int = 64, page_tokens: int = 4, clock=None, **settings
) -> tuple[Engine, FakeRunner]:
    """An engine with so many pages over a `FakeRunner`."""
    model = SimpleNamespace(config=config, activation_dtype=torch.float32)
    page_bytes = Runner.page_bytes(config, torch.float32, page_tokens)
    runner = FakeRunner(config, num_pages, page_tokens)
    engine = Engine(
        model,  # pyright: ignore[reportArgumentType]
        tokenizer,
        EngineSettings(cache_gib=(num_pages + 0.5) * page_bytes / 2**30, page_tokens=page_tokens, **settings),
        runner=runner,
        **({} if clock is None else {"clock": clock}),
    )
    return engine, runner
