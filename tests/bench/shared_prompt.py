"""What sharing a prompt saves: time and memory of a pair's forward and backward pass, by three ways to lay it out:

    python -m tests.bench.shared_prompt [--precision bf16] [--prompts 512 1024] [--answers 64]

    shared    [prompt | answer | answer]           one row, the prompt once (data/batch.py)
    packed    [prompt answer | prompt answer]      one row, two conversations
    apart     [prompt answer]  [prompt answer]     two rows, one forward pass each and one backward pass of both

The "small" model, a sigmoid loss of the pair, everything trained. With an image, about half of the prompt's tokens are
its. Time is CPU seconds of one thread, the ways in turn. Memory is what torch's allocator held at most over the
weights and their gradients. Both are told of "shared", and of the others as ratios to it; the most that can be saved in
tokens stands beside them.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.encode import Example
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.rope import position_ids
from tests.bench.memory import allocated_mib
from tests.bench.models import FIRST_WORD, SIZES, random_segments, transformers_config
from tests.bench.timing import in_turn, ratio
from tests.train import small
from train.memory import keep_freed_memory
from train.policy import Policy, on_device

PROMPTS, ANSWERS = (512, 1024, 2048, 4096), (64, 512)
SIZE = SIZES["small"]


def conversations(prompt: int, answer: int, image_side: int, config: ErnieConfig) -> tuple[Example, Example]:
    """Two that begin with the same `prompt` tokens and end in other words, which are learned."""
    (one,) = random_segments(SIZE, [prompt + answer], image_side=image_side)
    weight_T = torch.zeros(prompt + answer)
    weight_T[prompt - 1 : -1] = 1
    others_T = torch.randint(FIRST_WORD, SIZE.vocabulary, (answer,), generator=torch.Generator().manual_seed(2))

    def example(token_T: Tensor) -> Example:
        return Example(
            id="pair",
            token_T=token_T,
            target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]),
            weight_T=weight_T,
            position_3T=position_ids(token_T, one["grids"], config),
            grids=one["grids"],
            patch_PX=one["patch_PX"],
        )

    return example(one["token_T"]), example(torch.cat([one["token_T"][:prompt], others_T]))


def ways(policy: Policy, prompt: int, pair: tuple[Example, Example]) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of the pair; gradients are left where they are."""
    shared = small.branches(*pair, prompt=prompt, items=len(pair[0].grids))
    layouts = {"shared": [small.row(shared)], "packed": [small.row(*pair)], "apart": [small.row(one) for one in pair]}

    def step(layout: str) -> None:
        sums: list[Tensor] = []
        for row in layouts[layout]:
            batch, row_R = on_device(row, torch.device("cpu"))
            logprob_T = policy(batch, row_R).logprob_T
            sums += [part.sum() for part in logprob_T.split(batch.lengths)]
        *_, chosen, rejected = sums  # the shared prompt's sum is 0
        (-F.logsigmoid(0.1 * (chosen - rejected))).backward()

    return {layout: lambda layout=layout: step(layout) for layout in layouts}


def image_side(prompt: int) -> int:
    """Patches of a side, of which 2 x 2 are a token."""
    return int((2 * prompt) ** 0.5) // 2 * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="tokens")
    parser.add_argument("--answers", type=int, nargs="+", default=ANSWERS, help="tokens of each answer")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    config = ErnieConfig.from_json(transformers_config(SIZE).to_dict())
    model = ErnieModel(config)
    model.compute_dtype = torch.bfloat16 if args.precision == "bf16" else None
    policy = Policy(model).train()
    print(f"{'':7s}{'prompt':>7s}{'answers':>9s}{'tokens':>8s}{'time, s':>11s}{'packed':>8s}{'apart':>7s}", end="")
    print(f"{'MiB':>9s}{'packed':>8s}{'apart':>7s}   {args.precision}")
    for kind in ("text", "image"):
        for prompt in args.prompts:
            for answer in args.answers:
                side = image_side(prompt) if kind == "image" else 0
                pair = conversations(prompt, answer, side, config)
                steps = ways(policy, prompt, pair)
                runs = [lambda number, step=step: step() for step in steps.values()]
                mib = {layout: allocated_mib(step) for layout, step in steps.items()}
                shared, packed, apart = in_turn(runs, args.rounds, warm_up=0)  # measuring memory was the warm-up
                tokens = 2 * (prompt + answer) / (prompt + 2 * answer + 1)
                print(
                    f"{kind:7s}{prompt:7,d}{answer:9,d}{tokens:8.2f}"
                    f"{shared.median:11.2f}{ratio(packed, shared):8.2f}{ratio(apart, shared):7.2f}"
                    f"{mib['shared']:9,.0f}{mib['packed'] / mib['shared']:8.2f}{mib['apart'] / mib['shared']:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
