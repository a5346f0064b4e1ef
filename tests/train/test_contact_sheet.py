"""Contact sheets, checked by their pixels."""

import pytest
from PIL import Image, ImageColor

from train.contact_sheet import CELL_SIDE, GAP, GREEN, MARGIN, RED, SheetItem, draw


def item(correct: bool, *, colour: str = "#102030", size: tuple[int, int] = (56, 56), answer: str = "1") -> SheetItem:
    return SheetItem(Image.new("RGB", size, colour), expected="7", answer=answer, correct=correct)


def count(sheet: Image.Image, colour: str) -> int:
    rgb = ImageColor.getrgb(colour)
    return sum(number for number, value in sheet.getcolors(maxcolors=1 << 24) if value == rgb)


def frame_area(side: int, width: int) -> int:
    return (side + 2 * width) ** 2 - side**2


def test_right_answers_have_a_thin_green_frame_and_no_red(tmp_path):
    draw([item(True), item(True)], tmp_path / "sheet.png", "title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert count(sheet, GREEN) == 2 * frame_area(112, 2)
        assert count(sheet, RED) == 0


def test_a_wrong_answer_has_a_thick_red_frame(tmp_path):
    draw([item(True), item(False)], tmp_path / "sheet.png", "title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert count(sheet, GREEN) == frame_area(112, 2)
        assert count(sheet, RED) >= frame_area(112, 6)  # the frame, and the words "said 1" and the count


def test_wrong_answers_come_first_and_are_never_the_ones_left_out(tmp_path):
    items = [item(True) for _ in range(30)] + [item(False, colour="#abcdef")]
    draw(items, tmp_path / "sheet.png", "title", max_items=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert count(sheet, "#abcdef") == 112 * 112
        assert count(sheet, GREEN) == 3 * frame_area(112, 2)
        first_cell = sheet.crop((MARGIN, 0, MARGIN + CELL_SIDE + GAP // 2, sheet.height))
        assert count(first_cell, "#abcdef") == 112 * 112


@pytest.mark.parametrize("size", [(8, 8), (56, 28), (28, 56), (2000, 1500), (3000, 1)])
def test_an_image_of_any_size_fits_its_cell(size, tmp_path):
    draw([item(True, colour="#abcdef", size=size)], tmp_path / "sheet.png", "title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        scale = 112 / max(size)
        assert count(sheet, "#abcdef") == max(1, round(size[0] * scale)) * max(1, round(size[1] * scale))


@pytest.mark.parametrize(
    "answer",
    ["", "a long answer that would run far past the edge of its image", "x" * 500, "一二三四五六七", "\n\t \x00"],
)
def test_any_answer_can_be_drawn_and_stays_under_its_image(answer, tmp_path):
    draw([item(False, answer=answer)], tmp_path / "sheet.png", "t")
    with Image.open(tmp_path / "sheet.png") as sheet:
        margin = sheet.crop((sheet.width - MARGIN + 8, 100, sheet.width, sheet.height))
        assert margin.getcolors() == [(margin.width * margin.height, (255, 255, 255))]


def test_no_items_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one item"):
        draw([], tmp_path / "sheet.png", "title")
