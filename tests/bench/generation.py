"""Writing answers against transformers:  python -m tests.bench.generation [--size small] [--quick]

The same random weights, prompts and numbers of new tokens; one process, one thread, float32, CPU seconds, in turn.
Greedy, without a terminator. Every round brings prompts that no cache has seen. transformers' `generate` runs with the
faster of its expert back-ends; its continuous batching takes no images. Answers of both sides are compared.

    text, image    prompts of one length and equally many new tokens
    mixed          prompts and answers of varied length: `generate` pads, and goes on until the longest answer is done
    decode         the same without their prompts: the time of 64 new tokens less that of one
    attempts       eight sampled answers to one prompt with an image: the engine computes the prompt once
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ernie_model.config import ErnieConfig
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.kv_cache import PagedCache
from ernie_model.inference.request import MediaItem, Prompt, SamplingParams
from ernie_model.inference.runner import Runner
from ernie_model.model import ErnieModel
from ernie_model.tokenizer import MEDIA_TOKENS
from tests.bench import models
from tests.bench.models import SIZES, Size, build_pair, random_segments
from tests.bench.timing import Timing, in_turn, ratio
from tests.plain_tokens import PlainTokens
from train.memory import keep_freed_memory

PAGE = 16
MEDIA_IDS = {name: getattr(models, field.removesuffix("_token_id").upper()) for field, name in MEDIA_TOKENS.items()}


@dataclass(frozen=True)
class Request:
    prompt: Prompt
    new: int


def requests_of(size: Size, lengths: Sequence[int], news: Sequence[int], seed: int, image_side: int) -> list[Request]:
    """Prompts of that many tokens; with `image_side`, each begins with an image of that many patches a side."""
    segments = random_segments(size, list(lengths), image_side=image_side, seed=1000 + seed)
    found = []
    for segment, new in zip(segments, news, strict=True):
        media = (MediaItem(segment["grids"][0], segment["patch_PX"]),) if image_side else ()
        found.append(Request(Prompt(tuple(segment["token_T"].tolist()), media), new))
    return found


def make_engine(model: ErnieModel, requests: Sequence[Request], **settings: Any) -> Engine:
    """With memory for all of these requests at once, and as many again."""
    pages = 2 * sum(-(-(len(r.prompt.token_ids) + r.new) // PAGE) for r in requests)
    gib = (pages + 0.5) * Runner.page_bytes(model.config, torch.float32, PAGE) / 2**30
    engine = EngineSettings(cache_gib=gib, page_tokens=PAGE, max_running=len(requests), **settings)
    return Engine(model, PlainTokens(model.config.vocab_size, MEDIA_IDS), engine)


def ours(engine: Engine, requests: Sequence[Request], **params: Any) -> list[tuple[int, ...]]:
    keep_freed_memory()
    greedy = dict(temperature=0.0, ignore_end=True) | params
    # Each with a seed of its own: attempts that are all alike would visit the same few experts.
    completions = engine.generate(
        [r.prompt for r in requests],
        [SamplingParams(max_new_tokens=r.new, seed=i, **greedy) for i, r in enumerate(requests)],
    )
    return [completion.token_ids for completion in completions]


def generate(theirs: Any, requests: Sequence[Request], *, attempts: int = 1) -> list[tuple[int, ...]]:
    """`generate` on all requests as one batch, padded on the left; the answers, each cut to its own length."""
    longest, new = max(len(r.prompt.token_ids) for r in requests), max(r.new for r in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        count = len(request.prompt.token_ids)
        ids[row, longest - count :], mask[row, longest - count :] = torch.tensor(request.prompt.token_ids), 1
    batch: dict[str, Any] = dict(input_ids=ids, attention_mask=mask)
    media = [item for request in requests for item in request.prompt.media]
    if media:
        image = ids == models.IMAGE
        batch |= dict(
            mm_token_type_ids=image.long(),
            moe_mm_token_type_ids=(image | (ids == models.IMAGE_START) | (ids == models.IMAGE_END)).long(),
            pixel_values=torch.cat([item.patch_PX for item in media]),
            image_grid_thw=torch.tensor([item.grid for item in media]),
        )
    sampling: dict[str, Any] = dict(do_sample=False)
    if attempts > 1:
        sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=attempts)
    with torch.no_grad():
        out = theirs.generate(
            **batch, **sampling, max_new_tokens=new, pad_token_id=0, eos_token_id=None,
            suppress_tokens=sorted(MEDIA_IDS.values()),
        )  # fmt: skip
    answers = out[:, longest:].tolist()
    return [tuple(answer[: requests[i // attempts].new]) for i, answer in enumerate(answers)]


def continuous(theirs: Any, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """transformers' continuous batching: each request with its own number of new tokens."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    most = max(r.new for r in requests)
    config = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_batch_tokens=2048, max_memory_percent=0.1)
    found: dict[str, tuple[int, ...]] = {}
    with theirs.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, warmup=False
    ) as manager:
        names = [manager.add_request(list(r.prompt.token_ids), max_new_tokens=r.new) for r in requests]
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                found[result.request_id] = tuple(result.generated_tokens)
            assert result is not None or manager.is_running(), "continuous batching stopped"
    return [found[name] for name in names]


