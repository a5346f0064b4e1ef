"""README.md of an exported folder: what it is, how it was made, how it is loaded. The licence is the user's to say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ernie_model.config import ErnieConfig
from ernie_model.counting import count_parameters
from train.build import human


class Card(NamedTuple):
    """What is known about the weights."""

    name: str
    base: str | None
    method: str
    data: tuple[str, ...] = ()
    steps: int | None = None
    metrics: Mapping[str, float] = {}
    """Of the run's last evaluation, by name."""


def of_run(saved: Mapping[str, Any], run_folder: Path) -> Card:
    """From the settings of a checkpoint, and from metrics.jsonl of its run where that is still there."""
    settings, step = saved["settings"], saved["step"]
    peft = settings["peft"]
    if peft["kind"] == "none":
        frozen = settings["optim"].get("freeze") or []
        method = "supervised fine-tuning of all weights" + (f" but {', '.join(frozen)}" if frozen else "")
    else:
        parts = ", ".join(peft["targets"]) if peft.get("targets") else "all parts of the language model"
        method = f"supervised fine-tuning with LoRA (rank {peft['rank']}, alpha {peft['alpha']:g}) on {parts}"
    name = settings["run"].get("name") or run_folder.name
    return Card(
        name, settings["model"].get("checkpoint"), method, data_names(settings["data"]), step, metrics(run_folder)
    )


def data_names(data: Mapping[str, Any]) -> tuple[str, ...]:
    if data.get("sets"):
        return tuple(data["sets"])
    if data.get("path"):
        return (Path(data["path"]).name,)
    return (str(data.get("task") or data.get("kind")),)


def metrics(run_folder: Path) -> dict[str, float]:
    """eval_... of the last line that has any."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        values = {key: value for key, value in record.items() if key.startswith("eval_")}
        found = {key: value for key, value in values.items() if isinstance(value, int | float)} or found
    return found


def card(one: Card, config: ErnieConfig, *, folder: str, dtype: str, layout: str, bits: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        folder: what the weights' folder is called.
        layout: hub or vllm.
        bits: part -> int8, int4 or int2, of quantised weights.
    """
    count, is_vl = count_parameters(config), config.vision is not None
    tags = ["ernie4_5", *(["image-text-to-text"] if is_vl else ["text-generation"])]
    lines = ["---", "# license: say under which licence these weights may be used", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    if one.base and "/" in one.base and not Path(one.base).exists():
        lines += [f"base_model: {one.base}"]
    lines += ["---", "", f"# {one.name}", ""]
    kind = "vision-language model" if is_vl else "language model"
    lines += [
        f"An ERNIE-4.5 {kind} ({config.model_type}) of {human(count.total)} parameters, written by ernie-train.",
        "",
    ]
    lines += ["| | |", "|---|---|"]
    rows = [("base", one.base or "random weights"), ("method", one.method)]
    if one.data:
        rows.append(("data", ", ".join(one.data)))
    if one.steps is not None:
        rows.append(("updates", str(one.steps)))
    stored = f"{dtype}; routers float32"
    if bits:
        stored = ", ".join(f"{part} {scheme}" for part, scheme in bits.items()) + f"; the rest {stored}"
    rows.append(("weights", stored))
    lines += [f"| {key} | {value} |" for key, value in rows]
    if one.metrics:
        lines += ["", "Held-out, at the end of training:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {key.removeprefix('eval_')} | {value:.4g} |" for key, value in one.metrics.items()]
    lines += ["", "## Load", "", *how_to_load(config, folder=folder, layout=layout, quantised=bool(bits)), ""]
    lines += ["## Licence", "", "Not said yet. Weights that rest on others' follow the licence of those.", ""]
    return "\n".join(lines)


def how_to_load(config: ErnieConfig, *, folder: str, layout: str, quantised: bool) -> list[str]:
    is_vl = config.vision is not None
    ours = ["```bash", f"ernie chat checkpoint={folder}", f"ernie serve checkpoint={folder}", "```"]
    if quantised:
        return ["Only ernie-train reads these weights:", "", *ours]
    loader = "AutoModelForImageTextToText" if is_vl else "AutoModelForCausalLM"
    theirs = ["```python", f"from transformers import {loader}", f'model = {loader}.from_pretrained("{folder}")', "```"]
    served = f"vllm serve {folder}" + (" --trust-remote-code" if is_vl else "")
    vllm = ["```bash", served, "```"]
    if is_vl and layout == "vllm":
        return [
            "For vLLM, with ernie-train installed beside it: its plugin mends what vLLM 0.32 computes wrongly.",
            "",
            *vllm,
        ]
    other = [
        "",
        "vLLM reads it after `ernie export layout=vllm`." if is_vl else "vLLM:",
        *([] if is_vl else ["", *vllm]),
    ]
    return ["ernie-train:", "", *ours, "", "transformers 5 or later:", "", *theirs, *other]
