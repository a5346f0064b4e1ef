"""`ernie dashboard`: the local web page with the curves of all runs that were logged with tracker=trackio.

It reads trackio's own folder (environment variable TRACKIO_DIR, by default ~/.cache/huggingface/trackio), answers on
this machine only, and needs neither an account nor a network.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C; the exit code."""
    parser = argparse.ArgumentParser(prog="ernie dashboard", description="Open the local page with your runs' curves.")
    parser.add_argument("--project", help="show this project's runs (default: choose on the page)")
    parser.add_argument("--port", type=int, help="port to answer on (default: the first free one from 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    options = parser.parse_args(arguments)

    # trackio asks a hub for the user's name where it may. A local page needs no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "TRACKIO_PLOT_ORDER", "loss,accuracy,eval/accuracy,eval/*,loss/*,speed/*,router/*,batch/*,layer/*"
    )
    import trackio
    from trackio.utils import TRACKIO_DIR

    folder = Path(TRACKIO_DIR)
    projects = sorted(path.stem for path in folder.glob("*.db"))
    if options.project is not None and options.project not in projects:
        known = f"It holds: {', '.join(projects)}." if projects else "It holds none: train something first."
        print(f"--project {options.project}: there is no such project in {folder}. {known}", file=sys.stderr)
        return 1
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # advice about sharing the page's write token
            server, url, _, _ = trackio.show(
                project=options.project,
                host=options.host,
                server_port=options.port,
                open_browser=not options.no_browser,
                block_thread=False,
            )
    except OSError as error:
        taken = f"--port {options.port}: " if options.port else ""
        print(f"{taken}the dashboard could not start: {error}", file=sys.stderr)
        return 1
    # The next line is read by whoever starts this program and wants to know the address, tests among them.
    print(f"dashboard: {url}", flush=True)
    print(f"projects in {folder}: {', '.join(projects) or 'none yet; they appear when a run starts'}", flush=True)
    print("Ctrl-C stops it.", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        server.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