class Table:
    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        if self.begun:
            return
        self.begun = True
        print("| requests | transformers | tokens/s | ours tokens/s | ratio | answers alike |")
        print("|---|---|---|---|---|---|", flush=True)

    def compare(
        self, name: str, tokens: float, runs: dict[str, Callable[[int], list[tuple[int, ...]]]], rounds: int
    ) -> None:
        """Time `runs`, of which the first is ours, and print a row for each of the others."""
        self.begin()
        kept: dict[str, list[list[tuple[int, ...]]]] = {label: [] for label in runs}

        def keeping(label: str, run: Callable[[int], list[tuple[int, ...]]]) -> Callable[[int], object]:
            return lambda number: kept[label].append(run(number))

        first, *others = in_turn([keeping(*item) for item in runs.items()], rounds, warm_up=1)
        for (label, answers), timing in zip(list(kept.items())[1:], others, strict=True):
            pairs = [
                (a, b)
                for ours, them in zip(kept[next(iter(kept))], answers, strict=True)
                for a, b in zip(ours, them, strict=True)
            ]
            assert all(len(a) == len(b) for a, b in pairs), "numbers of tokens differ"
            alike = f"{sum(a == b for a, b in pairs)} of {len(pairs)}" if "sampled" not in name else "sampled"
            self.row(name, label, tokens, timing, first, alike)

    @staticmethod
    def row(name: str, label: str, tokens: float, slow: Timing, fast: Timing, alike: str) -> None:
        per_second = f"{tokens / slow.median:,.0f} | {tokens / fast.median:,.0f}"
        print(f"| {name} | {label} | {per_second} | {ratio(slow, fast):.2f} | {alike} |", flush=True)


def faster_backend(theirs: Any, requests: Sequence[Request]) -> str:
    """Which expert back-end writes eight tokens sooner; it is set."""
    short = [Request(request.prompt, 8) for request in requests]
    seconds = {}
    for backend in ("grouped_mm", "eager"):
        theirs.set_experts_implementation(backend)
        seconds[backend] = min(in_turn([lambda _: generate(theirs, short)], 2, warm_up=1)[0].seconds)
    best = min(seconds, key=lambda backend: seconds[backend])
    theirs.set_experts_implementation(best)
    return best


def mixed(size: Size, count: int, seed: int) -> list[Request]:
    """Lognormal lengths, one set for all seeds: prompts around 150 tokens (32 to 768), answers around 40 (8 to 256)."""
    generator = torch.Generator().manual_seed(7)

    def drawn(middle: float, spread: float, least: int, most: int) -> list[int]:
        return (middle + spread * torch.randn(count, generator=generator)).exp().clamp(least, most).long().tolist()

    return requests_of(size, drawn(5.0, 0.9, 32, 768), drawn(3.7, 1.0, 8, 256), seed, 0)


