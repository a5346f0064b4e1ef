"""Rewards of a user's own, most of them bad."""

import os
import subprocess
import sys
import time


def right(attempt, expected):
    return float(attempt.answer == expected)


def hangs(attempt, expected):
    """Also leaves a program behind."""
    with open(expected, "w") as file:
        file.write(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid))
    while True:
        time.sleep(1)


def dies(attempt, expected):
    os._exit(3)


def leaves(attempt, expected):
    sys.exit(3)


def eats(attempt, expected):
    return len(bytearray(8 * 2**30))


def raises(attempt, expected):
    raise RuntimeError("broken")


def returns_two(attempt, expected):
    return 2.0


def returns_nan(attempt, expected):
    return float("nan")


def does_not_know(attempt, expected):
    return None


def prints(attempt, expected):
    print("a" * 100_000)
    return 1.0


def halves(attempt, accuracy, *, by=2):
    return (accuracy or 0) / by


def minus_nine(attempt, accuracy):
    return -9


def even(attempt, expected):
    """What a random model wins half of the time."""
    return float(len(attempt.answer) % 2 == 0)


def vowels(attempt, expected):
    return min(sum(attempt.answer.lower().count(letter) for letter in "aeiou") / 4, 1.0)


def even_until(attempt, expected, *, attempts=20):
    """As `even`; when so many attempts were judged, the next ones wait until the file EXPECTED.go is there."""
    with open(expected, "a+") as judged:
        judged.write(".")
    while os.path.getsize(expected) > attempts and not os.path.exists(f"{expected}.go"):
        time.sleep(0.05)
    return even(attempt, expected)


def hangs_when_right(attempt, expected):
    while attempt.answer == expected:
        time.sleep(1)
    return 0.0
