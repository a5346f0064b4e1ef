"""Settings of what runs a model without training it: `ernie evaluate`, `pairs`, `serve`, `chat`, `index`.

They share where the weights are (`Weights`), how the engine runs (`EngineSettings`), how answers are sampled
(`SamplingConfig`) and what the loop of tools may do (`AgentConfig`).
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from ernie_model.inference.engine import EngineSettings
from ernie_model.inference.tools import Limits
from train.config import PositionRule, Precision, TrackerConfig, check, check_limit, check_seed, typed_entry
from train.serving.media import MediaLimits


@dataclass
class SamplingConfig:
    """What is used where a request says nothing else."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    thinking: bool = False
    """The prompt opens a thought, as the Thinking releases expect."""


@dataclass
class RewardLimits:
    """What judging an attempt may take. Where answers are only asked, that is for rewards of the user's own."""

    workers: int = 1
    """Processes that compute rewards, on each rank; 0 computes them in the asking process, without limits."""
    time_s: float = 10.0
    """One attempt may take so long; then it has no score, and its process is killed."""
    memory_gib: float = 4.0
    """Of one process, beyond what it takes to start; an attempt that takes more has no score."""

    def __post_init__(self):
        check(self.workers >= 0, f"rewards.workers is {self.workers}; it must be 0 or more.")
        check(0 < self.time_s < math.inf, f"rewards.time_s is {self.time_s}; it must be positive and finite.")
        check(self.memory_gib > 0, f"rewards.memory_gib is {self.memory_gib}; it must be positive.")


@dataclass(kw_only=True)
class AgentConfig(Limits):
    """The loop of answering and using tools: what it has, beside what it may take."""

    tools: list[str] = field(default_factory=list)
    """Names of built-in tools, or python:module.function of one's own."""
    index: str | None = None
    """The folder that `ernie index` wrote, for image_search."""
    input_filters: list[str] = field(default_factory=list)
    """What looks at texts before they are answered: files of forbidden phrases, one a line, or python:module.function
    from a text to None or to what it found."""
    output_filters: list[str] = field(default_factory=list)
    """The same, for what the model writes."""


class Bits(Enum):
    """See ernie_model.inference.quantize.Scheme."""

    int8 = "int8"
    int4 = "int4"
    int2 = "int2"


@dataclass
class QuantizeConfig:
    """Weights in fewer bits, part by part (docs/export.md). A part that is null stays as it is."""

    text_experts: Bits | None = None
    vision_experts: Bits | None = None
    shared: Bits | None = None
    attention: Bits | None = None
    dense: Bits | None = None
    """The MLPs of the layers without experts."""
    vision: Bits | None = None
    resampler: Bits | None = None
    embeddings: Bits | None = None
    """The embedding, and the head with it."""
    group: int = 128
    """Columns of a row that share a scale in int4 and int2: 32, 64, 128 or 256."""
    calibration: str | None = None
    """Conversations whose activations say which errors count: a task of data/tasks, or a file as data.path takes it.
    They should hold images where the model will see some. null: all errors count alike."""
    examples: int = 64
    """How many of them."""

    def __post_init__(self):
        check(self.group in (32, 64, 128, 256), f"quantize.group is {self.group}; use 32, 64, 128 or 256.")
        check(self.examples >= 1, f"quantize.examples is {self.examples}; it must be at least 1.")

    def parts(self) -> dict[str, str]:
        """Part -> bits, of those that are set."""
        names = [name for name in vars(self) if name not in ("group", "calibration", "examples")]
        return {name: bits.value for name in names if (bits := getattr(self, name)) is not None}


@dataclass
class Weights:
    """Which model."""

    checkpoint: str = MISSING
    """A folder with weights as runs/NAME/export, a run folder (its export, else its best), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    precision: Precision = Precision.bf16
    """What weights are held and computed in."""
    position_after_video: PositionRule | None = None
    """Where text continues after a long video; null keeps what the checkpoint says."""
    adapter: str | None = None
    """An adapter folder, or a run folder that holds one: it is added to the weights of `checkpoint` in memory."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Of weights that are not quantised yet, in memory; `ernie export` writes them for good."""
    cpu: bool = False
    """Stay on the CPU where there is a GPU."""


