"""Logits and chosen experts of transformers' model, for the cases of a certificate. See train/oracles/__init__.py.

Writes NAME/logit_TV float32 and, of models with experts, NAME/expert_LTK int64: vision experts come after text experts.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(folder: str, cases: str, out: str, dtype: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    said = json.loads((Path(cases) / "cases.json").read_text())
    kind = transformers.AutoModelForImageTextToText if said["vision"] else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    visited: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda module, inputs, output, name=name: visited[name].append(output[2]))
            visited[name] = []
    results: dict[str, torch.Tensor] = {}
    for case in said["cases"]:
        tensors = load_file(Path(cases) / f"{case['name']}.safetensors")
        for seen in visited.values():
            seen.clear()
        with torch.inference_mode():
            logits = model(**batch(tensors, said["vision"], getattr(torch, dtype))).logits[0]
        results[f"{case['name']}/logit_TV"] = logits.float().contiguous()
        if visited:
            results[f"{case['name']}/expert_LTK"] = experts(visited, tensors["pool_T"] > 0, said["num_experts"])
    save_file(results, out, metadata={"program": f"transformers {transformers.__version__}"})


def batch(tensors: dict[str, torch.Tensor], vision: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    ids = tensors["token_T"][None]
    out = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if not vision:
        return out
    out |= dict(mm_token_type_ids=tensors["mm_T"][None].int(), moe_mm_token_type_ids=tensors["pool_T"][None].int())
    if "grid_N3" not in tensors:
        return out
    patches = tensors["patch_PX"].to(dtype).split(tensors["grid_N3"].prod(1).tolist())
    for suffix, grid_key, chosen in (
        ("pixel_values", "image_grid_thw", tensors["grid_N3"][:, 0] == 1),
        ("pixel_values_videos", "video_grid_thw", tensors["grid_N3"][:, 0] > 1),
    ):
        if chosen.any():
            out[suffix] = torch.cat([patch for patch, wanted in zip(patches, chosen, strict=True) if wanted])
            out[grid_key] = tensors["grid_N3"][chosen]
    return out


def experts(visited: dict[str, list[torch.Tensor]], vision_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Each layer's choices in the order of the tokens; a router sees those of its own pool, in order."""
    layers: dict[str, torch.Tensor] = {}
    for name, seen in visited.items():
        if not seen or not (chosen := torch.cat(seen)).numel():
            continue
        layer = name.partition(".mlp.")[0]
        is_vision = ".vision_moe." in name
        mine = vision_T if is_vision else ~vision_T
        if layer not in layers:
            layers[layer] = chosen.new_full((len(vision_T), chosen.shape[-1]), -1)
        layers[layer][mine] = chosen[: int(mine.sum())] + num_experts * is_vision
    return torch.stack(list(layers.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
