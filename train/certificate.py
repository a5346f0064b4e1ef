"""certificate.json: what an exported folder computes, and that others compute the same from it.

    values that were exported ──► ErnieModel ──► logits, experts ──┐
    the written files ──► load_model ──► logits ───────────────────┼── compared case by case ──► certificate.json
    the written files ──► transformers (a process) ──► logits ─────┤
    the written files ──► vLLM (a process, another Python) ────────┘   log-probabilities of prompts, greedy answers

Ours are computed from the values in memory and never from the files, so that a file which lost something on its way
does not agree with itself. Cases are made by code: texts, pictures, a clip; small, the same for every model with the
same tokenizer.

What rounding explains is measured, not assumed: the logits are computed again with every product and every layer's
output multiplied by 1 ± epsilon of the dtype, at random (`rounding`). Two right programs round at other places; they
may differ by FACTOR times what that changed. A difference beyond it is not dtype's, and the certificate is refused.

Shape letters:  T tokens   V vocabulary   L sparse layers   K experts per token   P patches   X numbers in a patch
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vllm_plugin
from ernie_model.checkpoint import load_model
from ernie_model.config import ErnieConfig
from ernie_model.context import Packed
from ernie_model.inference.quantize import QuantisedModule
from ernie_model.layers import Linear
from ernie_model.model import ErnieModel, Layer
from ernie_model.moe import Experts
from ernie_model.processor import Encoded, Processor, token_types
from ernie_model.tokenizer import TOKENIZER_FILE
from ernie_model.video import Frames
from train.config import UserError
from train.vllm_layout import PLACES

FACTOR = 8.0
"""Of the largest difference; of the mean one, which a single near-tie of routing does not stretch, half of it."""
FRAME_LIMITS = (4 * 28 * 28, 64 * 28 * 28)
"""Pixels of one frame of the clip: smaller than what models are shown, so that the clip is a prompt like the others."""
ORACLES = Path(__file__).parent / "oracles"
TIMEOUT_S = 3600


class CertificateError(UserError):
    """An export whose files do not compute what was exported."""


class Case(NamedTuple):
    """One prompt."""

    name: str
    encoded: Encoded
    pictures: tuple[Image.Image, ...] = ()
    is_video: bool = False
    """The pictures are the frames of one clip."""


class Computed(NamedTuple):
    """What one program made of a case."""

    logit_TV: Tensor  # float32
    expert_LTK: Tensor | None


class Comparison(NamedTuple):
    """Two programs on one case."""

    case: str
    max_difference: float
    """Of logits, or of log-probabilities where a program shows no logits."""
    mean_difference: float
    bound: float
    """Of the largest difference that rounding explains."""
    mean_bound: float
    greedy_agreement: float
    """Share of places with the same most likely token."""
    routing_agreement: float | None
    """Share of (token, layer) with the same experts."""
    problem: str | None = None

    @property
    def holds(self) -> bool:
        return self.problem is None and self.max_difference <= self.bound and self.mean_difference <= self.mean_bound


# --------------------------------------------------------------------------------------------------------------- cases


def cases(processor: Processor) -> list[Case]:
    """Texts and, for a vision-language model, pictures and a clip, of sizes that the family's limits leave alone."""
    config = processor.config

    def ask(name: str, *parts: Any, pictures: tuple[Image.Image, ...] = (), **options: Any) -> Case:
        messages = [{"role": "user", "content": [p if isinstance(p, dict) else _text(p) for p in parts]}]
        messages = options.pop("before", []) + messages
        encoded = small.encode(messages, add_generation_prompt=True, **options)
        return Case(name, encoded, pictures, any(isinstance(p, dict) and p["type"] == "video" for p in parts))

    low, high = FRAME_LIMITS
    video = dataclasses.replace(processor.video, min_pixels=low, max_pixels=high, draw_timestamps=False)
    small = Processor(processor.tokenizer, config, processor.image, video, processor.chat)
    before = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Name a number."},
        {"role": "assistant", "content": "Seven."},
    ]
    out = [
        ask(
            "text",
            "The quick brown fox jumps over the lazy dog. 0123456789 ~ naïve, 你好, ошибка.\n\tdef f(x): return x",
        ),
        ask("conversation", "And another one?", before=before),
    ]
    if config.vision is None:
        return out
    first, second = picture(112, 84, 1), picture(56, 140, 2)
    clip = [picture(112, 84, seed) for seed in range(3, 7)]
    shown = [{"type": "image", "image": one} for one in (first, second)]
    frames = {"type": "video", "video": Frames(clip, seconds=[0.0, 0.5, 1.0, 1.5])}
    return [
        *out,
        ask("image", shown[0], "What is this?", pictures=(first,)),
        ask("two images", "First", shown[0], "and then", shown[1], "which is larger?", pictures=(first, second)),
        ask("video", frames, "What happens?", pictures=tuple(clip)),
    ]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coloured shapes at random places."""
    random = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (width, height), tuple(torch.randint(0, 256, (3,), generator=random).tolist()))
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse) * 3:
        across = sorted(torch.randint(0, width, (2,), generator=random).tolist())
        down = sorted(torch.randint(0, height, (2,), generator=random).tolist())
        fill = tuple(torch.randint(0, 256, (3,), generator=random).tolist())
        shape((across[0], down[0], across[1], down[1]), fill=fill)
    return image


# ---------------------------------------------------------------------------------------------------------------- ours


@torch.no_grad()
def compute(model: ErnieModel, case: Case, answer: Tensor | None = None) -> Computed:
    """Args:
    answer: ids that follow the prompt.
    """
    encoded = case.encoded
    ids, positions = encoded.token_T, encoded.position_3T
    if answer is not None:  # plain text: its positions go on one by one, on all three axes
        ids = torch.cat([ids, answer])
        following = positions[:, -1:] + torch.arange(1, len(answer) + 1)
        positions = torch.cat([positions, following], dim=1)
    out = model(
        ids,
        positions,
        Packed([len(ids)]),
        patch_PX=encoded.patch_PX,
        grids=encoded.grids,
        stats=False,
        experts=bool(model.config.sparse_layers),
    )
    return Computed(model.logits(out.hidden_TD).float(), out.expert_LTK)


class Bound(NamedTuple):
    largest: float
    mean: float

    def times(self, factor: float) -> "Bound":
        return Bound(self.largest * factor, self.mean * factor)


SAME = Bound(0.0, 0.0)


def rounding(model: ErnieModel, case: Case, exact: Computed, seeds: int = 2) -> Bound:
    """The change of the logits when everything is rounded once more, at random."""
    dtype = model.norm.weight.dtype
    epsilon = torch.finfo(dtype).eps
    random = torch.Generator()

    def shake(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (shake(module, inputs, output[0]), *output[1:])
        sign = torch.randint(0, 2, output.shape, generator=random).to(output.dtype) * 2 - 1
        return output * (1 + epsilon * sign)

    kinds = (Linear, Experts, Layer, QuantisedModule)
    hooks = [module.register_forward_hook(shake) for module in model.modules() if isinstance(module, kinds)]
    try:
        changes = []
        for seed in range(seeds):
            random.manual_seed(seed)
            changes.append((compute(model, case).logit_TV - exact.logit_TV).abs())
    finally:
        for hook in hooks:
            hook.remove()
    return Bound(max(one.max().item() for one in changes), max(one.mean().item() for one in changes))


def bound_of(model: ErnieModel, case: Case, exact: Computed) -> Bound:
    """How far the logits of another right program may be away."""
    changed, size = rounding(model, case, exact), exact.logit_TV.abs()
    epsilon = torch.finfo(model.norm.weight.dtype).eps
    return Bound(
        FACTOR * max(changed.largest, epsilon * size.max().item()),
        FACTOR / 2 * max(changed.mean, epsilon * size.mean().item()),
    )


def compare(case: str, ours: Computed, theirs: Computed, bound: Bound) -> Comparison:
    if ours.logit_TV.shape != theirs.logit_TV.shape:
        return refused(case, bound, f"logits are {tuple(theirs.logit_TV.shape)} and ours {tuple(ours.logit_TV.shape)}")
    difference = (ours.logit_TV - theirs.logit_TV).abs()
    if not difference.isfinite().all():
        return refused(case, bound, "logits are not finite")
    return Comparison(
        case,
        difference.max().item(),
        difference.mean().item(),
        bound.largest,
        bound.mean,
        (ours.logit_TV.argmax(-1) == theirs.logit_TV.argmax(-1)).float().mean().item(),
        routing_agreement(ours.expert_LTK, theirs.expert_LTK),
    )


def refused(case: str, bound: Bound, problem: str) -> Comparison:
    return Comparison(case, float("inf"), float("inf"), bound.largest, bound.mean, 0.0, None, problem)


def routing_agreement(ours: Tensor | None, theirs: Tensor | None) -> float | None:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return (ours.sort(-1).values == theirs.sort(-1).values).all(-1).float().mean().item()


# -------------------------------------------------------------------------------------------------------------- others


class Verdict(NamedTuple):
    """One program on all cases."""

    program: str
    comparisons: list[Comparison]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return all(one.holds for one in self.comparisons)


class Certifier:
    """Computes ours once, and lets others be compared with it.

    Args:
        model: with the values that were exported, in the dtype that everyone computes in.
    """

    def __init__(self, model: ErnieModel, processor: Processor):
        self.model, self.processor = model, processor
        self.cases = cases(processor)
        self.ours = {case.name: compute(model, case) for case in self.cases}
        self.dtype = str(model.norm.weight.dtype).removeprefix("torch.")

    @cached_property
    def bounds(self) -> dict[str, Bound]:
        """For programs other than ours. Computed when the first of them is compared: it takes two passes a case."""
        return {case.name: bound_of(self.model, case, self.ours[case.name]) for case in self.cases}

    def files(self, folder: Path) -> Verdict:
        """Our own loader on the written files: the same numbers to the last bit."""
        read = load_model(folder, dtype=self.model.norm.weight.dtype).eval()
        return self.read_back("ernie-train", read)

    def read_back(self, program: str, model: ErnieModel) -> Verdict:
        return Verdict(program, [compare(c.name, self.ours[c.name], compute(model, c), SAME) for c in self.cases])

    def transformers(self, folder: Path) -> Verdict:
        """Raises CertificateError: the process failed."""
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out.safetensors"
            self.write_cases(Path(scratch), {})
            run("ask_transformers", sys.executable, [folder, scratch, out, self.dtype])
            found, program = load_file(out), metadata(out)["program"]
        compared = []
        for case in self.cases:
            theirs = Computed(found[f"{case.name}/logit_TV"], found.get(f"{case.name}/expert_LTK"))
            compared.append(compare(case.name, self.ours[case.name], theirs, self.bounds[case.name]))
        return Verdict(program, compared)

    def vllm(self, folder: Path, python: str) -> Verdict:
        """The folder in vLLM's layout. Log-probabilities are compared, of prompts and answers; a clip comes as frames.

        Raises CertificateError: the process failed.
        """
        places = place_ids(folder) if self.processor.config.vision is not None else {}
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out.safetensors"
            self.write_cases(Path(scratch), places)
            run("ask_vllm", python, [folder, scratch, out, self.dtype])
            found, said = load_file(out), metadata(out)
        notes = (f"fixes of vllm_plugin at work: {said['fixes'] or 'none'}",)
        return Verdict(said["program"], [self._compare_vllm(case, found) for case in self.cases], notes=notes)

    def _compare_vllm(self, case: Case, found: dict[str, Tensor]) -> Comparison:
        theirs = {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{case.name}/")}
        bound = self.bounds[case.name].times(2)  # a log-probability is a logit less a sum of logits
        if not torch.equal(theirs["token_T"], self._one_placeholder(case.encoded.token_T)):
            return refused(case.name, bound, "vLLM made another prompt of it")
        prompt = len(case.encoded.token_T)
        ours = compute(self.model, case, theirs["answer_T"])
        logprob_TV = ours.logit_TV.log_softmax(-1)
        following = torch.cat([theirs["token_T"][1:], theirs["answer_T"]])
        mine = logprob_TV[:-1].gather(1, following[:, None])[:, 0]
        theirs_T = torch.cat([theirs["logprob_T"][1:], theirs["answer_logprob_T"]])
        difference = (mine - theirs_T).abs()
        if not difference.isfinite().all():
            return refused(case.name, bound, "log-probabilities are not finite")
        likely_TV = logprob_TV[:-1].clone()
        likely_TV[prompt - 1 :, list(self.processor.config.vision_pool_token_ids)] = -torch.inf  # never written
        best_T = torch.cat([theirs["best_T"], theirs["answer_T"]])
        experts = None if ours.expert_LTK is None else ours.expert_LTK[:, :prompt]
        return Comparison(
            case.name,
            difference.max().item(),
            difference.mean().item(),
            bound.largest,
            bound.mean,
            (likely_TV.argmax(-1) == best_T).float().mean().item(),
            routing_agreement(experts, theirs.get("expert_LTK")),
        )

    def _one_placeholder(self, token_T: Tensor) -> Tensor:
        """vLLM, as Baidu's own files, has one for images and videos."""
        config = self.processor.config
        if config.vision is None:
            return token_T
        assert config.image_token_id is not None
        return torch.where(token_T == config.video_token_id, config.image_token_id, token_T)

    def write_cases(self, folder: Path, places: dict[str, int]) -> None:
        """What train/oracles/ reads.

        Args:
            places: the tokens that vLLM puts images and videos at.
        """
        config, listed = self.processor.config, []
        for case in self.cases:
            encoded, names = case.encoded, []
            tensors = {
                "token_T": encoded.token_T,
                "mm_T": token_types(encoded.token_T, config),
                "pool_T": token_types(encoded.token_T, config, brackets=True),
            }
            if encoded.patch_PX is not None:
                tensors |= {"patch_PX": encoded.patch_PX, "grid_N3": torch.tensor(encoded.grids)}
            save_file(tensors, folder / f"{case.name}.safetensors")
            for number, image in enumerate(case.pictures):
                names.append(f"{case.name}-{number}.png")
                image.save(folder / names[-1])
            listed.append({"name": case.name, "pictures": names, "is_video": case.is_video})
        said = dict(
            vision=config.vision is not None,
            num_experts=config.num_experts,
            # What stands for a picture or clip in the model's ids -> what does in a prompt for vLLM.
            places={str(getattr(config, f"{kind}_token_id")): place for kind, place in places.items()},
            frame_limits=FRAME_LIMITS,
            banned=list(config.vision_pool_token_ids),
            longest=max(len(case.encoded.token_T) for case in self.cases),
            cases=listed,
        )
        (folder / "cases.json").write_text(json.dumps(said))


