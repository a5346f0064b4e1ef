"""Runs under vLLM's Python: what its own `ernie45` parsers make of whole texts.

python ask_parsers.py FOLDER CASES.json OUT.json        CASES: [{"text", ...}]
"""

import json
import sys
from types import SimpleNamespace


def main(folder: str, cases_file: str, out_file: str) -> None:
    from transformers import AutoTokenizer
    from vllm.reasoning.ernie45_reasoning_parser import Ernie45ReasoningParser
    from vllm.tool_parsers.ernie45_tool_parser import Ernie45ToolParser

    tokenizer = AutoTokenizer.from_pretrained(folder)
    request = SimpleNamespace()  # neither of them looks at it
    out = []
    with open(cases_file, encoding="utf-8") as file:
        cases = json.load(file)
    for case in cases:
        reasoning, content = Ernie45ReasoningParser(tokenizer).extract_reasoning(case["text"], request)
        seen = {"text": case["text"], "reasoning": reasoning, "content": content}
        for key, text in (("tools", content or ""), ("tools_of_text", case["text"])):
            found = Ernie45ToolParser(tokenizer).extract_tool_calls(text, request)
            calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in found.tool_calls]
            seen[key] = {"called": found.tools_called, "content": found.content, "calls": calls}
        out.append(seen)
    with open(out_file, "w", encoding="utf-8") as file:
        json.dump(out, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
