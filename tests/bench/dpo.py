"""A DPO update against TRL's DPOTrainer:  python -m tests.bench.dpo [--model moe,dense] [--reference copy,cache]

The same random weights and the same pairs in the same order, vocabulary 103,424, float32, plain sigmoid loss, AdamW;
prompts of 64 to 1,024 tokens and answers of 32 to 256, lengths drawn evenly on a logarithmic scale. Both sides run in
processes of their own and make an update in turn: what is compared is the time of each update, and the process's peak
over what it held before the first (weights, of the reference too). Every update's loss must agree with TRL's.

    copy       a second model computes the reference's log-probabilities in every update
    cache      they were computed before (TRL: precompute_ref_log_probs)
    adapters   LoRA on attention; the reference is the model with adapters off

    trl           as it runs on a CPU: its head scores every position, of prompts and padding too
    trl, answers  its head scores answers alone, as it does where it has Triton, on GPUs

TRL's padding-free mode is disabled in this version, and its Liger kernels need a GPU. Activations are kept on both
sides; `--recompute` has both compute them again (their gradient_checkpointing, which is their default).
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from tests.bench.memory import reset_peak, status_mib
from tests.bench.timing import Timing, ratio
from tests.parity.dpo_peer import TokenPair, pair_example, random_pairs, trainer

VOCABULARY = 103_424
LEARNING_RATE = 1e-4
WARM_UP = 1
KEYS = ("model", "reference", "threads")
HEADER = (
    "| | threads | against | TRL pairs/s | ours | ratio | TRL MiB of updates | ours | ratio | whole process "
    "| losses differ by |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
TRL, ANSWERS, OURS = "trl", "trl, answers", "ours"


def transformers_model(kind: str) -> Any:
    """Random weights. The body takes 25 MFLOP a token forward, the head 53; in the released 0.3B it is 500 and 210."""
    import transformers

    shared: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        max_position_embeddings=4096,
    )  # fmt: skip
    transformers.set_seed(0)
    if kind == "dense":
        return transformers.Ernie4_5ForCausalLM(transformers.Ernie4_5Config(**shared))
    moe: dict[str, Any] = dict(moe_intermediate_size=192, moe_k=4, moe_num_experts=16, moe_num_shared_experts=2)
    return transformers.Ernie4_5_MoeForCausalLM(transformers.Ernie4_5_MoeConfig(**shared, **moe))


class Setting(NamedTuple):
    """One side's run, as the child gets it."""

    side: str
    model: str
    folder: str
    """Of the weights."""
    adapter: str
    """Folder of peft's."""
    reference: str
    threads: int
    pairs: int
    """Per update."""
    updates: int
    batch: int
    """TRL's per_device_train_batch_size."""
    max_tokens: int
    """Of one of our rows."""
    experts: str
    """TRL's back-end."""
    recompute: bool


def pairs_of(setting: Setting) -> list[TokenPair]:
    draw = random.Random(1)

    def log_uniform(least: int, most: int) -> int:
        return round(math.exp(draw.uniform(math.log(least), math.log(most))))

    count = setting.pairs * setting.updates
    prompts = [log_uniform(64, 1024) for _ in range(count)]
    answers = [(log_uniform(32, 256), log_uniform(32, 256)) for _ in range(count)]
    return random_pairs(prompts, answers, range(16, VOCABULARY), seed=2)


# ----------------------------------------------------------------------------------------------------- in the children


class Turns:
    """This process's updates: each waits for its turn, is timed, and is told to the parent."""

    def __init__(self):
        # Only we write to the real standard output.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.held = 0.0

    def begin(self) -> None:
        if not self.held:
            self.held = status_mib("VmRSS")
            reset_peak()
        print(json.dumps({}), file=self.out, flush=True)  # ready
        sys.stdin.readline()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        seconds = dict(wall=time.perf_counter() - self.wall, cpu=time.process_time() - self.cpu)
        self.done = seconds | dict(held=self.held, peak=status_mib("VmHWM"))

    def tell(self, loss: float) -> None:
        print(json.dumps(self.done | dict(loss=loss)), file=self.out, flush=True)


