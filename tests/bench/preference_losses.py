"""One pair by every preference loss: ours, the number of the reference, and what TRL's own code gives.

python -m tests.bench.preference_losses
"""

from data.batch import Role
from tests.train.objectives import trl_oracle
from tests.train.objectives.rows import pair, row, settings
from tests.train.objectives.test_kto import ANSWERS
from tests.train.objectives.test_preference import NUMBERS
from train.objectives.dpo import build
from train.objectives.kto import Divergence

LABELLED = (("kto", 1.0, 0.4733732871), ("kto", 2.0, 0.6333768404), ("apo_zero_unpaired", 1.0, None))
"""Loss, weight of unwanted answers, mean over three answers whose divergence is 0.3."""


def main() -> None:
    print(f"{'settings':82} {'ours':>13} {'expected':>13} {'TRL':>13}")
    for case in NUMBERS:
        config = settings(case.loss, **case.keys)
        ours = build(config).loss(*row(pair(*case.record))).total.item()
        keys = " ".join(f"{key}={getattr(value, 'value', value)}" for key, value in case.keys.items())
        show(f"{case.loss} {keys}", ours, case.at_pair, trl_oracle.loss_of(config, *case.record[:2]))
    for loss, weight, expected in LABELLED:
        config = settings(loss, undesirable_weight=weight)
        divergence = Divergence(config)
        divergence.estimate[Role.MISMATCHED] = 0.3 if loss == "kto" else 0.0
        ours = build(config, divergence).loss(*row(*ANSWERS)).total.item() / len(ANSWERS)
        labelled = [(said, role is Role.WANTED) for record in ANSWERS for role, said in record.items()]
        show(f"{loss} undesirable_weight={weight}", ours, expected, trl_oracle.kto(labelled, 0.3, loss, (1.0, weight)))


def show(settings: str, ours: float, *others: float | None) -> None:
    numbers = " ".join(f"{'-' if value is None else f'{value:.10g}':>13}" for value in (ours, *others))
    print(f"{settings:82} {numbers}")


if __name__ == "__main__":
    main()
