"""How good an answer is: small pure functions, the same for evaluation and reinforcement learning.

    exact anls edit_distance      text.py          grounding_f1 points     boxes.py
    number counting               number.py        temporal_iou            temporal.py
    multiple_choice               choice.py        json_fields json_valid  json_answer.py
    math                          equation.py      tool_success            tools.py
    python:module.function        registry.py

Each takes an `Attempt` and the right answer as text (base.py), and gives a number in [0, 1], or None where it cannot be
told. They read `attempt.answer` alone, what stands after the thought; only tool_success looks at the calls.

Reinforcement learning adds parts that look at how the answer was made, in [-1, 1]: shaping.py. docs/rewards.md lists
all of them.
"""
