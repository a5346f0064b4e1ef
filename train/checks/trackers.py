"""Whether the chosen trackers could take a run's numbers. Nothing is sent and no run is started."""

import importlib.util
import netrc
import os
import socket
from pathlib import Path

from train.checks.findings import Finding, ok, problem, warning
from train.checks.machine import existing_parent
from train.config import TrackerConfig

WANDB_HOST = "api.wandb.ai"
TIMEOUT_S = 3


def check_trackers(config: TrackerConfig) -> list[Finding]:
    checks = {"trackio": check_trackio, "tensorboard": check_tensorboard, "wandb": check_wandb}
    return [checks[name]() for name in config.names if name != "none"] or [ok("metrics.jsonl only")]


def check_trackio() -> Finding:
    default = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "trackio"
    folder = Path(os.environ.get("TRACKIO_DIR") or default)
    existing = existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return problem(
            f"tracker=trackio: its folder {folder} cannot be written. Set TRACKIO_DIR to another folder, or leave "
            "trackio out of tracker=..."
        )
    return ok(f"trackio writes to {folder}")


def check_tensorboard() -> Finding:
    if importlib.util.find_spec("tensorboard") is None:
        return problem("tracker=tensorboard: the package is missing. pip install 'ernie-train[tensorboard]'")
    return ok("tensorboard writes to the run folder")


def check_wandb() -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return problem("tracker=wandb: the package is missing. pip install 'ernie-train[wandb]'")
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return ok("wandb keeps the run in the run folder (WANDB_MODE)")
    if not has_wandb_key():
        return warning(
            "tracker=wandb: there is no key, so the run stays in the run folder. `wandb login` once, or WANDB_API_KEY."
        )
    host = os.environ.get("WANDB_BASE_URL", f"https://{WANDB_HOST}").split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return problem(
            f"tracker=wandb: {host} cannot be reached ({error}). Check the network, or WANDB_MODE=offline to keep the "
            "run here."
        )
    return ok(f"wandb has a key, and {host} answers")


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
