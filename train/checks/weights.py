"""The checkpoint, by its headers alone; the tokenizer and the chat format that go with it. Nothing is downloaded.

A name on the hub is looked up in the local cache. Where it isn't there, the hub is asked whether it has it, with a
short time limit; what needs the files is then left to the run that downloads them.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ernie_model.checkpoint import CheckpointError, check_name, inspect_headers
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.build import TINY, build_processor, human, read_config
from train.checks.findings import Finding, ok, problem, warning
from train.config import (
    ModelConfig,
    PeftConfig,
    UserError,
)
from train.made_by import check_made

HUB_TIMEOUT_S = 5
NEEDED = ("config.json", "tokenizer.json")


class Found(NamedTuple):
    """What the other checks go on with; None where it is not on this machine."""

    architecture: ErnieConfig | None
    processor: Processor | None
    findings: list[Finding]


def check_weights(config: ModelConfig) -> Found:
    """Raises what a broken folder raises."""
    findings: list[Finding] = []
    for key, source in (("model.checkpoint", config.checkpoint), ("model.processor", config.processor)):
        if source is None or source == TINY or Path(source).expanduser().exists():
            continue
        check_made(key, source)
        check_name(source)
        if cached(source, config.revision) is None:
            findings.append(_on_the_hub(key, source, config.revision))
    if findings:
        architecture = None
        if config.checkpoint is None or config.config is not None:
            architecture = read_config(ModelConfig(**{**vars(config), "checkpoint": None, "processor": TINY}))
        return Found(architecture, None, findings)

    # Files that are here are read from here, also where a hub name stands for them.
    local = ModelConfig(**vars(config))
    local.checkpoint, local.processor = _local(config.checkpoint, config), _local(config.processor, config)
    if local.checkpoint != config.checkpoint:
        local.revision = None
    architecture = read_config(local)
    if local.checkpoint is None:
        findings.append(ok("starts from random weights; there is no checkpoint to read"))
    else:
        headers = inspect_headers(local.checkpoint, architecture)
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in headers.dtypes.items())
        text = f"{headers.num_tensors} tensors in {headers.num_files} file{'s' * (headers.num_files > 1)} "
        findings.append(ok(f"{text}({human(headers.num_bytes, 'B')}): all there, shapes as config.json says; {dtypes}"))
    processor = build_processor(local, architecture)
    return Found(architecture, processor, [*findings, *check_processor(processor, local)])


def check_processor(processor: Processor, config: ModelConfig) -> list[Finding]:
    tokenizer, architecture = processor.tokenizer, processor.config
    found = [ok(f"tokenizer: {tokenizer.vocab_size:,} ids of {architecture.vocab_size:,}, the media tokens agree")]
    spare = architecture.vocab_size - tokenizer.vocab_size
    if spare > architecture.vocab_size // 10:
        found.append(
            warning(
                f"a tenth or more of the model's vocabulary ({spare:,} ids) has no token in {tokenizer.source}. Is it "
                "the tokenizer of this model? See model.processor."
            )
        )
    thinking = "with" if processor.chat.think else "without"
    found.append(
        ok(f"chat format of {'text' if processor.chat.text_model else 'vision-language'} models, {thinking} thinking")
    )
    if architecture.vision is not None and processor.video.font is None and config.checkpoint is not None:
        found.append(
            warning(
                "the checkpoint has no Roboto-Regular.ttf, so timestamps on video frames are drawn in another font "
                "than the released models saw. Copy the file from the hub's repository if you train on videos."
            )
        )
    return found


def check_adapters(config: PeftConfig, model: ErnieModel) -> list[Finding]:
    """The adapters that a run goes on from, or acts beside. Raises what a folder that does not fit raises."""
    from train.lora.files import read_adapter  # peft takes seconds to import

    named = {f"peft.frozen.{name}": folder for name, folder in config.frozen.items()}
    if config.init_from is not None:
        named["peft.init_from"] = config.init_from
    for key, folder in named.items():
        read_adapter(Path(folder), model, key)
    return [ok(f"{key}={folder} fits the model") for key, folder in named.items()]


def cached(source: str, revision: str | None) -> Path | None:
    """The snapshot of a hub repository on this machine, if its small files are here."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(source, name, revision=revision) for name in NEEDED]
    if not all(isinstance(path, str) for path in paths):
        return None
    return Path(str(paths[0])).parent


def _local(source: str | None, config: ModelConfig) -> str | None:
    if source is None or source == TINY or Path(source).expanduser().exists():
        return source
    return str(cached(source, config.revision))


def _on_the_hub(key: str, source: str, revision: str | None) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return problem(
            f"{key}={source} is neither a folder nor in the cache, and HF_HUB_OFFLINE forbids to fetch it. Name a "
            f"folder, or download it first: hf download {source}"
        )
    try:
        HfApi().model_info(source, revision=revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(f"{key}={source} is neither a folder nor a name on the hub.") from error
    except (HfHubHTTPError, CheckpointError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return problem(
            f"{key}={source} is neither a folder nor in the cache, and the hub could not be asked ({reason}). Check "
            "the name and the network, or name a folder."
        )
    return warning(
        f"{key}={source} is on the hub and not yet on this machine: training would download it. Its tensors and the "
        f"data were not checked; `hf download {source}` and ask again to have that done."
    )