@dataclass
class ModelAtWork(Weights):
    """What evaluate, serve and chat have in common."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)


class Split(Enum):
    """Of tasks that ship with the suite."""

    heldout = "heldout"
    train = "train"


@dataclass
class AskedConfig:
    """One task or file, where it is asked otherwise than the rest: `per_task.NAME`."""

    reward: str | None = None
    """Instead of the reward that its records name."""
    reward_options: dict[str, Any] = field(default_factory=dict)
    """Joined to those of its records."""
    limit: int | None = None
    max_new_tokens: int | None = None
    thinking: bool | None = None
    tools: list[str] | None = None
    """null: the task's own, and agent.tools."""
    format: str | None = None
    """Files: name of the format (data/formats); null: recognised by the first record."""
    columns: dict[str, str] = field(default_factory=dict)
    """Files: what the format calls a column: what the records call it."""
    split: str | None = None
    """Of a Hugging Face dataset."""
    subset: str | None = None
    """Of a Hugging Face dataset: its configuration."""
    media_root: str | None = None
    """Files: the folder that paths of images and videos are relative to; null: the file's."""
    fetch: bool = False
    """Files: may media be fetched over https?"""

    @classmethod
    def of(cls, name: str, settings: Any) -> "AskedConfig":
        """One entry of `per_task`, checked."""
        if isinstance(settings, AskedConfig):
            return settings
        where = f"per_task.{name}"
        typed = typed_entry(cls, where, settings, of="a task", example="{reward: anls, limit: 100}")
        for key in ("limit", "max_new_tokens"):
            value = getattr(typed, key)
            check(value is None or value >= 1, f"{where}.{key} is {value}; it must be at least 1, or null.")
        return typed


@dataclass
class AskingConfig(ModelAtWork):
    """What is asked, how often, and which answers are right: what evaluate and pairs have in common."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks that ship with the suite (`python -m data.tasks` lists them), and files of questions of your own,
    in any format of data/. A file is called by its name without the ending."""
    task_seed: int = 0
    """What the suite's tasks are made with; as in training (data.seed), or held-out questions are others."""
    limit: int | None = None
    """Questions of each task, evenly over it; null: all."""
    attempts: int = 1
    """Answers to each question; more than one needs sampling.temperature above 0."""
    right_at: float = 1.0
    """The score from which an answer counts as right."""
    seed: int = 0
    """Of sampling and of the bootstrap."""
    reward: str | None = None
    """For records that name none: see train/rewards, or python:module.function."""
    rewards: RewardLimits = field(default_factory=RewardLimits)
    per_task: dict[str, Any] = field(default_factory=dict)
    """Settings of single tasks, by name: `AskedConfig`."""
    concurrency: int = 128
    """Questions that are being answered at once."""

    def __post_init__(self):
        self.per_task = {name: AskedConfig.of(name, settings) for name, settings in self.per_task.items()}
        check(bool(self.tasks), "tasks is empty; for example tasks=[digits], or tasks=[questions.jsonl].")
        check_limit("limit", self.limit)
        check(self.attempts >= 1, f"attempts is {self.attempts}; it must be at least 1.")
        check(
            self.attempts == 1 or self.sampling.temperature > 0,
            f"attempts is {self.attempts} and sampling.temperature 0, which would write the same answer each time. "
            "Set sampling.temperature, for example to 0.8, or attempts=1.",
        )
        check(0 < self.right_at <= 1, f"right_at is {self.right_at}; it must be more than 0 and at most 1.")
        check_seed("task_seed", self.task_seed)
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in 0..4294967295.")
        room = self.engine.max_waiting + self.engine.max_running
        check(
            1 <= self.concurrency <= room,
            f"concurrency is {self.concurrency}; it must lie in 1..{room}, which is engine.max_waiting + "
            "engine.max_running.",
        )


@dataclass
class EvaluationConfig(AskingConfig):
    """`ernie evaluate`: see train/evaluate.py."""

    split: Split = Split.heldout
    """Of the suite's tasks; a file is asked whole."""
    pass_at: list[int] = field(default_factory=list)
    """k of pass@k; empty: 1, and all attempts."""
    likelihood: bool = True
    """Also measure how probable the right answers are."""
    pictures: int = 60
    """Questions of each task on the page and in the trackers' tables, wrong ones first; 0 makes no page."""
    output: str = "evaluations/${now:%Y-%m-%d_%H-%M-%S}"
    """The folder of results; one that was broken off goes on where it was."""
    name: str | None = None
    """What trackers call it; null: the name of the folder."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self):
        super().__post_init__()
        for k in self.pass_at:
            check(1 <= k <= self.attempts, f"pass_at has {k}; it must lie in 1..attempts, which is {self.attempts}.")
        check(self.pictures >= 0, f"pictures is {self.pictures}; it must be 0 or more.")


class Form(Enum):
    pairs = "pairs"
    """A right and a wrong answer to the same question: DPO and its kin."""
    labelled = "labelled"
    """Single answers, each wanted or not: KTO."""


@dataclass
class PairsConfig(AskingConfig):
    """`ernie pairs`: see train/make_pairs.py. Of the suite's tasks it asks what is trained on, not what is held out."""

    attempts: int = 8
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    form: Form = Form.pairs
    per_question: int = 1
    """Pairs of one question at most; with form=labelled, answers of each kind."""
    wrong_at: float | None = None
    """The score up to which an answer counts as wrong; null: all that are not right. Answers between are left out."""
    use_answer: bool = False
    """Where no attempt is right, the question's own right answer is the chosen one."""
    output: str = "pairs/${now:%Y-%m-%d_%H-%M-%S}"
    """The folder of the records; one that was broken off goes on where it was."""

    def __post_init__(self):
        super().__post_init__()
        check(self.per_question >= 1, f"per_question is {self.per_question}; it must be at least 1.")
        check(
            self.wrong_at is None or 0 <= self.wrong_at < self.right_at,
            f"wrong_at is {self.wrong_at}; it must be at least 0 and less than right_at, which is {self.right_at}.",
        )
        check(
            self.attempts > 1 or self.use_answer or self.form is Form.labelled,
            "attempts is 1, and one answer is not both right and wrong. Raise attempts, or set use_answer=true.",
        )

    @property
    def split(self) -> Split:
        return Split.train


