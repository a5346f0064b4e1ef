"""What the vision tower made of images and videos, kept while there is room: the longest unused go first."""

from collections import OrderedDict

from torch import Tensor

from ernie_model.inference.request import MediaItem
from ernie_model.rope import Grid

Key = tuple[Grid, bytes]


def media_key(item: MediaItem) -> Key:
    """Equal pixels in another grid are another picture."""
    return item.grid, item.digest


class FeatureCache:
    """
    Args:
        max_bytes: what is larger than that is not kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._feature: OrderedDict[Key, Tensor] = OrderedDict()

    def get(self, key: Key) -> Tensor | None:
        feature_MD = self._feature.get(key)
        if feature_MD is not None:
            self._feature.move_to_end(key)
        return feature_MD

    def put(self, key: Key, feature_MD: Tensor) -> None:
        if key in self._feature or feature_MD.nbytes > self.max_bytes:
            return
        # a copy, if it is a part of something larger, which would stay for its sake
        whole = feature_MD.untyped_storage().nbytes() == feature_MD.nbytes
        self._feature[key] = feature_MD if whole else feature_MD.clone()
        self.bytes += feature_MD.nbytes
        while self.bytes > self.max_bytes:
            _, old = self._feature.popitem(last=False)
            self.bytes -= old.nbytes

    def clear(self) -> None:
        self._feature.clear()
        self.bytes = 0
