"""A user's function as a tool, in a process of its own that can be killed.

    here                              there:  ernie_model/worker.py
    tool_from_path("module.function")
      start  ────────────────────────►  import module
             ◄────────────────────────  name, description, schema     | why it is not a tool
    tool.run(arguments, context)
      call   ────────────────────────►  function(**arguments)
             ◄────────────────────────  ToolResult, within its limits | what it raised
      late, or nobody waits any longer: the process and all it started are killed; the next call starts another

The module is never imported here: what it does on import, and the memory it takes, stay there. A process serves one
call at a time; several calls at once take up to `MAX_PROCESSES`, and more wait for their turn, which does not count as
the tool's time. What the function prints goes to stderr.
"""

import importlib
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from ernie_model.inference.tools import (
    ERROR_CHARS,
    TOOL_ATTRIBUTE,
    Tool,
    ToolContext,
    ToolError,
    ToolResult,
    bounded,
    took_too_long,
    what_happened,
)
from ernie_model.worker import Worker

MAX_PROCESSES = 4
START_S = 60.0
"""Importing the module may take so long; it does not count as the tool's time."""


def tool_from_path(path: str) -> Tool:
    """The function `module.function` that `tools.tool` marks. Its first process starts at once.

    Raises:
        ValueError: it cannot be imported, or is not marked as a tool; the message says which.
    """
    module, _, function = path.rpartition(".")
    if not (module and function):
        raise ValueError(f"python:{path} must be python:module.function.")
    processes = _Processes(path)
    first = processes.take(START_S)
    processes.give_back(first)
    processes.name = first.definition["name"]
    sees_context = first.definition["sees_context"]

    def run(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        seen = replace(context, given_up=None) if sees_context else ToolContext(limits=context.limits)
        return processes.run(arguments, seen, context.given_up or threading.Event())

    return Tool(**first.definition, run=run, keeps_limits=True)


class _Processes:
    """Up to MAX_PROCESSES for one function. Any thread may call `run`."""

    def __init__(self, path: str):
        self.path = self.name = path
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(MAX_PROCESSES):
            self._free.put(None)  # may be started

    def run(self, arguments: dict[str, Any], context: ToolContext, given_up: threading.Event) -> ToolResult:
        time_s = context.limits.tool_time_s
        process = self.take(context.limits.time_s)
        try:
            if given_up.is_set():
                raise ToolError(f"{self.name} was not called.")
            outcome = process.call((arguments, context), time_s, given_up)
        except TimeoutError:
            process.kill()
            return ToolResult.failure(took_too_long(self.name, time_s))
        except (EOFError, OSError) as error:
            process.kill()
            raise ToolError(f"{self.name} ended its process{process.how_it_ended()}.") from error
        finally:
            self.give_back(process if process.alive else None)
        if isinstance(outcome, ToolResult):
            return outcome
        raise ToolError(outcome)

    def take(self, time_s: float) -> "_Process":
        try:
            process = self._free.get(timeout=time_s)
        except queue.Empty:
            raise ToolError(f"{self.name} is busy with {MAX_PROCESSES} calls.") from None
        if process is not None and process.alive:
            return process
        try:
            return _Process(self.path)
        except BaseException:
            self._free.put(None)
            raise

    def give_back(self, process: "_Process | None") -> None:
        self._free.put(process)


class _Process:
    """Raises ValueError: what `path` names is not a tool."""

    def __init__(self, path: str):
        self._worker = Worker(__name__, path)
        self.kill, self.call, self.how_it_ended = self._worker.kill, self._worker.call, self._worker.how_it_ended
        try:
            answer = self._worker.hello(START_S)
        except TimeoutError:
            self.kill()
            raise ValueError(f"python:{path}: importing it took longer than {START_S:g} s.") from None
        except (EOFError, OSError):
            self.kill()
            raise ValueError(f"python:{path}: importing it ended its process{self.how_it_ended()}.") from None
        if isinstance(answer, str):
            self.kill()
            raise ValueError(answer)
        self.definition: dict[str, Any] = answer

    @property
    def alive(self) -> bool:
        return self._worker.alive


# ---------------------------------------------------------------------------------------------------------------- there


def serve(connection: Connection, path: str) -> None:
    """Answer calls until the other side is gone."""
    try:
        tool = _imported(path)
    except BaseException as error:
        connection.send(str(error)[:ERROR_CHARS])
        return
    definition = dict(name=tool.name, description=tool.description, parameters=dict(tool.parameters))
    connection.send(definition | dict(sees_context=tool.sees_context))
    while True:
        try:
            arguments, context = connection.recv()
        except EOFError:
            return
        outcome: ToolResult | str
        try:
            outcome = bounded(tool.run(arguments, context), context.limits)
        except Exception as error:
            outcome = what_happened(tool.name, error)
        connection.send(outcome)


def _imported(path: str) -> Tool:
    module, _, function = path.rpartition(".")
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), function, None)
    except BaseException as error:
        raise ValueError(f"python:{path}: importing {module} failed: {type(error).__name__}: {error}") from error
    if found is None:
        raise ValueError(f"python:{path}: {module} has no {function}.")
    tool = getattr(found, TOOL_ATTRIBUTE, None)
    if tool is None:
        raise ValueError(
            f"python:{path} is not a tool. Mark the function with @tool(SCHEMA) of ernie_model.inference.tools."
        )
    return tool
