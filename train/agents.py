"""Settings to an agent: tools, limits, sampling. What evaluate, serve and chat share above the engine."""

import importlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import cast

from ernie_model.inference.agent import Agent
from ernie_model.inference.image_index import Embedder, ImageIndex, ImageIndexError, image_search_tool
from ernie_model.inference.moderation import Filter, ListFilter, Moderation
from ernie_model.inference.request import Generates, RequestError, SamplingParams
from ernie_model.inference.tool_process import tool_from_path
from ernie_model.inference.tools import Tool, ToolBox, zoom_tool
from train.config import UserError
from train.inference_config import AgentConfig, ModelAtWork, SamplingConfig
from train.served import Served

BUILT_IN = ("image_zoom_in_tool", "image_search")
PYTHON = "python:"


def open_agent(config: ModelAtWork, served: Served, engine: Generates, *, tools: Iterable[str] = ()) -> Agent:
    """The agent that the settings describe.

    Args:
        tools: names beside those of `agent.tools`, such as the ones a task needs.

    Raises:
        UserError: a tool or filter that there isn't, or cannot be opened; a sampling setting outside its range.
    """
    return Agent(
        engine,
        served.processor,
        open_toolbox(config.agent, served, tools),
        config.agent,
        sampling_params(config.sampling),
        thinking=config.sampling.thinking,
        moderation=Moderation(
            input=open_filters(config.agent.input_filters, "agent.input_filters"),
            output=open_filters(config.agent.output_filters, "agent.output_filters"),
        ),
    )


def open_filters(names: Iterable[str], key: str) -> tuple[Filter, ...]:
    """Raises UserError: see `open_agent`. `key` is the setting that the names stand in."""
    return tuple(_open_filter(name, key) for name in names)


def _open_filter(name: str, key: str) -> Filter:
    if not name.startswith(PYTHON):
        try:
            return ListFilter(line for line in Path(name).read_text("utf-8").splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {name} cannot be read as a list of phrases, one a line ({error}).") from error
    module, _, function = name.removeprefix(PYTHON).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module does when it is imported
        raise UserError(f"{key}: {name} cannot be imported ({type(error).__name__}: {error}).") from error
    if not callable(found):
        raise UserError(f"{key}: {name} is no function.")
    return cast(Filter, found)


def open_toolbox(config: AgentConfig, served: Served, more: Iterable[str] = ()) -> ToolBox:
    """Raises UserError: see `open_agent`."""
    names = list(dict.fromkeys((*config.tools, *more)))
    try:
        return ToolBox([_open_tool(name, config, served) for name in names])
    except (ImageIndexError, ValueError) as error:
        raise UserError(f"agent.tools={names}: {error}") from error


def _open_tool(name: str, config: AgentConfig, served: Served) -> Tool:
    if name.startswith(PYTHON):
        return tool_from_path(name.removeprefix(PYTHON))
    if name == "image_zoom_in_tool":
        return zoom_tool()
    if name == "image_search":
        if config.index is None:
            raise ValueError("image_search needs agent.index, the folder that `ernie index` wrote.")
        index = ImageIndex.load(config.index)
        return image_search_tool(index, Embedder(served.model, served.processor, index.max_pixels))
    raise ValueError(f"there is no tool {name!r}; use {', '.join(BUILT_IN)} or {PYTHON}module.function.")


def sampling_params(config: SamplingConfig, *, seed: int | None = None) -> SamplingParams:
    """Raises UserError: a value outside its range."""
    make = partial(SamplingParams, seed=seed)
    try:
        return make(**{name: value for name, value in vars(config).items() if name != "thinking"})
    except RequestError as error:
        raise UserError(f"sampling.{error}") from error
