"""Runs under vLLM's Python: answers to prompts from an engine in this process, through a list of events.

    python ask_offline.py TASK.json OUT.json

TASK  {"folder", "batched_tokens", "prefix_caching", "prompts": {name: {"ids", "images"}},
       "events": [["ask", label, prompt] | ["ask", label, prompt, seed] | ["reload", folder] | ["without", fix]
                  | ["with", fix]]}
OUT   {label: {"ids", "logprobs" of the prompt but its first, "new", "new_logprobs"}}, or {"error": text}
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(task_file: str, out_file: str) -> None:
    from vllm_plugin.fixes import FIXES, find

    with open(task_file) as file:
        task = json.load(file)
    stock = {}
    for name, fix in FIXES.items():
        stock[name] = {path: find(path) for path in fix.replaces}
    import vllm_plugin

    vllm_plugin.register()
    try:
        out = run(task, stock, {name: {p: find(p) for p in fix.replaces} for name, fix in FIXES.items()}, find)
    except Exception as error:  # the caller expects some of them
        out = {"error": f"{type(error).__name__}: {error}"}
    out["applied"] = vllm_plugin.applied
    with open(out_file, "w") as file:
        json.dump(out, file)


def run(task: dict, stock: dict, fixed: dict, find) -> dict:
    import vllm
    from PIL import Image

    llm = vllm.LLM(
        task["folder"],
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=task["batched_tokens"],
        enable_prefix_caching=task["prefix_caching"],
        limit_mm_per_prompt={"image": 4, "video": 1},
    )
    out = {}
    for kind, *said in task["events"]:
        if kind == "ask":
            label, name, *seed = said
            prompt = {"prompt_token_ids": task["prompts"][name]["ids"]}
            if task["prompts"][name]["images"]:
                images = [Image.open(path) for path in task["prompts"][name]["images"]]
                prompt["multi_modal_data"] = {"image": images}
            # With log-probabilities of the prompt, vLLM leaves the prefix cache aside.
            out[label] = answer(llm, prompt, None if task["prefix_caching"] else 0, *seed)
        elif kind == "reload":
            llm.collective_rpc("reload_weights", kwargs={"weights_path": said[0]})
            llm.reset_prefix_cache()
            llm.reset_mm_cache()
            llm.llm_engine.reset_encoder_cache()  # a picture seen before would be looked for where it no longer is
        else:
            (name,) = said
            for path, value in (stock if kind == "without" else fixed)[name].items():
                owner, _, attribute = path.rpartition(".")
                setattr(find(owner), attribute, value)
    return out


def answer(llm, prompt: dict, prompt_logprobs: int | None, seed: int | None = None) -> dict:
    """Greedy, or with a seed sampled."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0 if seed is None else 1,
        seed=seed,
        max_tokens=4,
        logprobs=0,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=True,
        detokenize=False,
    )
    (one,) = llm.generate([prompt], params, use_tqdm=False)
    ids, new = list(one.prompt_token_ids), one.outputs[0]
    of_prompt = []
    if prompt_logprobs is not None:
        of_prompt = [place[token].logprob for token, place in zip(ids[1:], one.prompt_logprobs[1:], strict=True)]
    return {
        "ids": ids,
        "logprobs": of_prompt,
        "new": list(new.token_ids),
        "new_logprobs": [place[token].logprob for token, place in zip(new.token_ids, new.logprobs, strict=True)],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
