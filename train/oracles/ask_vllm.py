"""Log-probabilities, greedy answers and chosen experts of vLLM, for the cases of a certificate.

See train/oracles/__init__.py. Runs under another Python, which has vLLM, with `vllm_plugin` on its PYTHONPATH. Writes

    NAME/token_T        the prompt as vLLM expanded it
    NAME/logprob_T      of each prompt token but the first; NaN there
    NAME/best_T         the most likely next token at each place of the prompt but the last
    NAME/answer_T, NAME/answer_logprob_T   greedy
    NAME/expert_LTK     of models with experts, where the routers can be watched
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so that the model can be watched
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEW_TOKENS = 8


def main(folder: str, cases: str, out: str, dtype: str) -> None:
    import vllm_plugin

    vllm_plugin.register()
    import numpy
    import torch
    import vllm
    from PIL import Image
    from safetensors.torch import load_file, save_file

    said = json.loads((Path(cases) / "cases.json").read_text())
    limits = dict(limit_mm_per_prompt={"image": 4, "video": 1}) if said["vision"] else {}
    llm = vllm.LLM(
        folder,
        trust_remote_code=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=said["longest"] + NEW_TOKENS + 1,
        max_num_batched_tokens=max(2048, said["longest"] + NEW_TOKENS + 1),  # a prompt is one step
        enable_prefix_caching=False,
        max_logprobs=1,
        **limits,
    )
    visited = watch(llm)
    results = {}
    for case in said["cases"]:
        tensors = load_file(Path(cases) / f"{case['name']}.safetensors")
        prompt = {"prompt_token_ids": collapsed(tensors["token_T"].tolist(), said["places"])}
        pictures = [Image.open(Path(cases) / name) for name in case["pictures"]]
        if case["is_video"]:
            frames = numpy.stack([numpy.asarray(one) for one in pictures])
            about = dict(fps=2.0, duration=len(frames) / 2, total_num_frames=len(frames), do_sample_frames=False)
            about |= dict(frames_indices=list(range(len(frames))), video_backend="frames")
            prompt["multi_modal_data"] = {"video": [(frames, about)]}
            low, high = said["frame_limits"]
            prompt["mm_processor_kwargs"] = {"min_pixels": low, "max_pixels": high}
        elif pictures:
            prompt["multi_modal_data"] = {"image": pictures}
        for seen in visited.values():
            seen.clear()
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            logprobs=1,
            prompt_logprobs=1,
            ignore_eos=True,
            detokenize=False,
            logit_bias={token: -100.0 for token in said["banned"]} or None,
        )
        answer = llm.generate([prompt], params, use_tqdm=False)[0]
        ids = list(answer.prompt_token_ids)
        logprobs = [float("nan")]
        best = []
        for token, place in zip(ids[1:], answer.prompt_logprobs[1:], strict=True):
            logprobs.append(place[token].logprob)
            best.append(max(place, key=lambda one: place[one].logprob))
        new = answer.outputs[0]
        start = case["name"]
        results[f"{start}/token_T"] = torch.tensor(ids)
        results[f"{start}/logprob_T"] = torch.tensor(logprobs)
        results[f"{start}/best_T"] = torch.tensor(best)
        results[f"{start}/answer_T"] = torch.tensor(list(new.token_ids))
        results[f"{start}/answer_logprob_T"] = torch.tensor(
            [place[token].logprob for token, place in zip(new.token_ids, new.logprobs, strict=True)]
        )
        if len(ids) == len(tensors["pool_T"]) and visited:
            results[f"{start}/expert_LTK"] = experts(visited, tensors["pool_T"] > 0, said["num_experts"])
    save_file(results, out, metadata={"program": f"vllm {vllm.__version__}", "fixes": ",".join(vllm_plugin.applied)})


def collapsed(ids: list[int], places: dict[str, int]) -> list[int]:
    """One `<|image@placeholder|>` or `<|video@placeholder|>` for each run of placeholders."""
    out: list[int] = []
    for token in ids:
        place = places.get(str(token))
        if place is None or not out or out[-1] != place:
            out.append(token if place is None else place)
    return out


def watch(llm) -> dict:
    """The choices of every router, in the order of its calls; nothing where vLLM's insides are others."""
    try:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    except AttributeError:
        return {}
    visited = {}
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if router is not None and hasattr(router, "set_capture_fn"):
            visited[name] = []
            router.set_capture_fn(lambda chosen, name=name: visited[name].append(chosen.clone()))
    return visited


def experts(visited: dict, vision_T, num_experts: int):
    """Of the prompt: the first rows that each router saw; a router sees tokens of its own pool, in order."""
    import torch

    layers = {}
    for name, seen in visited.items():
        is_vision = "vision_experts" in name
        mine = vision_T if is_vision else ~vision_T
        if not mine.any():
            continue
        layer = name.partition(".mlp")[0]
        chosen = torch.cat(seen)[: int(mine.sum())].to(torch.int64)
        if layer not in layers:
            layers[layer] = torch.full((len(vision_T), chosen.shape[-1]), -1, dtype=torch.int64)
        layers[layer][mine] = chosen + num_experts * is_vision
    return torch.stack(list(layers.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
