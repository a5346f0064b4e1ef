"""What vLLM needs to compute ERNIE-4.5-VL as it was trained: a plugin that vLLM finds by itself where it is installed.

    this suite installed beside vLLM  (or this folder on PYTHONPATH and `vllm_plugin.register()`)  ->  vLLM calls
    `register` in each of its processes, before a model is built  ->  fixes.py mends what is wrong in that version,
    transfer.py lets a training run change the weights of a server that runs (docs/rl_vllm.md)

ERNIE_VLLM_FIXES names the fixes to apply: `all` (default), `none`, or a list such as `delimiters,router`.

Nothing is imported here but the standard library: vLLM imports this package while it imports itself. The files in
remote_code/ are written beside exported weights, for vLLM to read with `trust_remote_code`.
"""

import logging
import os

log = logging.getLogger(__name__)

applied: list[str] = []
"""The fixes that are at work in this process."""


def register() -> None:
    """The entry point `vllm.general_plugins`; may be called more than once.

    Raises:
        ValueError: ERNIE_VLLM_FIXES names a fix that does not exist.
    """
    from vllm_plugin import transfer
    from vllm_plugin.fixes import FIXES, why_not

    said = os.environ.get("ERNIE_VLLM_FIXES", "all")
    chosen = list(FIXES) if said == "all" else [] if said == "none" else said.split(",")
    for name in chosen:
        if name not in FIXES:
            raise ValueError(
                f"ERNIE_VLLM_FIXES={said}: there is no fix {name!r}; use all, none, or some of {', '.join(FIXES)}."
            )
        if name in applied:
            continue
        if reason := why_not(FIXES[name]):
            log.info("vllm_plugin: %s is not applied: %s", name, reason)
            continue
        FIXES[name].apply()
        applied.append(name)
    log.info("vllm_plugin: applied %s", ", ".join(applied) or "nothing")
    try:
        transfer.register()
    except ImportError as error:
        log.info("vllm_plugin: weights cannot be pushed to this version of vLLM: %s", error)
