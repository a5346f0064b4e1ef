"""TRL's DPOTrainer on pairs of token ids, and the same pairs as rows of ours.

TRL's preparation of data is left out: both sides get the same ids. Everything else of the trainer is as it is.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batch import Role
from data.encode import Example, shift

PAD, BOS, EOS = 0, 1, 2


class TokenPair(NamedTuple):
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def random_pairs(
    prompts: Sequence[int], answers: Sequence[tuple[int, int]], words: range, seed: int
) -> list[TokenPair]:
    """Prompts of that many tokens, and answers of (chosen, rejected) tokens that end in EOS."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(words.start, words.stop, (count,), generator=generator).tolist())

    return [
        TokenPair((BOS, *drawn(prompt - 1)), (*drawn(chosen - 1), EOS), (*drawn(rejected - 1), EOS))
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]


def pair_example(pair: TokenPair, name: str) -> Example:
    """The pair with its prompt once: [prompt without its last token | last token + chosen | last token + rejected]."""
    stem = torch.tensor(pair.prompt[:-1])
    branches = [torch.tensor((pair.prompt[-1], *answer)) for answer in (pair.chosen, pair.rejected)]
    positions = [torch.arange(len(stem))] + [len(stem) + torch.arange(len(branch)) for branch in branches]

    def learned(branch: Tensor) -> Tensor:
        return torch.cat([torch.ones(len(branch) - 1), torch.zeros(1)])

    return Example(
        id=name,
        token_T=torch.cat([stem, *branches]),
        target_T=torch.cat([shift(segment) for segment in (stem, *branches)]),
        weight_T=torch.cat([torch.zeros(len(stem)), *map(learned, branches)]),
        position_3T=torch.cat(positions).expand(3, -1).contiguous(),
        lengths=(len(stem), *map(len, branches)),
        stems=(-1, 0, 0),
        roles=(Role.PROMPT, Role.CHOSEN, Role.REJECTED),
    )


def tokenizer(vocabulary: int) -> Any:
    """Of words that mean nothing: the trainer wants one, for its id of padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {name: number for number, name in enumerate(("<pad>", "<s>", "</s>"))}
    names |= {f"w{number}": number for number in range(len(names), vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>",
    )  # fmt: skip


def trainer(
    model: Any,
    pairs: Sequence[TokenPair],
    folder: Path,
    *,
    ref_model: Any = None,
    peft_config: Any = None,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """A trl.DPOTrainer that sees the pairs in this order, and logs every update.

    Args:
        settings: of trl.DPOConfig. float32, all weights, the plain loss, and no balance loss of routers, which ours
            does not have in DPO either.
    """
    import datasets
    import trl

    class Ordered(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):  # it would apply a chat template
            return dataset

        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    logging.getLogger("trl").setLevel(logging.ERROR)
    datasets.utils.logging.disable_progress_bar()
    if hasattr(model.config, "output_router_logits"):
        settings = dict(router_aux_loss_coef=0.0) | settings
    fixed: dict[str, Any] = dict(
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        lr_scheduler_type="constant", warmup_steps=0, adam_beta2=0.95, weight_decay=0.0, max_length=None,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    rows = [dict(prompt_ids=list(p.prompt), chosen_ids=list(p.chosen), rejected_ids=list(p.rejected)) for p in pairs]
    return Ordered(
        model=model,
        ref_model=ref_model,
        args=trl.DPOConfig(str(folder), **fixed | settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(model.config.vocab_size),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
