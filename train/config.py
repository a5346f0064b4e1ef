"""Typed schemas for everything under configs/. YAML chooses values; this file owns names, types and rules.

train/compose.py makes them from the files and the command line; nothing below the entry points sees OmegaConf.
"""

import difflib
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.tasks import TASKS


class UserError(Exception):
    """Something only the user can put right. Printed as a short message, without a traceback; exit code 1."""


# OmegaConf reads an enumeration by the names of its members, so the names are what users write.


class Precision(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class PositionRule(Enum):
    """See ernie_model.config.PositionAfterVideo."""

    spatial = "spatial"
    last = "last"


class Recompute(Enum):
    none = "none"
    layers = "layers"
    layers_and_vision = "layers_and_vision"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class ObjectiveKind(Enum):
    sft = "sft"
    dpo = "dpo"
    rl = "rl"


class PeftKind(Enum):
    none = "none"
    lora = "lora"


class HeldIn(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class DataKind(Enum):
    task = "task"
    files = "files"


class TooLong(Enum):
    """See data.fit.TooLong."""

    quarantine = "quarantine"
    drop_turns = "drop_turns"
    shrink_images = "shrink_images"


class Mix(Enum):
    """See data.mixture.Mix."""

    sample = "sample"
    concat = "concat"


class Stop(Enum):
    """See data.mixture.Stop."""

    first = "first"
    last = "last"


class Modality(Enum):
    """See data.mixture.Modality."""

    text = "text"
    image = "image"
    video = "video"


MAX_SEED = 2**64 - 1


def check(rule: bool, message: str) -> None:
    if not rule:
        raise UserError(message)


def check_limit(key: str, limit: int | None) -> None:
    check(limit is None or limit >= 1, f"{key} is {limit}; it must be at least 1, or null for all.")


def check_seed(key: str, seed: int) -> None:
    check(0 <= seed <= MAX_SEED, f"{key} is {seed}; it must lie in 0..{MAX_SEED}.")


Entry = TypeVar("Entry")


def typed_entry(cls: type[Entry], where: str, settings: Any, *, of: str, example: str) -> Entry:
    """One entry of settings whose names the user chooses. OmegaConf cannot add typed ones from the command line.

    Raises:
        UserError: no dictionary, a key that there isn't, a value of another type.
    """
    check(isinstance(settings, dict), f"{where} is {settings}; it must be like {example}.")
    schema = OmegaConf.structured(cls)
    known = [str(key) for key in schema]
    for key in settings:
        check(key in known, f"{where}.{key} is not a setting of {of}{suggestion(str(key), known)}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(schema, settings))
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, cls)
    return typed


@dataclass
class ModelConfig:
    name: str = ""
    """Free text, for people."""
    checkpoint: str | None = None
    """Local folder or hub id of the weights to train; null starts from random weights described by `config`."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    processor: str | None = None
    """Folder or hub id of the tokenizer and the image settings. null: the same as `checkpoint`. tiny: the small
    tokenizer that ships with the suite."""
    image_pixels: list[int] | None = None
    """Smallest and largest area of a picture after resizing, [3136, 100000]; a token covers 784 pixels. null keeps what
    the processor says. What is trained with is saved with the weights."""
    video_pixels: list[int] | None = None
    """The same of a video's frame."""
    config: dict[str, Any] | None = None
    """The architecture as a config.json dictionary; null reads it from `checkpoint`."""
    precision: Precision = Precision.bf16
    """What the matrix products are computed in. Master weights, router, optimizer and loss are always float32."""
    recompute: Recompute = Recompute.none
    """What is computed again in the backward pass, not kept: none; the layers of the language model; layers_and_vision,
    the blocks of the vision tower too. A third more time for that part, far less memory."""
    offload_activations: bool = False
    """The input of every recomputed layer waits in host memory, not on the GPU. Needs recompute."""
    position_after_video: PositionRule | None = None
    """Where text continues after a long video; null keeps what the checkpoint says."""

    def __post_init__(self):
        check(
            self.checkpoint is not None or self.config is not None,
            "model.checkpoint and model.config are both null; give a checkpoint to train, or a config to start from "
            "random weights.",
        )
        check(
            self.checkpoint is not None or self.processor is not None,
            "model.processor is null and there is no model.checkpoint to take it from; set model.processor=tiny or a "
            "folder with a tokenizer.",
        )
        for name in ("image_pixels", "video_pixels"):
            area = getattr(self, name)
            check(
                area is None or (len(area) == 2 and 784 <= area[1] and 0 < area[0] <= area[1]),
                f"model.{name} is {area}; it must be two numbers of pixels, [smallest, largest], the largest at least "
                "784 (28 x 28, one token), or null.",
            )
        check(
            not self.offload_activations or self.recompute is not Recompute.none,
            "model.offload_activations=true moves the inputs of recomputed layers, but model.recompute is none. Set "
            "model.recompute=layers or layers_and_vision.",
        )


@dataclass
class DataConfig:
    """What every data source has in common."""

    kind: DataKind = MISSING
    max_tokens: int = 4096
    """Tokens in one packed row, which is one micro-batch."""
    max_patches: int | None = None
    """Image patches in one packed row (a visual token is 4 patches, 8 in a video); null sets no limit."""
    accumulation: int = 1
    """Packed rows that each rank works through before one update."""
    lookahead: int = 64
    """Conversations the packer chooses from while it fills a row: more fills rows better and mixes the order more."""
    too_long: TooLong = TooLong.quarantine
    """What becomes of a conversation that does not fit in one row. quarantine: left out. drop_turns: its oldest turns
    are. shrink_images: its pictures are made smaller. If that is not enough, it is left out (data/fit.py)."""
    min_image_pixels: int = 12544
    """Area that shrink_images leaves to every picture at least; a token covers 784 pixels."""
    max_bad: float = 0.001
    """Share of the records that may be unusable (at least 10 of them may): they are left out and written to
    quarantine.jsonl. More of them end the run. 0 ends it at the first."""
    shuffle: bool = True
    """Draw a new order every epoch."""
    seed: int = 0
    """Chooses what is held out, and the order."""
    workers: int = 0
    """Threads that read and encode ahead of their use; 0 encodes in the packing thread."""
    prefetch: int = 2
    """Updates whose batches are packed ahead by a thread; 0 packs when they are needed."""
    cache_gib: float = 0.5
    """Encoded conversations (tokens and pixels) kept in memory, so that they need not be encoded again next epoch."""
    cache_folder: str | None = None
    """Folder for decoded pixels, kept between runs (2.3 kB per patch; yours to clear); null keeps none."""
    slow_s: float = 30.0
    """Seconds after which a record that is still being decoded is named."""
    dead_s: float = 300.0
    """Seconds after which it is given up: left out, or the run ends where its size is not even known."""

    def __post_init__(self):
        check(self.max_tokens >= 2, f"data.max_tokens is {self.max_tokens}; a row needs at least 2 tokens.")
        check(
            self.max_patches is None or self.max_patches >= 4,
            f"data.max_patches is {self.max_patches}; one visual token takes 4 patches. Raise it, or use null.",
        )
        for name, least in (("accumulation", 1), ("lookahead", 1), ("workers", 0), ("prefetch", 0), ("cache_gib", 0)):
            check(getattr(self, name) >= least, f"data.{name} is {getattr(self, name)}; it must be at least {least}.")
        check(
            self.min_image_pixels >= 784,
            f"data.min_image_pixels is {self.min_image_pixels}; a picture needs one token, 784 pixels.",
        )
        check(0 <= self.max_bad < 1, f"data.max_bad is {self.max_bad}; it must lie in 0..1, 1 excluded.")
        check(
            0 < self.slow_s < self.dead_s,
            f"data.slow_s is {self.slow_s} and data.dead_s {self.dead_s}; 0 < slow_s < dead_s must hold.",
        )
        check_seed("data.seed", self.seed)


@dataclass
class TaskData(DataConfig):
    """A task that ships with the suite, its questions made by code, some of them held out (data/tasks)."""

    kind: DataKind = DataKind.task
    task: str = MISSING
    """Its name; `python -m data.tasks` lists them."""
    limit: int | None = None
    """Train on the first so many of its conversations only; null: all."""

    def __post_init__(self):
        super().__post_init__()
        known = list(TASKS)
        check(self.task in known, f"data.task is {self.task}; it must be one of {', '.join(known)}.")
        check_limit("data.limit", self.limit)


@dataclass
class SetConfig:
    """One dataset of a mixture (`data.sets`)."""

    path: str | None = None
    """File, folder, brace pattern of shards, or Hugging Face dataset."""
    task: str | None = None
    """A task made in memory instead (`python -m data.tasks` lists them)."""
    limit: int | None = None
    """Train on the first so many conversations only; null: all. What is held out stays whole."""
    format: str | None = None
    """Name of the format (data/formats); null: recognised by the first record."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the format calls a column: what the records call it. `{messages: dialogue}`"""
    split: str | None = None
    """Of a Hugging Face dataset."""
    subset: str | None = None
    """Of a Hugging Face dataset: its configuration."""
    streaming: bool = False
    """Read front to back and shuffle within blocks, for what is too large to be looked through before the start."""
    media_root: str | None = None
    """Folder that the paths of images and videos are relative to; null: data.media_root, or else the file's folder."""
    fetch: bool | None = None
    """May media be fetched over https? null: data.fetch."""
    weight: float = 1.0
    """Share of the draws (of records, not of tokens) beside those of the other sets, for data.mix=sample."""
    modality: Modality | None = None
    """For data.modality_ratio; null: that of its first record."""

    @classmethod
    def of(cls, name: str, settings: Any) -> "SetConfig":
        """One entry of `data.sets`, checked."""
        if isinstance(settings, SetConfig):
            return settings
        where = f"data.sets.{name}"
        typed = typed_entry(cls, where, settings, of="a set", example="{path: chats.jsonl, weight: 2}")
        check((typed.path is None) != (typed.task is None), f"{where} needs a path or a task, and not both.")
        if typed.task is not None:
            unused = [key for key in settings if key not in ("task", "limit", "weight", "modality")]
            check(
                not unused,
                f"{where}.{unused[0] if unused else ''} would do nothing: a task is made in memory, not read. Remove "
                "it, or give a path.",
            )
        check_limit(f"{where}.limit", typed.limit)
        check(0 <= typed.weight < math.inf, f"{where}.weight is {typed.weight}; it must be a finite number, 0 or more.")
        return typed


@dataclass
class FilesData(DataConfig):
    """Your own conversations: one dataset (`path`), or a mixture (`sets`)."""

    kind: DataKind = DataKind.files
    path: str | None = None
    """File, folder, brace pattern of shards, or Hugging Face dataset of training conversations."""
    format: str | None = None
    """Name of the format (data/formats); null: recognised by the first record."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the format calls a column: what the records call it. `{messages: dialogue}`"""
    split: str | None = None
    """Of a Hugging Face dataset."""
    subset: str | None = None
    """Of a Hugging Face dataset: its configuration."""
    limit: int | None = None
    """Train on the first so many conversations only; null: all. What is held out stays whole."""
    streaming: bool = False
    """Read front to back and shuffle within blocks, for what is too large to be looked through before the start."""
    shuffle_block: int = 1024
    """Records of a stream that are shuffled among each other, and held in memory."""
    media_root: str | None = None
    """Folder that the paths of images and videos are relative to; null: the folder their file is in."""
    fetch: bool = False
    """May media be fetched over https?"""
    sets: dict[str, Any] = field(default_factory=dict)
    """Several datasets by name, instead of `path`; the settings of each are those of `SetConfig`."""
    mix: Mix = Mix.sample
    """sample: draw from the sets by weight. concat: all their records, once per epoch."""
    stop: Stop = Stop.first
    """An epoch of a sampled mixture ends when the first set has been gone through, or the last. Shorter ones go on."""
    modality_ratio: dict[str, float] = field(default_factory=dict)
    """Scales the weights so that sets of text, image and video are drawn in this proportion; `{text: 1, image: 2}`."""
    eval_path: str | None = None
    """Held-out conversations; `format` and `columns` are for them too."""
    eval_fraction: float = 0.0
    """Share of every set that is held out when there is no `eval_path`; 0 holds out nothing (but what tasks bring)."""

    def __post_init__(self):
        super().__post_init__()
        self.sets = {name: SetConfig.of(name, settings) for name, settings in self.sets.items()}
        check(
            bool(self.path or self.sets),
            "data.path and data.sets are both missing. Give data.path=chats.jsonl, or several sets: "
            "data.sets={name: {path: chats.jsonl}}.",
        )
        if self.sets:
            of_one_set = ("path", "format", "columns", "split", "subset", "limit", "streaming")
            given = [name for name in of_one_set if getattr(self, name)]
            check(
                not given,
                f"data.{given[0] if given else ''} is for a single dataset, and data.sets is given. Put it "
                "into the sets it belongs to.",
            )
        if self.mix is Mix.concat:
            weighted = [name for name, one in self.sets.items() if one.weight != 1]
            check(
                not weighted and not self.modality_ratio,
                f"data.mix=concat shows every record once, so {'the weight of ' + weighted[0] if weighted else ''}"
                f"{'' if weighted else 'data.modality_ratio'} would do nothing. Remove it, or use data.mix=sample.",
            )
        for modality, parts in self.modality_ratio.items():
            check(
                modality in Modality.__members__,
                f"data.modality_ratio has {modality}; it must be one of {', '.join(Modality.__members__)}.",
            )
            check(
                0 <= parts < math.inf,
                f"data.modality_ratio.{modality} is {parts}; it must be a finite number, 0 or more.",
            )
        check_limit("data.limit", self.limit)
        check(self.shuffle_block >= 1, f"data.shuffle_block is {self.shuffle_block}; it must be at least 1.")
        check(
            0 <= self.eval_fraction < 1,
            f"data.eval_fraction is {self.eval_fraction}; it must be at least 0 and less than 1, for example 0.1.",
        )
        check(
            self.eval_path is None or self.eval_fraction == 0,
            f"both data.eval_path ({self.eval_path}) and data.eval_fraction ({self.eval_fraction}) are set. Keep one.",
        )


@dataclass
class PoolWeights:
    """A coefficient for each expert pool, since each has routers of its own."""

    text: float = 0.0
    vision: float = 0.0


@dataclass
class ObjectiveConfig:
    """What is minimised. The losses of routers (train/router.py) are off, as in the released recipe for fine-tuning."""

    kind: ObjectiveKind = ObjectiveKind.sft
    """sft: mean negative log-likelihood of the tokens the assistant wrote."""
    token_balanced: bool = False
    """Divide the gradient by the positions an update has room for, not by its target tokens, so that a target weighs
    the same beside few and many image tokens. The reported loss stays the mean; the gradient becomes smaller."""
    balance: PoolWeights = field(default_factory=PoolWeights)
    """Weight of the load-balance loss of each sparse layer. With data.accumulation > 1 it needs one more forward pass,
    because experts are counted over the whole update."""
    z_loss: PoolWeights = field(default_factory=PoolWeights)
    """Weight of the mean squared logsumexp of the router's logits, of each sparse layer."""
    orthogonal: PoolWeights = field(default_factory=PoolWeights)
    """Weight of the loss that pulls the rows of each router's matrix apart."""
    orthogonal_decoupled: bool = False
    """Take the orthogonal loss's step after AdamW's, like weight decay, and not through AdamW and gradient clipping."""
    bias_update: float = 0.0
    """After each update, raise the correction bias of experts below the mean load by this much, and lower the others'.
    Pre-training used 0.001."""
    neftune_alpha: float = 0.0
    """Noise on text embeddings while training, at most alpha / sqrt(tokens of a segment x width) (train/neftune.py)."""

    def __post_init__(self):
        check(
            0 <= self.neftune_alpha < math.inf,
            f"objective.neftune_alpha is {self.neftune_alpha}; it must be 0 (off) or a positive number, usually 5.",
        )
        for name in ("balance", "z_loss", "orthogonal"):
            for pool, weight in vars(getattr(self, name)).items():
                check(
                    0 <= weight < math.inf,
                    f"objective.{name}.{pool} is {weight}; it must be 0 (off) or a positive number.",
                )
        check(
            0 <= self.bias_update < math.inf,
            f"objective.bias_update is {self.bias_update}; it must be 0 (off) or a positive number.",
        )
        check(
            not self.orthogonal_decoupled or any(vars(self.orthogonal).values()),
            "objective.orthogonal_decoupled is true, but objective.orthogonal is 0 for both pools. Give a weight, for "
            "example objective.orthogonal.text=0.001.",
        )


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5
    """Peak learning rate, reached after `warmup_steps`."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to `lr`; the first update already uses lr / (warmup + 1)."""
    schedule: Schedule = Schedule.cosine
    min_lr_ratio: float = 0.1
    """The learning rate at the end, as a share of `lr` (not for schedule=constant)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only, never to norms, biases or embeddings (train/optim.py)."""
    freeze: list[str] = field(default_factory=list)
    """What does not train: parts of the model, or globs over parameter names (train/trained.py)."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Part or glob → what `lr` is multiplied by there. A glob wins over a part, a later glob over an earlier one."""
    vision_layer_decay: float = 1.0
    """Each vision block learns at this share of the rate of the block above it; 1: all alike."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    max_skipped: int = 5
    """Updates with a non-finite loss or gradient that may be skipped before the run stops."""

    def __post_init__(self):
        check(self.lr > 0, f"optim.lr is {self.lr}; it must be positive.")
        check(math.isfinite(self.lr), f"optim.lr is {self.lr}; it must be a finite number.")
        check(self.eps > 0, f"optim.eps is {self.eps}; it must be positive.")
        check(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio is {self.min_lr_ratio}; it must lie in 0..1.")
        check(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it must be 0 or more.")
        for key, scale in self.lr_scale.items():
            check(
                scale > 0 and math.isfinite(scale),
                f"optim.lr_scale has {key}: {scale}; a scale must be positive and finite. optim.freeze stops a part.",
            )
        check(
            0 < self.vision_layer_decay <= 1,
            f"optim.vision_layer_decay is {self.vision_layer_decay}; it must be more than 0 and at most 1.",
        )
        check(self.max_grad_norm > 0, f"optim.max_grad_norm is {self.max_grad_norm}; it must be positive.")
        check(self.max_skipped >= 0, f"optim.max_skipped is {self.max_skipped}; it must be 0 or more.")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            check(0 <= beta < 1, f"optim.{name} is {beta}; it must lie in 0..1, 1 excluded.")


TARGETS = ("attention", "dense", "shared", "text_experts", "vision_experts", "resampler", "vision")
"""The parts (ernie_model/parts.py) that can have adapters: those made of matrices."""


@dataclass
class PeftConfig:
    """Low-rank adapters (train/lora/). With kind none every weight trains."""

    kind: PeftKind = PeftKind.none
    targets: list[str] | None = None
    """Parts of the model that get adapters, of attention, dense, shared, text_experts, vision_experts, resampler,
    vision; null: all parts of the language model that the model has."""
    rank: int = 16
    alpha: float = 32.0
    """An adapter counts alpha / rank times, or alpha / sqrt(rank) with `rslora`."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks of single parts: {vision_experts: 8}. Experts are fastest with multiples of 8."""
    alphas: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    """Learn the length of every row of the weight as well. Not for experts: peft has none there."""
    dropout: float = 0.0
    """Of an adapter's input. Not for experts."""
    name: str = "default"
    """What the trained adapter is called beside others."""
    init_from: str | None = None
    """Folder of an adapter to go on from; null starts at the base model."""
    frozen: dict[str, str] = field(default_factory=dict)
    """More adapters, name to folder, that act beside the trained one and stay as they are."""
    merge: bool = False
    """Write W + BA as well, a folder like that of a full training."""

    def __post_init__(self):
        for key, names in (("targets", self.targets or []), ("ranks", self.ranks), ("alphas", self.alphas)):
            for name in names:
                check(name in TARGETS, f"peft.{key} names {name}; parts that can have adapters: {', '.join(TARGETS)}.")
        check(self.targets is None or len(self.targets) > 0, "peft.targets is empty; name a part, or use null for all.")
        for key, rank in (("rank", self.rank), *((f"ranks.{k}", v) for k, v in self.ranks.items())):
            check(rank >= 1, f"peft.{key} is {rank}; it must be at least 1.")
        for key, alpha in (("alpha", self.alpha), *((f"alphas.{k}", v) for k, v in self.alphas.items())):
            check(math.isfinite(alpha) and alpha > 0, f"peft.{key} is {alpha}; it must be a positive number.")
        check(0 <= self.dropout < 1, f"peft.dropout is {self.dropout}; it must be at least 0 and less than 1.")
        for name in (self.name, *self.frozen):
            check(name.isidentifier(), f"peft: an adapter cannot be called {name!r}; use letters, digits and _.")
        check(self.name not in self.frozen, f"peft.name and peft.frozen both use {self.name!r}; names must differ.")
        check(
            not (self.dora and self.frozen),
            "peft.dora cannot be used beside peft.frozen: the lengths that DoRA learns would depend on the order.",
        )


@dataclass
class ParallelConfig:
    """How a model and its training state lie on the processes that `accelerate launch` or torchrun started.

    Nothing here but `held_in` changes what is computed, beyond the order of sums. Which layout to choose:
    docs/parallel.md.
    """

    processes: int | None = None
    """How many processes there must be; null takes however many were started."""
    zero: int = 0
    """Stage of DeepSpeed's ZeRO. 0: every process holds everything. 1: it holds its share of the optimizer's state;
    2: of the gradients too; 3: of the weights too."""
    expert: int = 1
    """Processes that share the experts of a layer: each holds 1/expert of both pools. Divides the number of processes;
    keep it within one machine."""
    sequence: int = 1
    """Processes that share one packed row."""
    held_in: HeldIn = HeldIn.float32
    """What trained weights are held in between updates, with zero=1 or 2; the optimizer has a float32 copy of its
    share in any case. bfloat16 saves 4 bytes per weight; gradients are made in it, and ranks add them up in float32."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory, and update there (zero=1, 2 or 3)."""
    offload_weights: bool = False
    """Keep the weights in host memory until a layer needs them (zero=3)."""
    overlap: bool = True
    """Let ranks exchange gradients while the backward pass goes on."""
    bucket_mb: int = 100
    """Gradients that travel together, in 10^6 bytes."""
    timeout_s: float = 600.0
    """Seconds that a process waits for another one before it ends the run with the stack of every thread."""
    cpu: bool = False
    """Use the CPU even where there is a GPU."""
    threads: int = 0
    """CPU threads of each process; 0 leaves PyTorch's choice."""

    def __post_init__(self):
        check(self.threads >= 0, f"parallel.threads is {self.threads}; it must be 0 or more.")
        check(
            self.processes is None or self.processes >= 1,
            f"parallel.processes is {self.processes}; it must be 1 or more, or null.",
        )
        check(self.zero in (0, 1, 2, 3), f"parallel.zero is {self.zero}; it must be 0 (none), 1, 2 or 3.")
        for name in ("expert", "sequence", "bucket_mb"):
            value = getattr(self, name)
            check(value >= 1, f"parallel.{name} is {value}; it must be 1 or more.")
        check(self.timeout_s > 0, f"parallel.timeout_s is {self.timeout_s}; it must be more than 0.")
        check(
            self.held_in is HeldIn.float32 or self.zero in (1, 2),
            f"parallel.held_in is bfloat16, but parallel.zero is {self.zero}. "
            + (
                "ZeRO-3 holds all weights in one dtype, and routers must be float32. Set parallel.held_in=float32, or "
                "parallel.zero=2."
                if self.zero == 3
                else "Only ZeRO has the float32 copy that updates are added to. Set parallel.held_in=float32, or "
                "parallel.zero=1 or 2."
            ),
        )
        check(
            not self.offload_optimizer or self.zero > 0,
            "parallel.offload_optimizer is true, but parallel.zero is 0: only ZeRO has the optimizer's state in host "
            "memory. Set parallel.zero=1, 2 or 3, or parallel.offload_optimizer=false.",
        )
        check(
            not self.offload_weights or self.zero == 3,
            f"parallel.offload_weights is true, but parallel.zero is {self.zero}: only ZeRO-3 fetches weights layer by "
            "layer. Set parallel.zero=3, or parallel.offload_weights=false.",
        )


@dataclass
class TrackerConfig:
    """Where metrics go, beside the terminal and metrics.jsonl. `tracker=[trackio,tensorboard]` switches on both."""

    project: str = "ernie-train"
    trackio: bool = False
    tensorboard: bool = False
    wandb: bool = False
    images_every: int = 0
    """Updates between pictures of the experts' load, beside those every `evaluate.every` and of the last update."""
    peak_tflops: float | None = None
    """What one device could do, in 10^12 operations per second, for the share reached (mfu); null takes it from the
    data sheet of known GPUs, and measures it elsewhere."""

    def __post_init__(self):
        check(
            self.peak_tflops is None or 0 < self.peak_tflops < math.inf,
            f"tracker.peak_tflops is {self.peak_tflops}; it must be a positive number, or null.",
        )
        check(self.images_every >= 0, f"tracker.images_every is {self.images_every}; it must be 0 or more.")

    @property
    def names(self) -> list[str]:
        chosen = [name for name in ("trackio", "tensorboard", "wandb") if getattr(self, name)]
        return chosen or ["none"]


@dataclass
class EvaluateConfig:
    every: int = 0
    """Updates between evaluations on the held-out conversations; 0 evaluates only before and after."""
    max_examples: int = 0
    """Held-out conversations to use, evenly over all sets; 0 uses all of them."""
    sheet: int = 24
    """How many held-out images are drawn with the model's own answers at the end, the first ones; 0 draws none."""
    max_new_tokens: int = 32
    """Longest answer written for the sheet."""

    def __post_init__(self):
        for name in ("every", "max_examples", "sheet", "max_new_tokens"):
            check(getattr(self, name) >= 0, f"evaluate.{name} is {getattr(self, name)}; it must be 0 or more.")


@dataclass
class PreviewConfig:
    """`ernie preview`; training reads none of it."""

    examples: int = 12
    """Conversations shown, the first ones that training would see."""
    rows: int = 4
    """Packed rows drawn, at least; more where `examples` lie in more."""
    ranks: int = 1
    """Processes that the rows are dealt to."""

    def __post_init__(self):
        for name in ("examples", "rows", "ranks"):
            check(getattr(self, name) >= 1, f"preview.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass
class DoctorConfig:
    """`ernie doctor`; training reads none of it."""

    processes: int = 0
    """Processes that go through the records; 0: one for each core."""
    stream_records: int = 10_000
    """Records looked at of a stream, which has no end to wait for."""

    def __post_init__(self):
        check(self.processes >= 0, f"doctor.processes is {self.processes}; it must be 0 or more.")
        check(self.stream_records >= 1, f"doctor.stream_records is {self.stream_records}; it must be at least 1.")


@dataclass
class PlanConfig:
    """`ernie plan`; training reads none of it. Rates are those of the chosen file of configs/plan/."""

    gpus: int = 8
    """Ranks, one on each GPU."""
    gpus_per_node: int = 8
    device: str = MISSING
    """A GPU of train/efficiency.py's table, for `tflops`; cpu measures this machine."""
    gpu_gb: float = MISSING
    """Memory of one GPU, in 10^9 bytes."""
    tflops: float | None = None
    """10^12 operations per second of one GPU in the precision that is trained in; null: by `device`."""
    mfu: float = 0.4
    """Share of `tflops` that the products of a step reach."""
    memory_gb_s: float = MISSING
    """A GPU and its own memory, in 10^9 bytes per second."""
    node_gb_s: float = MISSING
    """What a GPU sends to others of its node."""
    network_gb_s: float = MISSING
    """What a GPU sends to other nodes."""
    host_gb_s: float = MISSING
    """Between a GPU and host memory, each way."""
    host_memory_gb_s: float = MISSING
    """One GPU's share of the host's memory bandwidth, where an offloaded optimizer works."""
    host_gb: float = MISSING
    """Host memory of one node."""
    disk_gb_s: float = MISSING
    """Writing a checkpoint, by all ranks together."""
    reserve: float = 0.08
    """Share of a GPU's memory that stays free: CUDA's context, the library of collectives, fragmentation."""
    imbalance: float = 1.2
    """Rows that the busiest rank's experts receive, over the mean, with parallel.expert > 1."""
    segment_tokens: int | None = None
    """Length of a conversation; null: each fills its row. Attention costs the square of it."""
    media_share: float = 0.5
    """Share of the tokens that stand for images, for the time of a step; memory expects data.max_patches."""
    answers: int = 0
    """Conversations that each rank writes at once, for the size of the KV cache; 0: none."""
    answer_tokens: int = 4096
    """Tokens of each, with its prompt."""
    tokens: float | None = None
    """In the data, all epochs together; null: by run.steps, or by what `ernie doctor` found."""
    search: bool = False
    """Go through layouts, offloading, recomputation, held_in and row lengths, and rank what fits by time."""
    show: int = 8
    """Layouts shown."""

    def __post_init__(self):
        for name in ("gpus", "gpus_per_node", "answer_tokens", "show"):
            check(getattr(self, name) >= 1, f"plan.{name} is {getattr(self, name)}; it must be at least 1.")
        for name, rate in vars(self).items():
            if name.endswith(("_gb_s", "_gb")) or name in ("tflops", "tokens") and rate is not None:
                check(0 < rate < math.inf, f"plan.{name} is {rate}; it must be a positive number.")
        check(0 < self.mfu <= 1, f"plan.mfu is {self.mfu}; it must be more than 0 and at most 1.")
        for name in ("reserve", "media_share"):
            value = getattr(self, name)
            check(0 <= value < 1, f"plan.{name} is {value}; it must lie in 0..1, 1 excluded.")
        check(1 <= self.imbalance < math.inf, f"plan.imbalance is {self.imbalance}; it must be 1 (even) or more.")
        check(self.answers >= 0, f"plan.answers is {self.answers}; it must be 0 or more.")
        check(
            self.segment_tokens is None or self.segment_tokens >= 1,
            f"plan.segment_tokens is {self.segment_tokens}; it must be at least 1, or null.",
        )


@dataclass
class RunConfig:
    name: str = "sft"
    folder: str = "runs/${run.name}"
    """Everything this run writes lies here."""
    steps: int | None = None
    """Updates in the whole run; null: as many as `epochs` takes."""
    epochs: float = 1.0
    """How often the data is gone through, where `steps` is null. Counting the updates measures every record once."""
    seed: int = 0
    """Random initial weights."""
    resume: str = "auto"
    """auto: continue if the run folder holds a checkpoint. never: refuse if it does. Or a checkpoint folder."""
    save_every: int = 100
    """Updates between checkpoints; the last update always saves. 0 saves only then."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 1
    """Updates between lines in metrics.jsonl and the trackers."""
    spike: float | None = None
    """Report an update whose loss exceeds the median of the last 64 by this many median absolute deviations, and write
    its records to spikes.jsonl; null doesn't look."""
    grace_s: float = 60.0
    """Seconds after SIGTERM within which the run has saved and ended, or else ends itself with exit code 1."""
    debug: bool = False
    """Print the whole traceback of user errors too."""

    def __post_init__(self):
        check(self.steps is None or self.steps >= 1, f"run.steps is {self.steps}; it must be at least 1.")
        check(self.epochs > 0, f"run.epochs is {self.epochs}; it must be more than 0.")
        check(math.isfinite(self.epochs), f"run.epochs is {self.epochs}; it must be a finite number.")
        check_seed("run.seed", self.seed)
        check(self.save_every >= 0, f"run.save_every is {self.save_every}; it must be 0 or more.")
        check(self.keep >= 1, f"run.keep is {self.keep}; at least the newest checkpoint must stay.")
        check(self.log_every >= 1, f"run.log_every is {self.log_every}; it must be at least 1.")
        check(self.spike is None or self.spike > 0, f"run.spike is {self.spike}; it must be more than 0, or null.")
        check(0 < self.grace_s < 1e6, f"run.grace_s is {self.grace_s}; it must be more than 0 and less than a million.")
        check(bool(self.folder), "run.folder is empty; name the folder this run writes to.")


@dataclass
class TrainingConfig:
    """What every algorithm can be told."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = field(default_factory=OptimConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    plan: PlanConfig = MISSING

    def __post_init__(self):
        if self.run.steps is not None:
            check_steps(self, self.run.steps)
        if self.peft.kind is PeftKind.none:
            for name, default in vars(PeftConfig()).items():
                check(
                    getattr(self.peft, name) == default,
                    f"peft.{name} is given, but peft.kind is none: nothing would have an adapter and every weight "
                    "would train. Add peft=lora, or leave it out.",
                )


@dataclass
class SFTConfig(TrainingConfig):
    """`ernie sft`: everything it can be told."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.objective.kind, ObjectiveKind.sft)


def check_kind(given: ObjectiveKind, right: ObjectiveKind) -> None:
    """Raises UserError for the objective of another command."""
    check(
        given is right,
        f"objective.kind is {given.value}, but `ernie {right.value}` has an objective of its own. Leave "
        f"objective={given.value} out, or run `ernie {given.value}`.",
    )


def check_steps(config: TrainingConfig, steps: int) -> None:
    """Rules that need the length of the run; with run.epochs it is known only once the data has been measured."""
    length = f"run.steps={steps}" if config.run.steps else f"run.epochs={config.run.epochs:g}, {steps} updates"
    check(
        config.optim.warmup_steps < steps,
        f"optim.warmup_steps ({config.optim.warmup_steps}) is not shorter than the run ({length}), so the peak "
        "learning rate would never be reached. Lower optim.warmup_steps or make the run longer.",
    )
    check(
        config.evaluate.every <= steps,
        f"evaluate.every ({config.evaluate.every}) is longer than the run ({length}), so no evaluation would happen on "
        "the way. Lower it, or use 0 to evaluate only before and after.",
    )


def check_heldout(config: TrainingConfig, heldout: bool) -> None:
    """The rule that needs the data: whether any conversation is held out."""
    check(
        heldout or config.evaluate.every == 0,
        f"evaluate.every is {config.evaluate.every}, but no conversation is held out. Give data.eval_path or "
        "data.eval_fraction, or set evaluate.every=0.",
    )


class ConvertMedia(Enum):
    path = "path"
    copy = "copy"


class Keep(Enum):
    all = "all"
    wanted = "wanted"


@dataclass
class ConvertConfig:
    """`ernie convert`: see train/convert.py."""

    input: str = MISSING
    """What data.path may be: a file, a folder, shards."""
    output: str = MISSING
    """A .jsonl file that does not exist yet."""
    to: str = MISSING
    """The format to write: messages or erniekit."""
    format: str | None = None
    """The format of the input; null recognises it by the first record."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column is which: {the format's name: the record's name}."""
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    media: ConvertMedia = ConvertMedia.path
    """path keeps references as they are; copy puts the files into OUTPUT_media beside the output."""
    media_root: str | None = None
    """The folder that paths of media are relative to; null is the input's."""
    keep: Keep = Keep.all
    """wanted: of a pair only the chosen answer, and of labelled answers only the wanted ones."""

    def __post_init__(self):
        check(self.output.endswith(".jsonl"), f"output is {self.output}; it must end in .jsonl, one record per line.")
        check(self.to in ("messages", "erniekit"), f"to is {self.to}; it must be messages or erniekit.")


def suggestion(key: str, known: list[str]) -> str:
    """`; did you mean optim.lr?`, or nothing when no key is near."""
    # A misspelt last part within the right group is the common case; then a right last part in the wrong place.
    group, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    near = near or [name for name in known if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
