"""What fewer bits cost and save:

    python -m tests.bench.quantize --sizes                      GiB of a released model, from its configuration alone
    python -m tests.bench.quantize --speed                      one layer's experts of the 28B model, one token and more
    python -m tests.bench.quantize --checkpoint runs/digits     size, tokens/s, accuracy of a trained model

Right is the share of held-out conversations in which every token of the right answer is the most likely one; loss is
per token of the answers; KL is that of the next token's distribution from the one with 16 bits, a mean over all tokens.
All in bfloat16. Scales are those without calibration, and those with it (`--calibration`). One process, one thread.
Tokens/s are of answers that the engine writes to 8 prompts with pictures at once.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import yaml  # noqa: E402

from data.encode import Example, encode  # noqa: E402
from ernie_model.config import ErnieConfig  # noqa: E402
from ernie_model.context import Packed  # noqa: E402
from ernie_model.inference.engine import Engine, EngineSettings  # noqa: E402
from ernie_model.inference.quantize import (  # noqa: E402
    QUANTISABLE,
    QuantisedExperts,
    Quantization,
    Scheme,
    stored_bytes,
)
from ernie_model.inference.request import MediaItem, Prompt, SamplingParams  # noqa: E402
from ernie_model.model import ErnieModel  # noqa: E402
from ernie_model.moe import Experts  # noqa: E402
from ernie_model.parts import Part  # noqa: E402
from train.config import Precision  # noqa: E402
from train.inference_config import Bits, QuantizeConfig, Weights  # noqa: E402
from train.served import open_model  # noqa: E402

GIB = 2**30
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
CHOICES: dict[str, dict[str, str]] = {
    "16 bits": {},
    "experts int8": {"text_experts": "int8", "vision_experts": "int8"},
    "experts int4": {"text_experts": "int4", "vision_experts": "int4"},
    "experts int2": {"text_experts": "int2", "vision_experts": "int2"},
    "all int8": {part.value: "int8" for part in QUANTISABLE},
    "all int4": {part.value: "int4" for part in QUANTISABLE},
    "all int2": {part.value: "int2" for part in QUANTISABLE},
    "experts int4, the rest int8": {
        part.value: "int4" if part in (Part.TEXT_EXPERTS, Part.VISION_EXPERTS) else "int8" for part in QUANTISABLE
    },
}


def architecture(name: str) -> ErnieConfig:
    """Of configs/model/NAME.yaml."""
    return ErnieConfig.from_json(yaml.safe_load((MODELS / f"{name}.yaml").read_text())["config"])


def gib(config: ErnieConfig, parts: dict[str, str], group: int = 128) -> float:
    settings = Quantization({Part(part): Scheme(bits) for part, bits in parts.items()}, group)
    return sum(stored_bytes(config, settings).values()) / GIB


def show_sizes(name: str, group: int) -> None:
    config = architecture(name)
    print(f"{name}, groups of {group}; routers float32, norms and what is not named 16 bits")
    for label, parts in CHOICES.items():
        print(f"  {label:<28} {gib(config, parts, group):7.2f} GiB")


# --------------------------------------------------------------------------------------------------------------- speed


def show_speed(rounds: int) -> None:
    """Milliseconds of 16 experts of 2560 x 1536 on rows that lie evenly on 6 of them (one token visits 6)."""
    torch.manual_seed(0)
    experts = Experts(16, 2560, 1536).to(torch.bfloat16).requires_grad_(False)
    for tensor in (experts.gate_up_EFD, experts.down_EDF):
        tensor.normal_(std=0.02)
    kinds: dict[str, torch.nn.Module] = {"bfloat16": experts}
    for scheme in Scheme:
        made = QuantisedExperts(experts, scheme, 128)
        made.put("gate_up", experts.gate_up_EFD, None, search=False)
        made.put("down", experts.down_EDF, None, search=False)
        made.pack_for_kernel()
        kinds[scheme.value] = made
    print("tokens  " + "  ".join(f"{kind:>9}" for kind in kinds) + "   ms for the experts of one layer")
    for tokens in (1, 8, 64):
        counts = torch.zeros(16, dtype=torch.int64)
        counts[:6] = tokens
        x_UD = torch.randn(6 * tokens, 2560, dtype=torch.bfloat16)
        found = []
        for module in kinds.values():
            times = []
            with torch.inference_mode():
                for _ in range(rounds + 1):
                    start = time.process_time()
                    module(x_UD, counts)
                    times.append(time.process_time() - start)
            found.append(sorted(times[1:])[rounds // 2] * 1e3)
        print(f"{tokens:>6}  " + "  ".join(f"{value:>9.2f}" for value in found))


# ------------------------------------------------------------------------------------------------------ a trained model


def examples(task: str, processor) -> list[Example]:
    from data.dataset import open_task

    heldout = open_task(task, task).heldout
    assert heldout is not None
    return [encode(heldout[index], processor) for index in range(len(heldout))]


@torch.no_grad()
def logprobs(model: ErnieModel, one: Example) -> torch.Tensor:
    out = model(one.token_T, one.position_3T, Packed([one.num_tokens]), patch_PX=one.patch_PX, grids=one.grids)
    return model.logits(out.hidden_TD).float().log_softmax(-1)


def quality(model: ErnieModel, heldout: list[Example], reference: list[torch.Tensor]) -> tuple[float, float, float]:
    """Share of conversations with every token right, loss per token of the answers, KL from the reference.

    Args:
        reference: of the first conversations.
    """
    right, loss, count, divergence = 0, 0.0, 0, []
    for index, one in enumerate(heldout):
        logprob_TV, learned = logprobs(model, one), one.weight_T != 0
        target = one.target_T[learned]
        right += bool((logprob_TV[learned].argmax(-1) == target).all())
        loss -= logprob_TV[learned].gather(1, target[:, None]).sum().item()
        count += len(target)
        if index < len(reference):
            true_TV = reference[index]
            divergence.append((true_TV.exp() * (true_TV - logprob_TV)).sum(-1))
    return right / len(heldout), loss / count, torch.cat(divergence).mean().item()


def tokens_per_second(model: ErnieModel, processor, heldout: list[Example]) -> float:
    answers, length = 8, 32
    prompts = []
    for one in heldout[:answers]:
        first = int(one.weight_T.nonzero()[0]) + 1
        assert one.patch_PX is not None
        prompts.append(Prompt(tuple(one.token_T[:first].tolist()), (MediaItem(one.grids[0], one.patch_PX),)))
    engine = Engine(model, processor.tokenizer, EngineSettings(cache_gib=0.1))
    params = SamplingParams(max_new_tokens=length, temperature=0, ignore_end=True)
    engine.generate(prompts, params)
    start = time.process_time()
    done = engine.generate(prompts, params)
    return sum(len(one.token_ids) for one in done) / (time.process_time() - start)


def show_model(checkpoint: str, task: str, calibration: str | None, group: int) -> None:
    heldout: list[Example] = []
    reference: list[torch.Tensor] = []
    columns = f" {'right':>7} {'loss':>7} {'KL':>8}"
    print(f"{'':<28} {'MB':>6} {'tokens/s':>9}{columns}" + (f"   calibrated:{columns}" if calibration else ""))
    for label, parts in CHOICES.items():
        row = ""
        for chosen in (None, calibration) if calibration and parts else (None,):
            settings = QuantizeConfig(
                **{part: Bits(bits) for part, bits in parts.items()}, group=group, calibration=chosen
            )
            served = open_model(Weights(checkpoint=checkpoint, quantize=settings, precision=Precision.bf16, cpu=True))
            heldout = heldout or examples(task, served.processor)
            reference = reference or [logprobs(served.model, one) for one in heldout[:100]]
            right, loss, divergence = quality(served.model, heldout, reference)
            numbers = f" {right:>7.1%} {loss:>7.4f} {divergence:>8.5f}"
            if chosen is None:
                size = sum(tensor.nbytes for tensor in served.model.state_dict().values()) / 1e6
                speed = tokens_per_second(served.model, served.processor, heldout)
                row = f"{label:<28} {size:>6.2f} {speed:>9.0f}{numbers}"
            else:
                row += f"              {numbers}"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--checkpoint", help="a folder of weights, or a run folder")
    parser.add_argument("--model", default="ernie_4_5_vl_28b_a3b", help="of --sizes: a file of configs/model/")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--calibration", help="a task or a file, as quantize.calibration")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.sizes:
        show_sizes(options.model, options.group)
    if options.speed:
        show_speed(options.rounds)
    if options.checkpoint:
        show_model(options.checkpoint, options.task, options.calibration, options.group)


if __name__ == "__main__":
    main()
