"""Did the tools that were called work?"""

from train.rewards.base import Attempt


def tool_success(attempt: Attempt, expected: str) -> float | None:
    """Calls whose tool answered without an error, over all calls; 0 without a call. `expected` is not looked at.

    Says nothing about the answer, so it is a figure beside another reward, never the only one to learn from.
    """
    if attempt.num_calls <= 0:
        return 0.0
    return min(max(1 - attempt.num_failed_calls / attempt.num_calls, 0.0), 1.0)
