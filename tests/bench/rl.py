"""A rollout with its update against TRL's GRPOTrainer:  python -m tests.bench.rl [--model dense,moe] [--rounds 3]

The same random weights and the same prompts, vocabulary 103,424, float32, plain AdamW, groups of 8 attempts of 128 new
tokens each at temperature 1, one update for each rollout, no KL term. Both sides run in processes of their own and take
turns: what is compared is the time of asking, judging and learning, and the process's peak over what it held before.

    trl     GRPOTrainer with transformers' generate, its log-probabilities recomputed from padded rows
    ours    LocalEngine (groups share their prompt), rows in which attempts share their prompt, GSPO + IcePop

Neither side's reward takes any time. TRL's attempts and ours differ (random numbers do), so losses are not compared
here; that they are equal on equal attempts is tests/parity/test_rl_trl.py's business.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.bench.dpo import VOCABULARY, Turns, transformers_model

NEW, ATTEMPTS = 128, 8
WARM_UP = 1
PARTS = ("generate", "reward and encode", "update")


class Setting(NamedTuple):
    side: str
    model: str
    folder: str
    prompts: int
    """Of a rollout."""
    tokens: int
    """Of a prompt."""
    rounds: int
    batch: int
    """TRL's per_device_train_batch_size, in attempts."""


def prompts_of(setting: Setting) -> list[list[int]]:
    draw = random.Random(1)
    count = setting.prompts * (WARM_UP + setting.rounds)
    return [[draw.randrange(16, VOCABULARY) for _ in range(setting.tokens)] for _ in range(count)]


def run_theirs(setting: Setting, turns: Turns) -> None:
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    names = {f"t{number}": number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(names, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2", padding_side="left"
    )

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turns.end()
            turns.tell(0.0)

    def reward(completions, **kwargs):
        return [float(int(text.split()[0][1:]) % 2) for text in completions]

    kinds = dict(moe=transformers.Ernie4_5_MoeForCausalLM, dense=transformers.Ernie4_5ForCausalLM)
    model = kinds[setting.model].from_pretrained(setting.folder, dtype=torch.float32, attn_implementation="sdpa")
    if setting.model == "moe":
        model.set_experts_implementation("grouped_mm")
    data = Dataset.from_list([{"prompt": " ".join(f"t{i}" for i in ids)} for ids in prompts_of(setting)])
    attempts = setting.prompts * ATTEMPTS
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            shuffle_dataset=False,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=attempts // setting.batch,
            num_generations=ATTEMPTS,
            max_completion_length=NEW,
            max_steps=WARM_UP + setting.rounds,
            temperature=1.0,
            beta=0.0,
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
            router_aux_loss_coef=0.0,
            gradient_checkpointing=False,
            learning_rate=1e-5,
            weight_decay=0.0,
        )
        trainer = GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(Callback())
        trainer.train()