def adapter_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def run_theirs(setting: Setting, turns: Turns) -> None:
    import transformers

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turns.end()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                turns.tell(logs["loss"])

    kinds = dict(moe=transformers.Ernie4_5_MoeForCausalLM, dense=transformers.Ernie4_5ForCausalLM)
    model = kinds[setting.model].from_pretrained(setting.folder, dtype=torch.float32, attn_implementation="sdpa")
    adapters = setting.reference == "adapters"
    answers = mock.patch("trl.trainer.utils._use_triton", lambda device: True)
    with tempfile.TemporaryDirectory() as folder, answers if setting.side == ANSWERS else contextlib.nullcontext():
        parts = trainer(
            model,
            pairs_of(setting),
            Path(folder),
            peft_config=adapter_config() if adapters else None,
            callbacks=[Callback()],
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=setting.pairs // setting.batch,
            max_steps=setting.updates,
            learning_rate=LEARNING_RATE,
            gradient_checkpointing=setting.recompute,
            precompute_ref_log_probs=setting.reference == "cache",
        )
        if adapters:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(parts.model, load_peft_weights(setting.adapter))
        if setting.model == "moe":
            for each in filter(None, (model, parts.ref_model)):
                each.set_experts_implementation(setting.experts)
        parts.train()


def run_ours(setting: Setting, turns: Turns) -> None:
    from accelerate import Accelerator

    from data.pack import pack
    from ernie_model.checkpoint import load_model
    from ernie_model.recompute import recompute
    from train.config import OptimConfig, PeftConfig, PeftKind
    from train.dpo_config import DPOObjectiveConfig, ReferenceConfig
    from train.loop import Beside, train_step
    from train.memory import keep_freed_memory
    from train.objectives.dpo import build
    from train.optim import build_optimizer
    from train.parallel.layout import Layout
    from train.parallel.updates import Plain
    from train.policy import Policy
    from train.reference import AdaptersOff, Copy
    from train.weights import trained_weights

    keep_freed_memory()
    accelerator, layout = Accelerator(cpu=True), Layout()
    model = load_model(Path(setting.folder), dtype=torch.float32)
    peft = PeftConfig()
    if setting.reference == "adapters":
        peft = PeftConfig(kind=PeftKind.lora, targets=["attention"], init_from=setting.adapter)
    weights = trained_weights(model, peft, seed=0, base=setting.folder)
    if setting.recompute:
        model.run_layer = recompute
    policy = Policy(model)
    examples = [pair_example(pair, str(number)) for number, pair in enumerate(pairs_of(setting))]
    updates = [examples[at : at + setting.pairs] for at in range(0, len(examples), setting.pairs)]
    rows = [pack(update, max_tokens=setting.max_tokens) for update in updates]
    beside = Beside()
    if setting.reference == "adapters":
        beside = AdaptersOff(policy, weights, accelerator.device, layout)
    else:
        copy = load_model(Path(setting.folder), dtype=torch.float32).requires_grad_(False).eval()
        beside = Copy(Policy(copy), model, ReferenceConfig(), {}, accelerator.device, layout)
        if setting.reference == "cache":
            with torch.no_grad():
                rows = [beside.streams(row) for row in rows]
            beside = Beside()
            del copy
    optimizer = build_optimizer(model, OptimConfig(lr=LEARNING_RATE, weight_decay=0.0))
    parts = Plain(policy.train(), optimizer, accelerator)
    for update in rows:
        turns.begin()
        metrics = train_step(
            parts,
            build(DPOObjectiveConfig()),
            update,
            accelerator=accelerator,
            max_grad_norm=1.0,
            beside=[beside],
        )
        turns.end()
        turns.tell(metrics["loss"])


# ------------------------------------------------------------------------------------------------------- in the parent


class Update(NamedTuple):
    wall: float
    cpu: float
    held: float
    """MiB before the first update."""
    peak: float
    loss: float


class Child:
    """One side's process."""

    def __init__(self, setting: Setting):
        self.updates: list[Update] = []
        environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.dpo", "--child", json.dumps(setting._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.read()

    def read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"a side ended early:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def update(self, *, last: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.updates.append(Update(**self.read()))
        if not last:
            self.read()  # ready for the next


