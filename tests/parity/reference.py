"""The reference side of the parity tests: random transformers models, padded batches, and ours loaded from their files.

Every model goes through `save_pretrained` and our `load_model`, so parity covers the checkpoint path as well.

transformers computes norms, router, softmax and rotary angles in float32 whatever the dtype of the model. `in_float64`
lifts those casts for the length of a block, which gives a true float64 reference: with rounding out of the way,
agreement to 1e-10 says that the two programs compute the same function.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
import transformers.models.ernie4_5.modeling_ernie4_5 as dense_code
import transformers.models.ernie4_5_moe.modeling_ernie4_5_moe as moe_code
import transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe as vl_code
from torch import Tensor

from ernie_model.checkpoint import load_model
from ernie_model.config import PositionAfterVideo
from ernie_model.context import Packed
from ernie_model.hub import module_pieces
from ernie_model.model import ErnieModel
from ernie_model.rope import Grid, position_ids

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCAB, PAD, BOS, EOS = 160, 0, 1, 2
IMAGE_START, IMAGE_END, IMAGE, VIDEO_START, VIDEO_END, VIDEO = 150, 151, 152, 153, 154, 155
TEXT_IDS = (3, 140)

MODELS = {
    "ernie4_5": (transformers.Ernie4_5Config, transformers.Ernie4_5ForCausalLM, dense_code),
    "ernie4_5_moe": (transformers.Ernie4_5_MoeConfig, transformers.Ernie4_5_MoeForCausalLM, moe_code),
    "ernie4_5_vl_moe": (
        transformers.Ernie4_5_VLMoeConfig,
        transformers.Ernie4_5_VLMoeForConditionalGeneration,
        vl_code,
    ),
}

Row = tuple[int | Grid, ...]
"""One conversation: numbers of text tokens, and grids (frames, rows, columns) of images (1 frame) and videos."""


@dataclass(frozen=True)
class Shape:
    """A model and the conversations that it is compared on."""

    name: str
    model_type: str
    config: dict[str, Any]
    rows: tuple[Row, ...]


def _text(**changes: Any) -> dict[str, Any]:
    """The fields that all three text configurations share; small, but nothing is equal by accident."""
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    return fields | changes


def _moe(**changes: Any) -> dict[str, Any]:
    fields = dict(
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_intermediate_size=48,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
        moe_layer_interval=1,
    )
    return _text(**fields) | changes


def _vl(*, mrope_section: Sequence[int] = (3, 3, 2), depth: int = 2, **changes: Any) -> dict[str, Any]:
    text = _text(
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_intermediate_size=[48, 16],
        mlp_layer_types=["dense", "sparse", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0, "mrope_section": list(mrope_section)},
    )
    text |= changes
    return dict(
        text_config=text,
        vision_config=dict(depth=depth, hidden_size=32, intermediate_size=96, num_heads=2),
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_token_id=VIDEO,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


TEXT_ROWS: tuple[Row, ...] = ((13,), (5,), (9,))
MIXED_ROWS: tuple[Row, ...] = ((5, (1, 4, 6), 3, (4, 4, 4), 6), (8,), (4, (1, 8, 4), 7))

SHAPES = (
    Shape("dense, head width 24 (not 64/4), tied", "ernie4_5", _text(head_dim=24), TEXT_ROWS),
    Shape(
        "dense, 6 query / 3 key heads, biases, untied head",
        "ernie4_5",
        _text(num_attention_heads=6, num_key_value_heads=3, head_dim=16, use_bias=True, tie_word_embeddings=False),
        TEXT_ROWS,
    ),
    Shape("text MoE, top 2 of 8, 2 shared, tied", "ernie4_5_moe", _moe(), TEXT_ROWS),
    Shape(
        "text MoE, top 6 of 12, no shared, 5/1 heads, every 2nd layer, untied",
        "ernie4_5_moe",
        _moe(
            hidden_size=80,
            num_attention_heads=5,
            num_key_value_heads=1,
            moe_num_experts=12,
            moe_k=6,
            moe_num_shared_experts=0,
            moe_layer_interval=2,
            num_hidden_layers=4,
            tie_word_embeddings=False,
        ),
        TEXT_ROWS,
    ),
    Shape("VL, image + video + text-only rows, tied", "ernie4_5_vl_moe", _vl(), MIXED_ROWS),
    Shape(
        "VL, several images, 6/3 heads, top 1, no shared, untied",
        "ernie4_5_vl_moe",
        _vl(
            hidden_size=96,
            num_attention_heads=6,
            num_key_value_heads=3,
            moe_k=1,
            moe_num_shared_experts=0,
            tie_word_embeddings=False,
        ),
        ((3, (1, 4, 4), 2, (1, 2, 6), 4, (1, 6, 2), 5), ((1, 6, 6), 6)),
    ),
    Shape(
        "VL, long clips (transformers' position rule), top 6, 5/1 heads, 3 shared, all sparse",
        "ernie4_5_vl_moe",
        _vl(
            hidden_size=80,
            num_attention_heads=5,
            num_key_value_heads=1,
            moe_k=6,
            moe_num_shared_experts=3,
            mlp_layer_types=["sparse"] * 3,
        ),
        ((3, (12, 4, 4), 8), ((8, 2, 4), 2, (1, 4, 4), 6)),
    ),
    Shape("VL, text only, 3 sections of unlike size", "ernie4_5_vl_moe", _vl(mrope_section=(2, 2, 4)), TEXT_ROWS),
)

MOE_SHAPE, VL_SHAPE, CLIP_SHAPE = SHAPES[2], SHAPES[4], SHAPES[6]


# ------------------------------------------------------------------------------------------------------------- models


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, transformers' casts to float32 are casts to float64."""

    class Torch:
        def __getattr__(self, name: str):
            return torch.float64 if name in ("float", "float32") else getattr(torch, name)

    with contextlib.ExitStack() as stack:
        for code in (dense_code, moe_code, vl_code):
            stack.enter_context(mock.patch.object(code, "torch", Torch()))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def make_sensitive(model: torch.nn.Module, seed: int) -> None:
    """Random values everywhere: with zero biases and weights of size 0.02, half of all mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "e_score_correction_bias" in name:
                p.copy_(0.05 * noise)
            elif p.ndim == 1:
                p.add_(0.1 * noise)
            elif "gate.weight" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(0.1 * noise)


def make_reference(shape: Shape, *, attention: str = "eager", experts: str = "eager", seed: int = 0) -> Any:
    """A random float32 transformers model."""
    config_class, model_class, _ = MODELS[shape.model_type]
    config = config_class(**shape.config)
    config._attn_implementation = attention
    model = model_class(config).eval()
    if shape.model_type != "ernie4_5":
        model.set_experts_implementation(experts)
    make_sensitive(model, seed + 1)
    return model


def reference_in_float64(model: Any) -> Any:
    """The same model with every computation in float64; call it inside `in_float64()` only."""
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert {b.dtype for b in again.buffers()} <= {torch.float64}
    return again


def read_reference(shape: Shape, folder: Path, *, attention: str, experts: str) -> Any:
    """The saved model as bfloat16, with a choice of kernels."""
    _, model_class, _ = MODELS[shape.model_type]
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
    if shape.model_type != "ernie4_5":
        model.set_experts_implementation(experts)
    return model.eval()


def load_ours(
    reference: Any, folder: Path, *, dtype: torch.dtype = torch.float32, rule: PositionAfterVideo | None = None
) -> ErnieModel:
    """Our model with the reference's weights, by way of a checkpoint on disk."""
    if not (folder / "config.json").exists():
        reference.save_pretrained(folder)
    return load_model(folder, dtype=dtype, position_after_video=rule).eval()


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Conversation:
    token: list[int]
    grids: tuple[Grid, ...] = ()
    patches: tuple[Tensor, ...] = field(default=())
    """float32, one (P, X) tensor per grid."""


