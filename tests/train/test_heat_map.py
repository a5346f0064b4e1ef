"""The picture of the experts' load: colours by hand, and pixels where they belong."""

import pytest
import torch
from PIL import Image, ImageColor

from train.heat_map import DEAD, LESS, MORE, colour, draw
from train.telemetry import Layers


def test_colours_by_hand():
    assert colour(1.0) == (247, 247, 247)
    assert colour(4.0) == colour(64.0) == MORE and colour(0.25) == colour(0.01) == LESS
    assert colour(2.0) == tuple(round((247 + end) / 2) for end in MORE)  # one of two powers of two
    assert colour(0) == DEAD


@pytest.mark.parametrize("experts", [2, 8, 64, 300])
def test_every_expert_of_every_layer_is_drawn(tmp_path, experts):
    """Even loads but for one dead expert, the last one of the second layer, and the first of the third with all."""
    share_LE = torch.ones(3, experts)
    share_LE[1, -1] = 0
    share_LE[2] = 0
    share_LE[2, 0] = experts * 4
    draw(Layers((1, 2, 5), share_LE, torch.ones(3), torch.zeros(3)), tmp_path / "a.png", "text experts, step 3")
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    black = ImageColor.getrgb(DEAD)
    # the rows of the three layers, by the colours on the left edge and at the right end of the cells
    cell = max(8, min(60, 840 // experts))
    left, top = 70, 24 + 36 + 40
    middle = [top + 22 * layer + 10 for layer in range(3)]
    first, last = left + cell // 2 - 1, left + (experts - 1) * cell + cell // 2 - 1
    seen = [[picture.getpixel((x, y)) for x in (first, last)] for y in middle]
    assert seen == [[(247,) * 3, (247,) * 3], [(247,) * 3, black], [MORE, black]]
    assert picture.width < 3000