def decode(size: Size, theirs: Any, model: ErnieModel, batches: Sequence[int], rounds: int) -> None:
    """Milliseconds of a step that writes one token of every answer."""
    new = 64
    print("\n| writing, without the prompts | `generate`, ms a step | ours | ratio |\n|---|---|---|---|")
    for kind, side in (("text", 0), ("image", 16)):
        for batch in batches:
            lengths = [128 + side**2 // 4 + 2 * bool(side)] * batch

            def drawn(number: int, new: int, lengths=lengths, side=side) -> list[Request]:
                return requests_of(size, lengths, [new] * len(lengths), number, side)

            engine = make_engine(model, drawn(0, new))
            faster_backend(theirs, drawn(0, 8)[:8])
            ours_long, ours_short, theirs_long, theirs_short = in_turn(
                [
                    lambda k, engine=engine, drawn=drawn: ours(engine, drawn(k, new)),
                    lambda k, engine=engine, drawn=drawn: ours(engine, drawn(100 + k, 1)),
                    lambda k, drawn=drawn: generate(theirs, drawn(k, new)),
                    lambda k, drawn=drawn: generate(theirs, drawn(k, 1)),
                ],
                rounds,
                warm_up=1,
            )
            step = (ours_long.median - ours_short.median) / (new - 1)
            their_step = (theirs_long.median - theirs_short.median) / (new - 1)
            print(
                f"| {kind}, {batch} | {1e3 * their_step:.1f} | {1e3 * step:.1f} | {their_step / step:.2f} |", flush=True
            )


def cache_memory(config: ErnieConfig) -> None:
    """Bytes that the process holds more once all pages are written; to be called before freed memory is kept."""
    pages = 8192
    formula = pages * Runner.page_bytes(config, torch.float32, PAGE)
    before = resident()
    cache = PagedCache(config, num_pages=pages, page_tokens=PAGE, dtype=torch.float32, device=torch.device("cpu"))
    cache.data.fill_(1.0)
    print(
        f"\nCache of {pages:,} pages: formula {formula / 2**20:.1f} MiB, measured {(resident() - before) / 2**20:.1f}."
    )


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="text,image,mixed,attempts,decode,memory")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--quick", action="store_true", help="one round of shorter answers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, rounds = SIZES[args.size], 1 if args.quick else args.rounds
    new = 16 if args.quick else 48
    theirs, model = build_pair(size)
    theirs.eval(), model.requires_grad_(False).eval()
    only, batches = args.only.split(","), [int(batch) for batch in args.batches.split(",")]
    if "memory" in only:
        cache_memory(model.config)
    table = Table()
    for kind, side in (("text", 0), ("image", 16)):
        for batch in batches if kind in only else ():
            lengths = [128 + side**2 // 4 + 2 * bool(side)] * batch

            def drawn(number: int, lengths=lengths, side=side) -> list[Request]:
                return requests_of(size, lengths, [new] * len(lengths), number, side)

            engine, backend = make_engine(model, drawn(0)), faster_backend(theirs, drawn(0)[:8])
            runs = {
                "ours": lambda number, engine=engine, drawn=drawn: ours(engine, drawn(number)),
                f"generate, {backend}": lambda number, drawn=drawn: generate(theirs, drawn(number)),
            }
            if kind == "text" and batch == 8:
                runs["continuous batching"] = lambda number, drawn=drawn: continuous(theirs, drawn(number))
            table.compare(f"{kind}, {batch} x ({lengths[0]} + {new})", batch * new, runs, rounds)
    if "mixed" in only:
        count = 8 if args.quick else 32
        drawn_mixed = [mixed(size, count, 50 + i) for i in range(rounds + 1)]
        engine, backend = make_engine(model, drawn_mixed[0]), faster_backend(theirs, drawn_mixed[0][:2])
        tokens = sum(r.new for r in drawn_mixed[0])
        runs = {
            "ours": lambda number: ours(engine, drawn_mixed[number]),
            f"generate, {backend}": lambda number: generate(theirs, drawn_mixed[number]),
            "continuous batching": lambda number: continuous(theirs, drawn_mixed[number]),
        }
        table.compare(f"mixed, {count} requests, {tokens:,} new tokens", tokens, runs, rounds)
    if "attempts" in only:
        side = 48  # 576 tokens of image

        def attempts(number: int) -> list[Request]:
            return requests_of(size, [1024], [32], number, side) * 8

        engine, apart = make_engine(model, attempts(0)), make_engine(model, attempts(0), share_prefixes=False)
        faster_backend(theirs, attempts(0)[:1])
        runs = {
            "ours": lambda number: ours(engine, attempts(number), temperature=1.0),
            "ours, nothing shared": lambda number: ours(apart, attempts(number), temperature=1.0),
            "generate, num_return_sequences=8": lambda number: generate(theirs, attempts(number)[:1], attempts=8),
        }
        table.compare("8 sampled answers to (1,024 + 32), image", 8 * 32, runs, rounds)
    if "decode" in only:
        decode(size, theirs, model, batches, rounds)


if __name__ == "__main__":
    main()