@dataclass
class CompareConfig:
    """`ernie compare`: see train/compare.py."""

    runs: list[str] = field(default_factory=list)
    """Two folders that `ernie evaluate` wrote, the older one first."""
    seed: int = 0
    """Of the bootstrap and the permutation test."""
    output: str | None = None
    """A JSON file of what is shown; null writes none."""

    def __post_init__(self):
        check(
            len(self.runs) == 2,
            f"runs holds {len(self.runs)} folders; give two: runs=[evaluations/before,evaluations/after].",
        )
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in 0..4294967295.")


@dataclass
class ServeConfig(ModelAtWork):
    """`ernie serve`: see train/serve.py."""

    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in."""
    port: int = 8000
    """0 chooses a free one."""
    name: str | None = None
    """What clients call the model; null: the name of its folder or run."""
    api_key: str | None = None
    """What clients must send. It shows in the list of processes: the variable ERNIE_API_KEY or a file does not."""
    api_key_file: str | None = None
    """A file with one key in a line; any of them lets in."""
    media_root: str | None = None
    """The folder whose files requests may name as file:///...; null: none."""
    fetch: bool = False
    """May requests name https addresses? Only public ones are ever fetched."""
    grace_s: float = 30.0
    """After SIGTERM, what runs has so long to finish."""
    ui: bool = False
    """A page to chat with, at /ui."""
    limits: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self):
        check(0 <= self.port < 65536, f"port is {self.port}; it must lie in 0..65535.")
        check(0 <= self.grace_s < float("inf"), f"grace_s is {self.grace_s}; it must be 0 or more, and finite.")
        check(self.api_key != "", "api_key is empty; null lets everybody in.")


@dataclass
class ChatConfig(ModelAtWork):
    """`ernie chat`: see train/chat.py."""


@dataclass
class IndexConfig(Weights):
    """`ernie index`: see train/index.py."""

    folder: str = MISSING
    """The images."""
    output: str | None = None
    """null: FOLDER/.ernie_index"""
    max_pixels: int = 602_112
    """Larger pictures are shrunk to this area before they are looked at: 768 image tokens of 28 x 28 pixels."""

    def __post_init__(self):
        check(self.max_pixels >= 784, f"max_pixels is {self.max_pixels}; one image token has 784, use more.")


class Layout(Enum):
    hub = "hub"
    """What this suite and transformers read, and vLLM of text models."""
    vllm = "vllm"
    """What vLLM reads of vision-language models."""


class Certify(Enum):
    auto = "auto"
    """transformers where it is installed and the model has at most `certify_most` parameters, else ours."""
    none = "none"
    ours = "ours"
    """The written files are read again and must give the same logits."""
    transformers = "transformers"
    """They must give transformers' model the same logits too."""


@dataclass
class ExportConfig:
    """`ernie export`: see train/export.py."""

    checkpoint: str = MISSING
    """A run folder, whose newest checkpoint is meant; one of its checkpoints/step-... folders; or a folder of weights
    or a hub id, for another layout, another precision, merged adapters or fewer bits."""
    output: str = MISSING
    """A folder that does not exist yet."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    adapter: str | None = None
    """Of a folder of weights: the adapter to merge into them."""
    precision: Precision | None = None
    """What weights are stored in; null: as they are in the checkpoint. Routers are always float32."""
    max_shard_gb: float = 5.0
    """A file of weights is closed before it becomes larger."""
    layout: Layout = Layout.hub
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Write OUTPUT/quantized instead of OUTPUT/export."""
    certify: Certify = Certify.auto
    """With whom the written files are compared before they appear."""
    certify_most: float = 2e9
    """Parameters up to which certify=auto asks transformers, and everyone computes in float32. Two float32 copies of
    the model must fit into memory for that."""
    vllm_python: str | None = None
    """A Python that has vLLM, to ask it as well: /somewhere/bin/python."""

    def __post_init__(self):
        check(self.max_shard_gb > 0, f"max_shard_gb is {self.max_shard_gb}; it must be more than 0.")
        others = {
            "layout=vllm": self.layout is Layout.vllm,
            "certify=transformers": self.certify is Certify.transformers,
            "vllm_python": self.vllm_python is not None,
        }
        for name, asked in others.items():
            check(
                not (asked and self.quantize.parts()),
                f"{name} and quantize exclude each other: only this suite reads its quantised weights.",
            )
