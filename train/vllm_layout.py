"""An exported folder as vLLM reads it. The weights stay as they are; what lies beside them changes.

    config.json                 the flat form, with `auto_map`
    *_ernie4_5_vl.py            configuration and processor for `trust_remote_code` (vllm_plugin/remote_code)
    preprocessor_config.json    limits of the pictures' sizes under the names that vLLM looks for
    tokenizer.json, chat_template.jinja    `<|image@placeholder|>` where vLLM puts a picture

Text models have one layout: vLLM reads theirs as it is.
"""

import json
import shutil
from pathlib import Path

import vllm_plugin
from ernie_model.atomic import atomic_write
from ernie_model.config import ErnieConfig
from ernie_model.processor import (
    CHAT_TEMPLATE_FILE,
    IMAGE_FILE,
    PROCESSOR_FILE,
    VIDEO_FILE,
    VLLM_FRAME_LIMITS,
    Processor,
)
from ernie_model.tokenizer import IMAGE, TOKENIZER_FILE, VIDEO

PLACES = {IMAGE: "<|image@placeholder|>", VIDEO: "<|video@placeholder|>"}
REMOTE_CODE = Path(vllm_plugin.__file__).parent / "remote_code"
CONFIGURATION, PROCESSING = "configuration_ernie4_5_vl", "processing_ernie4_5_vl"


def to_vllm_layout(folder: Path, processor: Processor) -> None:
    """Change a folder in the hub's layout into vLLM's, in place. Of a text model nothing changes."""
    config = processor.config
    if config.vision is None:
        return
    raw = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", _flat(config) | {"dtype": raw["dtype"]})
    for name in (CONFIGURATION, PROCESSING):
        shutil.copyfile(REMOTE_CODE / f"{name}.py", folder / f"{name}.py")
    _write(folder / IMAGE_FILE, _image_settings(processor))
    (folder / VIDEO_FILE).unlink()
    _write(
        folder / PROCESSOR_FILE,
        {
            "processor_class": "Ernie4_5_VLProcessor",
            "auto_map": {"AutoProcessor": f"{PROCESSING}.Ernie4_5_VLProcessor"},
        },
    )
    tokenizer = json.loads((folder / TOKENIZER_FILE).read_text())
    known = {token["content"] for token in tokenizer["added_tokens"]}
    following = processor.tokenizer.vocab_size
    for place in PLACES.values():
        if place not in known:  # it is replaced before anything is looked up, so no embedding has to exist
            flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            tokenizer["added_tokens"].append({"id": following, "content": place, **flags})
            following += 1
    atomic_write(folder / TOKENIZER_FILE, json.dumps(tokenizer, ensure_ascii=False) + "\n")
    template = (folder / CHAT_TEMPLATE_FILE).read_text("utf-8")
    for ours, theirs in PLACES.items():
        template = template.replace(ours, theirs)
    atomic_write(folder / CHAT_TEMPLATE_FILE, template)


def _flat(config: ErnieConfig) -> dict:
    maps = {
        "AutoConfig": f"{CONFIGURATION}.Ernie4_5_VLConfig",
        "AutoProcessor": f"{PROCESSING}.Ernie4_5_VLProcessor",
        "AutoImageProcessor": f"{PROCESSING}.Ernie4_5_VLImageProcessor",
    }
    return config.to_flat_json() | {"auto_map": maps}


def _image_settings(processor: Processor) -> dict:
    image = processor.image
    limits = {"min_pixels": image.min_pixels, "max_pixels": image.max_pixels}
    return {
        "image_processor_type": "Ernie4_5_VLImageProcessor",
        "processor_class": "Ernie4_5_VLProcessor",
        "auto_map": {
            "AutoProcessor": f"{PROCESSING}.Ernie4_5_VLProcessor",
            "AutoImageProcessor": f"{PROCESSING}.Ernie4_5_VLImageProcessor",
        },
        # The second pair of names is what classes of transformers read.
        "size": limits | {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        VLLM_FRAME_LIMITS: {"min_pixels": processor.video.min_pixels, "max_pixels": processor.video.max_pixels},
        "patch_size": image.patch_size,
        "merge_size": image.merge_size,
        "rescale_factor": 1 / 255,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _write(path: Path, value: dict) -> None:
    atomic_write(path, json.dumps(value, indent=2) + "\n")