def make_conversations(rows: Sequence[Row], seed: int) -> list[Conversation]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in rows:
        token, grids, patches = [BOS], [], []
        for item in row:
            if isinstance(item, int):
                token += torch.randint(*TEXT_IDS, (item,), generator=generator).tolist()
                continue
            frames, height, width = item
            if frames == 1:
                token += [IMAGE_START, *[IMAGE] * (height * width // 4), IMAGE_END]
            else:
                token += [VIDEO_START, *[VIDEO] * (frames * height * width // 8), VIDEO_END]
            grids.append(item)
            patches.append(torch.randn(math.prod(item), 588, generator=generator))
        made.append(Conversation(token + [EOS], tuple(grids), tuple(patches)))
    return made


def padded_batch(conversations: Sequence[Conversation], dtype: torch.dtype, *, is_vl: bool) -> dict[str, Tensor]:
    """What transformers takes: rows padded on the right, images and videos in two separate lists."""
    length = max(len(c.token) for c in conversations)
    ids = torch.tensor([c.token + [PAD] * (length - len(c.token)) for c in conversations])
    mask = torch.tensor([[1] * len(c.token) + [0] * (length - len(c.token)) for c in conversations])
    labels = torch.stack([_pad(target(c), length) for c in conversations])
    # Our targets are already shifted; transformers shifts its labels itself.
    labels = F.pad(labels[:, :-1], (1, 0), value=-100)
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    if not is_vl:
        return batch
    kind = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    pool = kind.clone()
    pool[(ids == IMAGE_START) | (ids == IMAGE_END)] = 1
    pool[(ids == VIDEO_START) | (ids == VIDEO_END)] = 2
    batch |= dict(mm_token_type_ids=kind, moe_mm_token_type_ids=pool)
    media = [(g, p.to(dtype)) for c in conversations for g, p in zip(c.grids, c.patches, strict=True)]
    images, videos = [m for m in media if m[0][0] == 1], [m for m in media if m[0][0] > 1]
    if images:
        batch |= dict(
            pixel_values=torch.cat([p for _, p in images]), image_grid_thw=torch.tensor([g for g, _ in images])
        )
    if videos:
        batch |= dict(
            pixel_values_videos=torch.cat([p for _, p in videos]), video_grid_thw=torch.tensor([g for g, _ in videos])
        )
    return batch


def _pad(target_T: Tensor, length: int) -> Tensor:
    return F.pad(target_T, (0, length - target_T.shape[0]), value=-100)


def target(conversation: Conversation) -> Tensor:
    """The next token, where it is text; -100 elsewhere."""
    following = torch.tensor([*conversation.token[1:], -100])
    return torch.where((following < TEXT_IDS[1]) & (following != BOS), following, -100)


class Result(NamedTuple):
    logits: Tensor
    """(T, V), of all real tokens, row after row."""
    loss: Tensor
    grads: dict[str, Tensor]
    """Under transformers' module names."""


def run_reference(model: Any, conversations: Sequence[Conversation], *, grads: bool = True) -> Result:
    dtype = model.get_input_embeddings().weight.dtype
    batch = padded_batch(conversations, dtype, is_vl=model.config.model_type == "ernie4_5_vl_moe")
    model.zero_grad()
    with torch.set_grad_enabled(grads):
        out = model(**batch)
    if grads:
        out.loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return Result(out.logits[batch["attention_mask"].bool()].detach(), out.loss.detach(), found if grads else {})


def pack(conversations: Sequence[Conversation], model: ErnieModel) -> dict[str, Any]:
    """Our inputs: the conversations end to end in one row."""
    tokens = [torch.tensor(c.token) for c in conversations]
    positions = [position_ids(t, c.grids, model.config) for t, c in zip(tokens, conversations, strict=True)]
    patches = [p for c in conversations for p in c.patches]
    return dict(
        token_T=torch.cat(tokens),
        position_3T=torch.cat(positions, dim=1),
        context=Packed([len(c.token) for c in conversations]),
        patch_PX=torch.cat(patches).to(model.embed_tokens.weight.dtype) if patches else None,
        grids=tuple(g for c in conversations for g in c.grids),
    )


def run_ours(model: ErnieModel, conversations: Sequence[Conversation], *, grads: bool = True) -> Result:
    """Ours on the conversations packed into one row."""
    model.zero_grad()
    with torch.set_grad_enabled(grads):
        hidden_TD = model(**pack(conversations, model)).hidden_TD
        logit_TV = F.linear(hidden_TD, model.head_VD)
        target_T = torch.cat([target(c) for c in conversations])
        wide = logit_TV if logit_TV.dtype == torch.float64 else logit_TV.float()
        loss = F.cross_entropy(wide, target_T, ignore_index=-100)
    if grads:
        loss.backward()
    return Result(logit_TV.detach(), loss.detach(), named_like_reference(model) if grads else {})


def named_like_reference(model: ErnieModel) -> dict[str, Tensor]:
    """Our gradients under transformers' module names and in its shapes."""
    parameters = dict(model.named_parameters())
    found = {}
    for piece in module_pieces(model.config):
        if (parameter := parameters.get(piece.ours)) is None:  # the correction bias, a buffer
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert not piece.index and not piece.transpose and piece.row is None
        found[piece.stored] = grad.clone()
    return found


def attend_eagerly(self: Packed, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
    """`Packed.attend` as transformers' "eager" kernel rounds: scores and probabilities in the activations' dtype."""
    outputs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q_TNH, k_TGH, v_TGH)), strict=True):
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        score = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if self.causal:
            score = score + torch.full_like(score[0], torch.finfo(score.dtype).min).triu(1)
        outputs.append((score.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs)


# ------------------------------------------------------------------------------------------------------------- errors


def logit_error(ours: Result, reference: Result) -> float:
    """max |difference| / max |reference|."""
    return ((ours.logits - reference.logits).abs().max() / reference.logits.abs().max()).item()


def loss_error(ours: Result, reference: Result) -> float:
    return ((ours.loss - reference.loss).abs() / reference.loss.abs()).item()


def grad_error(ours: Result, reference: Result) -> tuple[float, str]:
    """The worst |difference| / |reference| (Euclidean norms) over all parameters, and which one it is.

    A gradient that is zero in exact arithmetic is noise in both programs: that of a router with K = 1, whose single
    weight is p / p, and that of a key bias, which moves all scores of a query alike. So a tensor's own norm counts
    only down to a thousandth of the largest gradient in the model, in every element.
    """
    largest = max(g.abs().max().item() for g in reference.grads.values())
    trained = {n: g for n, g in reference.grads.items() if "e_score_correction_bias" not in n}
    assert trained.keys() == ours.grads.keys(), trained.keys() ^ ours.grads.keys()
    errors = {
        name: (ours.grads[name] - grad).norm().item() / max(grad.norm().item(), 1e-3 * largest * grad.numel() ** 0.5)
        for name, grad in trained.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
