"""The `ernie` command: one word per program.

    ernie sft experiment=digits      is      python -m train.sft experiment=digits

Each command runs its module exactly as `python -m` does, so `accelerate launch -m train.sft ...` is the same program.
This file imports nothing heavy: `ernie --help` has to answer at once.
"""

import difflib
import importlib.metadata
import os
import re
import runpy
import sys

COMMANDS = {
    "sft": ("train.sft", "fine-tune on conversations with text, images and video"),
    "dpo": ("train.dpo", "make one of two answers to a prompt likelier than the other"),
    "rl": ("train.rl", "let a model answer, judge its answers, and make the better ones likelier"),
    "doctor": ("train.doctor", "look at machine, settings, checkpoint and every record before training"),
    "plan": ("train.plan", "what a layout of ranks takes: memory, traffic, time; and which layouts fit"),
    "preview": ("train.preview", "see what a run would be shown: pictures, tokens, packed rows, as a page"),
    "export": ("train.export", "write a checkpoint of a run as a folder that transformers and vLLM load"),
    "convert": ("train.convert", "turn records of one format into another"),
    "chat": ("train.chat", "talk to a model in the terminal, with pictures, videos and tools"),
    "index": ("train.index", "make a folder of pictures searchable by picture, for the tool image_search"),
    "serve": ("train.serve", "put a model behind an OpenAI-compatible address, with a page to chat with"),
    "evaluate": ("train.evaluate", "ask a model the questions of tasks or of your own file, and score its answers"),
    "pairs": ("train.make_pairs", "make pairs of right and wrong answers from what a model writes, for `ernie dpo`"),
    "compare": ("train.compare", "two evaluations of the same questions, with a paired test"),
    "dashboard": ("train.dashboard", "open the local page with the curves of your runs"),
}

EXAMPLES = """\
examples:
  ernie sft experiment=digits                        learn to read handwriting, on a CPU, in minutes
  ernie sft data=files data.path=chats.jsonl         your own conversations
  ernie doctor data=files data.path=chats.jsonl      what is wrong with it, before training
  ernie dpo model.checkpoint=runs/sft/export data.path=pairs.jsonl
                                                     prefer one answer to another
  ernie doctor dpo data.path=pairs.jsonl             the same look, at pairs
  ernie evaluate checkpoint=runs/digits tasks=[digits]
                                                     how good a model is, on tasks and on your own questions
  ernie sft experiment=digits --cfg job              show the settings and stop
"""


def main(arguments: list[str] | None = None) -> int:
    """Run `ernie ARGUMENTS`; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(f"ernie-train {importlib.metadata.version('ernie-train')}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean: ernie {' '.join([near[0], *rest])}" if near else " See: ernie --help"
        print(f"ernie: there is no command {command!r}.{hint}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    sys.argv = [f"ernie {command}", *rest]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "")
        if extra is None:
            raise
        print(f"error: ernie {command} needs {error.name}: pip install 'ernie-train[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("ERNIE_DEBUG", "0") not in ("", "0"):
            raise
        print("stopped.", file=sys.stderr)
        return 130
    return 0


def extra_of(module: str) -> str | None:
    """The extra of this package that brings a module that is not installed."""
    for requirement in importlib.metadata.requires("ernie-train") or ():
        distribution, extra = re.match(r"[\w.-]+", requirement), re.search(r"""extra == ["']([\w-]+)""", requirement)
        if distribution and extra and distribution[0].replace("-", "_").lower() == module.partition(".")[0]:
            return extra[1]
    return None


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: ernie COMMAND [key=value ...]\n\ncommands:\n{commands}\n\n{EXAMPLES}"


if __name__ == "__main__":
    sys.exit(main())
