"""Policy losses on attempts that are written down: ours, the number of the reference, and what TRL's own code gives.

python -m tests.bench.policy_losses
"""

from tests.train.objectives import trl_policy_oracle
from tests.train.objectives.attempts import settings, update
from tests.train.objectives.test_policy_gradient import NUMBERS


def main() -> None:
    print(f"{'block':8} {'settings':78} {'ours':>14} {'expected':>14} {'TRL':>14}   gradient as TRL's")
    for case in NUMBERS:
        config = settings(**case.keys)
        ours = update(config, case.attempts)
        theirs = trl_policy_oracle.learned(config, case.attempts)
        keys = " ".join(f"{key}={getattr(value, 'value', value)}" for key, value in case.keys.items())
        numbers = (ours.loss, case.loss, None if theirs is None else theirs[0])
        shown = " ".join(f"{'-' if value is None else f'{value:.10g}':>14}" for value in numbers)
        print(f"{case.block:8} {keys:78} {shown}   {'' if theirs is None else alike(ours.gradients, theirs[1])}")
    print(
        "TRL's gradient differs where an attempt has one ratio and its tokens have different weights (reference 2.4)."
    )


def alike(ours: list[list[float]], theirs: list[list[float]]) -> str:
    pairs = ((a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))
    return "yes" if all(abs(a - b) < 1e-7 for a, b in pairs) else "no"


if __name__ == "__main__":
    main()