def place_ids(folder: Path) -> dict[str, int]:
    """image, video -> the id of `<|image@placeholder|>`, `<|video@placeholder|>` in a folder in vLLM's layout."""
    added = json.loads((folder / TOKENIZER_FILE).read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    return {kind: ids[place] for kind, place in zip(("image", "video"), PLACES.values(), strict=True)}


def run(program: str, python: str, arguments: list[Any]) -> None:
    """One of train/oracles/ in a process of its own.

    It sees the plugin and nothing else of ours: where this suite is installed, torch lies beside it, and another Python
    has its own.

    Raises:
        CertificateError: it failed, or took longer than an hour.
    """
    command = [python, str(ORACLES / f"{program}.py"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as seen:
        plugin = Path(vllm_plugin.__file__).parent
        shutil.copytree(plugin, Path(seen) / plugin.name)
        environment = {**os.environ, "PYTHONPATH": seen, "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CertificateError(f"{program} could not be run by {python}: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise CertificateError(f"{program} failed under {python}:\n" + "\n".join(lines[-15:]))


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as reader:
        return reader.metadata()


def transformers_installed() -> bool:
    """A release whose classes know the family (5 and later), without importing it."""
    try:
        return find_spec("transformers") is not None and int(version("transformers").partition(".")[0]) >= 5
    except (PackageNotFoundError, ValueError):
        return False


# -------------------------------------------------------------------------------------------------------------- values


def model_of(config: ErnieConfig, read: Callable[[str, tuple], Tensor], dtype: torch.dtype) -> ErnieModel:
    """A model with these values, each rounded to the dtype that it has there."""
    with torch.device("meta"):
        model = ErnieModel(config)
    model.set_dtype(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(read(name, ()))
    return model.requires_grad_(False).eval()


def written(verdicts: list[Verdict], certifier: Certifier, more: dict[str, Any]) -> dict[str, Any]:
    """The certificate as JSON."""
    return more | {
        "computed_in": certifier.dtype,
        "bound": f"{FACTOR:g} x the change by one more rounding of every product and layer",
        "holds": all(verdict.holds for verdict in verdicts),
        "programs": [
            {
                "program": verdict.program,
                "holds": verdict.holds,
                "notes": list(verdict.notes),
                "cases": [_as_json(one) for one in verdict.comparisons],
            }
            for verdict in verdicts
        ],
        "ours": {
            case.name: {
                "tokens": len(case.encoded.token_T),
                "last_logits": {
                    str(token): round(value, 6)
                    for value, token in zip(
                        *(part.tolist() for part in certifier.ours[case.name].logit_TV[-1].topk(5)), strict=True
                    )
                },
            }
            for case in certifier.cases
        },
    }


def _as_json(one: Comparison) -> dict[str, Any]:
    values = one._asdict() | {"holds": one.holds}
    return {key: value if value != float("inf") else "infinite" for key, value in values.items() if value is not None}
