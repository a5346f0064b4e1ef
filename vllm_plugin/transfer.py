"""How a running vLLM gets the weights of a training run: from a folder that both see, while requests wait.

    vllm serve FOLDER --weight-transfer-config '{"backend": "ernie"}'       with VLLM_SERVER_DEV_MODE=1

    POST /start_weight_update
    POST /update_weights   {"update_info": {"folder": "/runs/7/vllm/weights-12", "digest": "9f...", "never": [[5, 9]],
                                            "config": {"hidden_size": 2560, ...}}}
    POST /finish_weight_update

The folder holds safetensors in the hub's layout. One update is one folder, and all of it happens in the second call: a
trainer that is killed between calls leaves nothing half done in here. Before a weight is touched, every file is
opened: names and shapes must be those that the trainer has written (`digest`), and of the model that is served
(`config`). Afterwards every parameter of the model must have got values. vLLM itself does not ask: it would go on with
old values in the place of tensors that never came, and take of a larger one the part that fits.

`never` are ranges of ids that are never sampled, from its first id up to before its second: placeholders, and rows of
the embedding that no token belongs to. They are cut from the model's logits, since a bias for each of them in each
request would cost time and vLLM takes 1024 at most. So log-probabilities are those of the distribution without them.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BACKEND = "ernie"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "rms_norm_eps", "moe_num_experts", "moe_intermediate_size", "moe_k")
SIZES += ("moe_num_shared_experts",)
VISION_SIZES = ("depth", "hidden_size", "num_heads", "mlp_ratio", "patch_size")
"""What must be equal in both configurations."""


def register() -> None:
    """Raises ImportError: a vLLM without weight transfer."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "FolderTransfer")


def __getattr__(name: str) -> Any:
    """The class is made when vLLM asks for it: its base cannot be imported while vLLM looks for plugins."""
    if name != "FolderTransfer":
        raise AttributeError(name)
    globals()[name] = _make_class()
    return globals()[name]


def look(folder: str | Path) -> tuple[dict[str, Path], str]:
    """Name of each tensor -> its file; and a digest of names and shapes.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    from safetensors import safe_open

    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} is not there. Trainer and vLLM must see it under the same name.")
    found: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():
                found[name], shapes[name] = file, list(reader.get_slice(name).get_shape())
    return found, hashlib.blake2b(json.dumps(sorted(shapes.items())).encode(), digest_size=16).hexdigest()


def open_folder(folder: str, digest: str) -> dict[str, Path]:
    """Name of each tensor -> its file.

    Raises:
        FileNotFoundError, ValueError: the folder is not there, or not whole.
    """
    found, theirs = look(folder)
    if theirs != digest:
        raise ValueError(
            f"{folder} holds {len(found)} tensors that are not, by name and shape, those that were written."
        )
    return found


def check_sizes(theirs: Any, ours: dict[str, Any], names: tuple[str, ...] = SIZES, within: str = "") -> None:
    """
    Args:
        theirs: the configuration that vLLM has built its model from.
        ours: config.json of the weights.

    Raises:
        ValueError: they are of different models.
    """
    for name in names:
        mine, other = ours.get(name), getattr(theirs, name, None)
        if mine is not None and other is not None and _plain(mine) != _plain(other):
            raise ValueError(f"{within}{name} is {mine} in the weights and {other} in the model that vLLM serves.")
    if ours.get("vision_config") and getattr(theirs, "vision_config", None) is not None:
        check_sizes(theirs.vision_config, ours["vision_config"], VISION_SIZES, "vision_config.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def read(found: dict[str, Path]):
    """Name and values of each, one file after the other."""
    from safetensors import safe_open

    for file in dict.fromkeys(found.values()):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():
                yield name, reader.get_tensor(name)


def cut(model: Any, ranges: list[list[int]]) -> None:
    """Have `model.compute_logits` return -inf for ids in `ranges`."""
    stock = type(model).compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = stock(model, *args, **kwargs)
        if logits is not None:  # of several devices that share a model, one has them
            for start, stop in ranges:
                logits[..., start:stop] = float("-inf")
        return logits

    model.compute_logits = compute_logits


def _make_class() -> type:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Init(WeightTransferInitInfo):
        pass

    @dataclass
    class Update(WeightTransferUpdateInfo):
        folder: str
        digest: str
        never: list[list[int]] = field(default_factory=list)
        config: dict[str, Any] = field(default_factory=dict)

    class FolderTransfer(WeightTransferEngine):
        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        def start_weight_update(self) -> None:
            pass

        def finish_weight_update(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

        def receive_weights(self, update_info: Any) -> None:
            found = open_folder(update_info.folder, update_info.digest)
            check_sizes(self.model_config.hf_config, update_info.config)
            cut(self.model, update_info.never)
            wanted = {name for name, _ in self.model.named_parameters()}
            initialize_layerwise_reload(self.model)
            try:
                written = self.model.load_weights(read(found))
            finally:
                finalize_layerwise_reload(self.model, self.model_config)
            if absent := sorted(wanted - set(written)):
                raise ValueError(
                    f"{update_info.folder} has nothing for {len(absent)} parameters of the model that vLLM serves, "
                    f"among them {absent[0]}: it is another model."
                )

    return FolderTransfer