def in_turn(settings: Sequence[Setting]) -> list[list[Update]]:
    children = [Child(setting) for setting in settings]
    try:
        for number in range(settings[0].updates):
            for child in children:
                child.update(last=number == settings[0].updates - 1)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    return [child.updates for child in children]


def check_losses(ours: list[Update], theirs: list[Update], side: str) -> float:
    """The largest difference of an update's losses."""
    worst = max(abs(a.loss - b.loss) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-4, f"losses differ: ours {[u.loss for u in ours]}, {side} {[u.loss for u in theirs]}"
    return worst


def write_models(kind: str, folder: Path) -> None:
    model = transformers_model(kind)
    model.save_pretrained(folder / "model")
    from peft import get_peft_model

    get_peft_model(model, adapter_config()).save_pretrained(folder / "adapter")


def describe(setting: Setting) -> str:
    """Tokens of an update on either side, those that only warm up left out."""
    pairs = pairs_of(setting)[WARM_UP * setting.pairs :]
    updates = setting.updates - WARM_UP
    padded = 0
    for at in range(0, len(pairs), setting.batch):
        batch = pairs[at : at + setting.batch]
        longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in batch)
        padded += 2 * len(batch) * longest
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    prompts = sum(len(pair.prompt) for pair in pairs)
    ours = prompts + answers + len(pairs)
    return (
        f"An update: {setting.pairs} pairs, prompts of {prompts / len(pairs):.0f} tokens and answers of "
        f"{answers / len(pairs) / 2:.0f} on average. Through the layers: {padded / updates:,.0f} tokens in TRL, "
        f"{setting.batch} pairs at once, {ours / updates:,.0f} in ours; targets to score: {answers / updates:,.0f}."
    )


def compare(setting: Setting, sides: Sequence[str]) -> None:
    """Print a row of the table for each of their sides."""
    found = dict(zip(sides, in_turn([setting._replace(side=side) for side in sides]), strict=True))
    ours = found.pop(OURS)

    def timing(updates: list[Update]) -> Timing:
        return Timing([u.cpu if setting.threads == 1 else u.wall for u in updates[WARM_UP:]])

    for side, theirs in found.items():
        worst = check_losses(ours, theirs, side)
        slow, fast = timing(theirs), timing(ours)
        step, our_step = (max(u.peak for u in updates) - updates[0].held for updates in (theirs, ours))
        whole, our_whole = (max(u.peak for u in updates) for updates in (theirs, ours))
        print(
            f"| {setting.model}, {setting.reference} | {setting.threads} | {side} "
            f"| {setting.pairs / slow.median:.3f} | {setting.pairs / fast.median:.3f} | **{ratio(slow, fast):.2f}** "
            f"| {step:,.0f} | {our_step:,.0f} | **{our_step / step:.2f}** | {our_whole / whole:.2f} | {worst:.0e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moe,dense")
    parser.add_argument("--reference", default="copy,cache,adapters")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--against", default=f"{TRL};{ANSWERS}", help="separated by ;")
    parser.add_argument("--pairs", type=int, default=4, help="per update")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="pairs that TRL takes at once")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of one of our rows")
    parser.add_argument("--experts", default="grouped_mm", help="transformers' back-end")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        setting = Setting(**json.loads(args.child))
        torch.set_num_threads(setting.threads)
        (run_ours if setting.side == OURS else run_theirs)(setting, Turns())
        return
    first = True
    for model, reference, threads in itertools.product(*(getattr(args, key).split(",") for key in KEYS)):
        with tempfile.TemporaryDirectory() as folder:
            write_models(model, Path(folder))
            setting = Setting(
                side="",
                model=model,
                folder=f"{folder}/model",
                adapter=f"{folder}/adapter",
                reference=reference,
                threads=int(threads),
                pairs=args.pairs,
                updates=WARM_UP + args.rounds,
                batch=args.batch,
                max_tokens=args.max_tokens,
                experts=args.experts,
                recompute=args.recompute,
            )
            if first:
                print(f"{describe(setting)}\n\n{HEADER}", flush=True)
            first = False
            compare(setting, [OURS, *args.against.split(";")])


if __name__ == "__main__":
    main()
