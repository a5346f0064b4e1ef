"""`ernie serve`: a model behind an address that speaks OpenAI's chat completions (docs/serving.md).

ernie serve checkpoint=runs/digits                          http://127.0.0.1:8000/v1
ernie serve checkpoint=runs/digits --ui                     and a page to chat with
ernie serve checkpoint=runs/zoom agent.tools=[image_zoom_in_tool]       tools that the server runs
ernie serve checkpoint=... host=0.0.0.0 api_key_file=keys   for other machines, which must send a key

SIGTERM and Ctrl-C let what runs finish within grace_s; a second one ends at once.
"""

import asyncio
import errno
import os
import socket
import sys
from pathlib import Path

from fastapi import FastAPI
from omegaconf import DictConfig

from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.moderation import Moderation
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.lifetime import EngineFailed, address, bind, serve
from ernie_model.inference.server.settings import ServerSettings
from train.agents import open_filters, open_toolbox, sampling_params
from train.compose import to_typed
from train.config import UserError, check
from train.inference_config import AgentConfig, ServeConfig
from train.run import program
from train.served import open_engine, open_model, weights_folder
from train.serving.media import MediaDoor


@program("serve")
def main(cfg: DictConfig) -> None:
    config = to_typed(cfg, ServeConfig)
    keys = read_keys(config)
    door, filters, params = media_door(config), moderation(config.agent), sampling_params(config.sampling)
    check_index(config.agent)
    listener = listen(config)  # before the weights: a port that is taken is known at once
    try:
        served = open_model(config)
        toolbox, engine = open_toolbox(config.agent, served), open_engine(config, served)
        settings = ServerSettings(
            name=config.name or model_name(config.checkpoint),
            keys=keys,
            limits=config.limits,
            sampling=params,
            moderation=filters,
            toolbox=toolbox,
            agent=config.agent,
            thinking=config.sampling.thinking,
        )
        asyncio.run(run(config, AsyncEngine(engine), served.processor, settings, door, listener))
    finally:
        listener.close()


async def run(config, engine, processor, settings, door, listener) -> None:
    app = make_app(engine, processor, settings, opener=door, engine_stats=engine.stats)
    if config.ui:
        app = page(app)
    try:
        await serve(app, listener, grace_s=config.grace_s, ready=lambda: tell(config, settings, address(listener)))
    except EngineFailed:
        sys.exit(1)
    finally:
        await engine.close(drain=False)


def page(app: FastAPI) -> FastAPI:
    """With the page mounted. Raises UserError: gradio is not installed."""
    try:
        from train.serving.page import add_page
    except ImportError as error:
        raise UserError(f"ui=true needs gradio ({error}). pip install 'ernie-train[ui]'") from error
    return add_page(app)


def tell(config: ServeConfig, settings: ServerSettings, url: str) -> None:
    """Where the server is and how to ask it."""
    key = " -H 'authorization: Bearer KEY'" if settings.keys else ""
    body = f'{{"model": "{settings.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    # The next line is read by whoever starts this program and wants to know the address, tests among them.
    print(f"serving: {settings.name} at {url}/v1", flush=True)
    if config.ui:
        print(f"page:    {url}/ui", flush=True)
    if settings.toolbox.tools:
        print(f"tools:   {', '.join(settings.toolbox.tools)}", flush=True)
    print(f"try:     curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'", flush=True)
    if not settings.keys and config.host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"warning: host={config.host} lets other machines in, and no key is asked for (api_key_file).", flush=True
        )


# -------------------------------------------------------------------------------------------------------- settings


def listen(config: ServeConfig) -> socket.socket:
    """Raises UserError: the address cannot be had."""
    try:
        return bind(config.host, config.port, lag_s=config.limits.lag_s)
    except OSError as error:
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        way_out = (
            "Name an address of this machine; 0.0.0.0 is all." if unknown else "Choose another port (0: a free one)."
        )
        raise UserError(f"host={config.host} port={config.port}: {error.strerror or error}. {way_out}") from error


def read_keys(config: ServeConfig) -> tuple[str, ...]:
    """Of the setting, the file and the environment together.

    Raises:
        UserError: a file without keys; a key that a header cannot carry.
    """
    keys = [key for key in (config.api_key, os.environ.get("ERNIE_API_KEY")) if key]
    if config.api_key_file is not None:
        try:
            lines = Path(config.api_key_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"api_key_file={config.api_key_file} cannot be read ({error}).") from error
        found = [line.strip() for line in lines if line.strip()]
        check(bool(found), f"api_key_file={config.api_key_file} holds no key. Write one in a line.")
        keys += found
    for key in keys:
        check(
            key.isascii() and key.isprintable() and " " not in key,
            "a key has a space or a letter that a header cannot carry. Use ASCII letters and digits.",
        )
    return tuple(dict.fromkeys(keys))


def media_door(config: ServeConfig) -> MediaDoor:
    """Raises UserError: media_root is no folder."""
    root = None if config.media_root is None else Path(config.media_root)
    check(root is None or root.is_dir(), f"media_root={config.media_root} is not a folder.")
    return MediaDoor(media_root=root, fetch=config.fetch, limits=config.limits)


def check_index(config: AgentConfig) -> None:
    """Raises UserError: an index that nothing looks into."""
    check(
        config.index is None or "image_search" in config.tools,
        f"agent.index={config.index} is for image_search, which is not among agent.tools. Add it, or leave it out.",
    )


def moderation(config: AgentConfig) -> Moderation:
    """Raises UserError: a filter that is none."""
    return Moderation(
        input=open_filters(config.input_filters, "agent.input_filters"),
        output=open_filters(config.output_filters, "agent.output_filters"),
    )


def model_name(checkpoint: str) -> str:
    """`runs/digits`, `runs/digits/export` -> `digits`; a hub id is its own name."""
    folder = Path(weights_folder(checkpoint))
    if not folder.exists():
        return checkpoint
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("export", "best") else folder.name


if __name__ == "__main__":
    sys.argv = ["ui=true" if argument == "--ui" else argument for argument in sys.argv]
    main()
