"""Rewards of a user's own, some of them bad."""

import os
import time


def hangs(attempt, expected):
    time.sleep(60)


def dies(attempt, expected):
    os._exit(3)


def eats(attempt, expected):
    return len(bytearray(8 * 2**30))


def raises(attempt, expected):
    raise RuntimeError("broken")


def halves(attempt, accuracy, *, by=2):
    return (accuracy or 0) / by
