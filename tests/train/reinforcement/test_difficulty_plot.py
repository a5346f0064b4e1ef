"""The picture of a run's difficulty, checked by its areas."""

import pytest
from PIL import Image, ImageColor

from tests.train.reinforcement.test_difficulty import outcome, sampler
from train.chart import BLUE, GREEN, HEIGHT, RED, VIOLET, WIDTH
from train.reinforcement.difficulty import DifficultySampler
from train.reinforcement.difficulty_plot import draw, log
from train.reinforcement.groups import Outcome


def quarters(path) -> list[dict[tuple[int, int, int], int]]:
    """Colours of the four charts and how many pixels have them: difficulty, groups, beliefs, prompts."""
    with Image.open(path) as picture:
        middle, half = picture.width // 2, 72 + (picture.height - 72) // 2
        boxes = [
            (0, 72, middle, half),
            (middle, 72, picture.width, half),
            (0, half, middle, picture.height),
            (middle, half, picture.width, picture.height),
        ]
        parts = [picture.convert("RGB").crop(box).getcolors(1 << 24) for box in boxes]
    return [{colour: count for count, colour in part} for part in parts]


def played(rights: list[int], rollouts: int = 20, trained: int | None = 1) -> DifficultySampler:
    """A rollout asks as many prompts as there are entries, and each comes out as its entry says."""
    drawer = sampler(len(rights), max_expansion=1, rest_after=1000)
    for _ in range(rollouts):
        tickets = drawer.pick(len(rights))
        drawer.update([outcome(ticket, rights[ticket.prompt]) for ticket in tickets], trained=trained)
    return drawer


def test_groups_have_the_areas_of_what_became_of_them(tmp_path):
    draw(played([8, 8, 8, 0, 0, 3]), tmp_path / "difficulty.png", "title")
    _, groups, beliefs, prompts = quarters(tmp_path / "difficulty.png")
    unit = WIDTH * HEIGHT / 1.05 / 6
    area = {name: groups[ImageColor.getrgb(colour)] for name, colour in (("r", BLUE), ("w", RED), ("m", GREEN))}
    # The grid shines through nowhere; the line of what was trained covers two pixels of height.
    assert area["r"] == pytest.approx(3 * unit, rel=0.02)
    assert area["w"] == pytest.approx(2 * unit, rel=0.02)
    assert area["m"] == pytest.approx(unit, rel=0.07)
    # Six prompts in three bins of the belief: 3, 2 and 1 high.
    assert beliefs[ImageColor.getrgb(VIOLET)] == pytest.approx(6 / 3.24 * HEIGHT * (WIDTH / 10 - 2), rel=0.03)
    assert prompts[ImageColor.getrgb(GREEN)] == pytest.approx(WIDTH * HEIGHT, rel=0.03)


def test_pass_rates_are_shaded_where_they_lie(tmp_path):
    drawer = played([2], rollouts=4)
    draw(drawer, tmp_path / "difficulty.png", "title")
    difficulty, *_ = quarters(tmp_path / "difficulty.png")
    shade = max((count, colour) for colour, count in difficulty.items() if colour[0] < 245 and colour != (31, 35, 40))
    assert shade[0] == pytest.approx(WIDTH * HEIGHT / 8, rel=0.08)  # one row of eight, less the line of the mean
    with Image.open(tmp_path / "difficulty.png") as picture:
        column = [picture.convert("RGB").getpixel((300, y)) for y in range(picture.height // 2)]
    rows = [y for y, colour in enumerate(column) if colour == shade[1]]
    top = min(rows) - 0.75 * HEIGHT + HEIGHT / 16  # of the frame, if the row is centred at 2 of 8
    assert max(rows) == pytest.approx(top + 0.75 * HEIGHT + HEIGHT / 16, abs=2)


@pytest.mark.parametrize("trained", [None, 3])
@pytest.mark.parametrize("rollouts", [1, 2, 300])
def test_a_run_of_any_length_is_drawn(rollouts, trained, tmp_path):
    draw(played([8, 0, 3], rollouts, trained), tmp_path / "difficulty.png", "title")
    assert (tmp_path / "difficulty.png").stat().st_size > 5000


def test_rollouts_without_a_group_or_a_score_are_drawn(tmp_path):
    drawer = sampler(3)
    drawer.update([])
    (ticket,) = drawer.pick(1)
    drawer.update([Outcome(group=ticket.group, prompt=ticket.prompt, accuracies=(None,) * 8)])
    draw(drawer, tmp_path / "difficulty.png", "title")
    empty = sampler(3)
    empty.update([])
    draw(empty, tmp_path / "difficulty.png", "title")


def test_before_the_first_rollout_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no rollout is over yet"):
        draw(sampler(3), tmp_path / "difficulty.png", "title")


def test_the_picture_goes_into_the_folder_and_the_trackers(tmp_path):
    class Recorder:
        def log_image(self, name, path, step):
            seen.append((name, path, step, path.exists()))

    seen = []
    log(played([3, 8]), tmp_path, [Recorder(), Recorder()], 80)
    assert seen == [("difficulty", tmp_path / "difficulty.png", 80, True)] * 2
