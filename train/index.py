"""`ernie index`: make a folder of pictures searchable by picture, for the tool image_search.

ernie index checkpoint=runs/search folder=catalogue                         writes catalogue/.ernie_index
ernie chat checkpoint=runs/search agent.tools=[image_search] agent.index=catalogue/.ernie_index

Run it again when pictures were added, changed, moved or removed: only those whose bytes are new are computed. Captions
are read from NAME.txt or NAME.json beside NAME.png; see ernie_model/inference/image_index.py.
"""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from ernie_model.inference.image_index import Embedder, ImageIndexError, make_index
from train.compose import to_typed
from train.config import UserError
from train.inference_config import IndexConfig
from train.run import program
from train.served import open_model


@program("index")
def main(cfg: DictConfig) -> None:
    for line in index_folder(to_typed(cfg, IndexConfig)):
        print(line)


def index_folder(config: IndexConfig) -> list[str]:
    """Make or renew the index; what was done, in lines.

    Raises:
        UserError: the folder holds no picture, or the model is a text model; and what `open_model` raises.
    """
    output = Path(config.output or Path(config.folder) / ".ernie_index")
    model, processor = open_model(config)
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("pictures")
            report = make_index(
                config.folder,
                output,
                Embedder(model, processor, config.max_pixels),
                on_picture=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except ImageIndexError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"checkpoint={config.checkpoint}: {error}") from error
    except OSError as error:
        raise UserError(f"output={output} cannot be written ({error}).") from error
    return [
        f"computed  {len(report.computed)}",
        f"kept      {len(report.kept)}",
        *(f"left out  {file}: {problem}" for file, problem in report.unreadable),
        f"written   {output}",
    ]


if __name__ == "__main__":
    main()
