"""Where the time of a rollout and its updates goes, in seconds.

seconds_asking        prompts, sampling, tools, and scores that come meanwhile
seconds_scoring       scores that come when all is asked
seconds_encoding      attempts to rows
seconds_old_logprobs  the forward pass for the updates after the first
seconds_weights       what the engine takes to begin and to end: weights that are copied or sent
seconds_update        forward, backward, optimizer: of all updates of the rollout
seconds_rollout       all of that
seconds_idle          of asking and scoring, what no step of this rank's engine was computed in: pictures of prompts
                      that are read before the first, tools, rewards, other ranks
"""

from collections.abc import Mapping

PARTS = ("asking", "scoring", "encoding", "old_logprobs", "weights", "update")


def time_metrics(metrics: Mapping[str, float], updates: int) -> dict[str, float]:
    """What follows from an update's metrics: those of its rollout, step_s, and data_wait as a share of it.

    Args:
        updates: of a rollout; all are taken to last as long as this one.
    """
    if "seconds_asking" not in metrics or "step_s" not in metrics:
        return {}
    update = updates * metrics["step_s"] * (1 - metrics.get("data_wait", 0.0))
    whole = sum(metrics.get(f"seconds_{name}", 0.0) for name in PARTS[:-1]) + update
    out = {"seconds_update": update, "seconds_rollout": whole}
    if "seconds_engine" in metrics:
        waited = metrics["seconds_asking"] + metrics.get("seconds_scoring", 0.0) - metrics["seconds_engine"]
        out["seconds_idle"] = max(0.0, waited)
    return out


def time_line(metrics: Mapping[str, float]) -> str:
    """For a terminal."""
    whole = max(metrics["seconds_rollout"], 1e-9)

    def share(name: str) -> str:
        return f"{metrics.get(f'seconds_{name}', 0.0) / whole:.0%}"

    words = [f"{name.replace('_', ' ')} {share(name)}" for name in PARTS]
    idle = f"; idle {share('idle')}" if "seconds_idle" in metrics else ""
    return f"time      a rollout with its updates takes {whole:.1f} s: {', '.join(words)}{idle}"