def run_ours(setting: Setting, turns: Turns) -> None:
    from accelerate import Accelerator

    from data.pack import pack
    from ernie_model.checkpoint import load_model
    from ernie_model.inference.agent import Episode, Status
    from ernie_model.inference.engine import EngineSettings
    from ernie_model.inference.request import Completion, Prompt, SamplingParams
    from ernie_model.tokenizer import load_tiny_tokenizer
    from train.config import OptimConfig
    from train.loop import train_step
    from train.memory import keep_freed_memory
    from train.objectives import policy_gradient
    from train.objectives.policy_record import PolicyRecord
    from train.optim import build_optimizer
    from train.parallel.updates import Plain
    from train.policy import Policy
    from train.reinforcement.advantage import advantages
    from train.reinforcement.engines import LocalEngine
    from train.reinforcement.examples import encode_group, with_advantages
    from train.reinforcement.mismatch import Mismatch
    from train.rl_config import MismatchConfig, RLObjectiveConfig

    keep_freed_memory()
    accelerator = Accelerator(cpu=True)
    model = load_model(Path(setting.folder), dtype=torch.float32)
    policy = Policy(model)
    engine = LocalEngine(model, load_tiny_tokenizer(), EngineSettings(cache_gib=0.25, max_running=64))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-5, weight_decay=0.0))
    updates = Plain(policy.train(), optimizer, accelerator)
    config, attempts = RLObjectiveConfig(), setting.prompts * ATTEMPTS
    objective = policy_gradient.build(config, attempts_per_update=attempts)
    mismatch = Mismatch(MismatchConfig(), config, model.config, accelerator)
    beside = [PolicyRecord(config, accelerator, attempts_per_update=attempts), mismatch]
    every = prompts_of(setting)

    def episode(prompt: list[int], completion: Completion) -> Episode:
        made = Episode([], [], [], num_prompt_tokens=len(prompt), status=Status.ANSWERED)
        made.append(prompt)
        made.append(completion.token_ids, completion=completion)
        return made

    with asyncio.Runner() as runner:
        for number in range(WARM_UP + setting.rounds):
            prompts = every[number * setting.prompts : (number + 1) * setting.prompts]
            turns.begin()
            laps = [time.process_time()]
            engine.begin(number)
            # Nobody has names for most of these ids, and this is no run that would mind.
            vocabulary = engine.generates.engine._entry.vocabulary
            vocabulary.banned_ids = ()

            async def ask(prompt: list[int], seed: int) -> Completion:
                params = SamplingParams(max_new_tokens=NEW, seed=seed, ignore_end=True)
                return await engine.generates.generate(Prompt(tuple(prompt)), params)

            asked = [
                ask(prompt, ATTEMPTS * (number * setting.prompts + place) + attempt)
                for place, prompt in enumerate(prompts)
                for attempt in range(ATTEMPTS)
            ]
            completions = runner.run(engine.together(asked))
            engine.end()
            laps.append(time.process_time())
            worth = [float(one.token_ids[0] % 2) for one in completions]
            examples = []
            for place, prompt in enumerate(prompts):
                group = slice(place * ATTEMPTS, (place + 1) * ATTEMPTS)
                (values,) = advantages([worth[group]], config)
                episodes = [episode(prompt, one) for one in completions[group]]
                encoded = encode_group(
                    episodes, [True] * ATTEMPTS, model.config, id="", dataset="", max_tokens=4096, max_patches=None
                )
                examples += [with_advantages(example, [values[i] for i in held]) for example, held in encoded]
            rows = pack(examples, max_tokens=4096)
            laps.append(time.process_time())
            metrics = train_step(updates, objective, rows, accelerator=accelerator, max_grad_norm=1.0, beside=beside)
            laps.append(time.process_time())
            turns.end()
            parts = dict(zip(PARTS, (b - a for a, b in zip(laps, laps[1:], strict=False)), strict=True))
            turns.done |= dict(parts=parts)
            assert metrics["mismatch_max"] < 1e-3, metrics
            turns.tell(metrics["loss"])


class Child:
    def __init__(self, setting: Setting):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.rl", "--child", json.dumps(setting._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            self.log.seek(0)
            raise RuntimeError(f"a side ended early:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def round(self, *, last: bool) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        told = self.read()
        if not last:
            self.read()
        return told


def compare(setting: Setting) -> None:
    rounds = WARM_UP + setting.rounds
    children = [Child(setting._replace(side=side)) for side in ("trl", "ours")]
    try:
        told = [[child.round(last=number == rounds - 1) for child in children] for number in range(rounds)]
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    theirs, ours = zip(*told, strict=True)
    attempts = setting.prompts * ATTEMPTS
    slow, fast = (statistics.median(one["cpu"] for one in side[WARM_UP:]) for side in (theirs, ours))
    times = statistics.median(a["cpu"] / b["cpu"] for a, b in told[WARM_UP:])
    step, own = (max(one["peak"] for one in side) - side[0]["held"] for side in (theirs, ours))
    whole, own_whole = (max(one["peak"] for one in side) for side in (theirs, ours))
    parts = {name: statistics.median(one["parts"][name] for one in ours[WARM_UP:]) for name in PARTS}
    split = ", ".join(f"{name} {seconds / fast:.0%}" for name, seconds in parts.items())
    print(
        f"| {setting.model}, prompts of {setting.tokens} | {attempts / slow:.3f} | {attempts / fast:.3f} "
        f"| **{times:.2f}** | {step:,.0f} | {own:,.0f} | **{own / step:.2f}** | {own_whole / whole:.2f} | {split} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense,moe")
    parser.add_argument("--prompts", type=int, default=4, help="of a rollout, 8 attempts each")
    parser.add_argument("--tokens", default="256", help="of a prompt; several by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="attempts that TRL learns from at once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        setting = Setting(**json.loads(args.child))
        (run_ours if setting.side == "ours" else run_theirs)(setting, Turns())
        return
    print("| | TRL attempts/s | ours | ratio | TRL MiB of a step | ours | ratio | whole process | ours in parts |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for model in args.model.split(","):
        with tempfile.TemporaryDirectory() as folder:
            transformers_model(model).save_pretrained(folder)
            for tokens in map(int, args.tokens.split(",")):
                compare(Setting("", model, folder, args.prompts, tokens, args.rounds, args.batch))


if __name__ == "__main__":
    main()
