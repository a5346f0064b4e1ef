"""Searching a folder of pictures by picture: order, captions, what is computed again, whose index it is."""

import asyncio
import json
import shutil

import pytest
import torch
from PIL import Image, ImageDraw

from ernie_model.images import image_patches
from ernie_model.inference.image_index import (
    Embedder,
    ImageIndex,
    ImageIndexError,
    caption_of,
    image_search_tool,
    make_index,
)
from ernie_model.inference.tools import Limits, ToolBox, ToolContext
from ernie_model.model import ErnieModel

MAX_PIXELS = 112 * 112


@pytest.fixture(scope="module")
def model(vl_config) -> ErnieModel:
    torch.manual_seed(3)
    model = ErnieModel(vl_config)
    model.init_weights()
    return model.eval().requires_grad_(False)


class Counting(Embedder):
    count = 0

    def __call__(self, image):
        self.count += 1
        return super().__call__(image)


@pytest.fixture
def embedder(model, processor) -> Counting:
    return Counting(model, processor, MAX_PIXELS)


def draw(shape: str, colour: str, side: int = 84) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    paint = ImageDraw.Draw(picture)
    box = (side // 6, side // 6, side * 5 // 6, side * 5 // 6)
    paint.ellipse(box, fill=colour) if shape == "circle" else paint.rectangle(box, fill=colour)
    return picture


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub" / ".hidden").mkdir(parents=True)
    for shape in ("circle", "square"):
        for colour in ("red", "green", "blue"):
            draw(shape, colour).save(folder / "sub" / f"{colour}_{shape}.png")
    draw("circle", "red").save(folder / "sub" / ".hidden" / "no.png")
    (folder / "notes.md").write_text("no picture")
    return folder


def test_the_nearest_picture_is_the_same_picture(folder, tmp_path, embedder):
    report = make_index(folder, tmp_path / "index", embedder)
    assert len(report.computed) == 6 and report.kept == report.unreadable == ()
    index = ImageIndex.load(tmp_path / "index")
    assert [entry.file for entry in index.entries] == sorted(entry.file for entry in index.entries)
    for entry in index.entries:
        best, second, *_ = index.search(embedder(Image.open(folder / entry.file)), 6)
        assert best.file == entry.file and best.likeness == 1.0 and second.likeness < 1.0
    # Weights are random, which sees colours: of another size, the nearest are those of its colour.
    hits = index.search(embedder(draw("square", "blue", side=200)), 2)
    assert {hit.caption for hit in hits} == {"blue circle", "blue square"}


def test_an_embedding_by_hand(embedder, model, processor):
    picture = Image.new("RGB", (112, 56), "red")
    picture.paste("blue", (0, 0, 56, 28))
    embedding_F = embedder(picture)
    patch_PX, grid = image_patches(picture, processor.image)
    assert grid == (1, 4, 8)
    seen_PC = model.vision(torch.from_numpy(patch_PX), [grid])
    feature_MD = model.media_features(torch.from_numpy(patch_PX), [grid])
    # 2 rows of 4 tokens, 4 patches each; a quarter is one row of two tokens
    quarters = [seen_PC[start : start + 8].mean(0) for start in (0, 8, 16, 24)]
    where, what = torch.stack(quarters, dim=1).flatten(), feature_MD.mean(0)
    expected = torch.cat((where / where.norm(), what / what.norm())) / 2**0.5
    assert torch.allclose(embedding_F, expected, atol=1e-6)


def test_equal_pictures_are_ordered_by_name(tmp_path, embedder):
    folder = tmp_path / "same"
    folder.mkdir()
    for name in ("b.png", "B.png", "a1.png", "a10.png", "a2.png"):
        draw("circle", "red").save(folder / name)
    for number in range(20):
        draw("square", "blue").save(folder / f"z{number:02d}.bmp")
    make_index(folder, tmp_path / "index", embedder)
    hits = ImageIndex.load(tmp_path / "index").search(embedder(draw("circle", "red")), 8)
    assert [hit.file for hit in hits[:5]] == ["B.png", "a1.png", "a10.png", "a2.png", "b.png"]
    assert [hit.file for hit in hits[5:]] == ["z00.bmp", "z01.bmp", "z02.bmp"]


def test_only_what_changed_is_computed_again(folder, tmp_path, embedder):
    output = tmp_path / "index"
    make_index(folder, output, embedder)
    before = ImageIndex.load(output)
    assert embedder.count == 6
    (folder / "sub" / "red_circle.png").rename(folder / "moved.png")
    (folder / "sub" / "green_circle.png").unlink()
    draw("circle", "yellow").save(folder / "sub" / "blue_circle.png")
    (folder / "moved.txt").write_text("A red\n circle ")
    report = make_index(folder, output, embedder)
    assert embedder.count == 7 and report.computed == ("sub/blue_circle.png",) and len(report.kept) == 4
    after = ImageIndex.load(output)
    assert [entry.file for entry in after.entries][:2] == ["moved.png", "sub/blue_circle.png"]
    assert after.entries[0].caption == "A red circle"
    row = [entry.file for entry in before.entries].index("sub/red_circle.png")
    assert torch.equal(after.embedding_NF[0], before.embedding_NF[row])
    # At another size all are computed; and again the same bytes come out as the first time.
    make_index(folder, output, Counting(embedder.model, embedder.processor, MAX_PIXELS // 2))
    make_index(folder, output, embedder)
    assert embedder.count == 7 + 5
    assert torch.equal(ImageIndex.load(output).embedding_NF, after.embedding_NF)


@pytest.mark.parametrize("output", [".", "pictures", "pictures/sub"])
def test_a_folder_of_other_files_is_not_written_over(folder, tmp_path, embedder, output):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ImageIndexError, match=f"output={tmp_path / output} holds '.*', which is no part of an index"):
        make_index(folder, tmp_path / output, embedder)
    assert sorted(tmp_path.rglob("*")) == before and embedder.count == 0


def test_an_index_inside_its_folder_moves_with_it(folder, tmp_path, embedder):
    make_index(folder, folder / ".ernie_index", embedder)
    shutil.move(folder, tmp_path / "elsewhere")
    index = ImageIndex.load(tmp_path / "elsewhere" / ".ernie_index")
    assert index.folder == (tmp_path / "elsewhere").resolve() and (index.folder / index.entries[0].file).is_file()


def test_pictures_that_cannot_be_read_are_named_and_left_out(folder, tmp_path, embedder):
    (folder / "broken.jpg").write_bytes(b"no picture")
    report = make_index(folder, tmp_path / "index", embedder)
    ((file, problem),) = report.unreadable
    assert file == "broken.jpg" and "cannot be decoded" in problem
    assert len(ImageIndex.load(tmp_path / "index").entries) == 6


@pytest.mark.parametrize(
    "beside, content, caption",
    [
        (None, "", "a red circle"),
        ("a_red-circle.txt", " It is\n  red. ", "It is red."),
        ("a_red-circle.txt", "", "a red circle"),
        ("a_red-circle.json", '{"caption": "Red."}', "Red."),
        ("a_red-circle.json", '{"title": "Red."}', "a red circle"),
        ("a_red-circle.json", '{"caption": 3}', "a red circle"),
        ("a_red-circle.txt", "x" * 5000, "x" * 1000),
    ],
)
def test_captions(tmp_path, beside, content, caption):
    if beside:
        (tmp_path / beside).write_text(content)
    assert caption_of(tmp_path / "a_red-circle.png") == caption


def test_what_cannot_be_an_index_says_why(folder, tmp_path, embedder, vl_config, processor):
    with pytest.raises(ImageIndexError, match="folder=.*nowhere is not a folder"):
        make_index(tmp_path / "nowhere", tmp_path / "index", embedder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageIndexError, match="no file ends in .png"):
        make_index(tmp_path / "empty", tmp_path / "index", embedder)
    with pytest.raises(ImageIndexError, match="holds no index.json. Make one: ernie index"):
        ImageIndex.load(tmp_path / "index")
    (folder / "sub" / "red_circle.json").write_text("{")
    with pytest.raises(ImageIndexError, match="red_circle.json cannot be read as a caption"):
        make_index(folder, tmp_path / "index", embedder)
    (folder / "sub" / "red_circle.json").unlink()
    make_index(folder, tmp_path / "index", embedder)
    raw = json.loads((tmp_path / "index" / "index.json").read_text())
    for change in ({"format": 2}, {"entries": raw["entries"][1:]}, {"entries": [{}]}):
        (tmp_path / "index" / "index.json").write_text(json.dumps(raw | change))
        with pytest.raises(ImageIndexError, match="cannot be read"):
            ImageIndex.load(tmp_path / "index")
    with pytest.raises(ValueError, match="text model"):
        Embedder(ErnieModel(vl_config.replace(vision=None)), processor, MAX_PIXELS)


def test_an_index_of_another_model_is_refused(folder, tmp_path, embedder, vl_config, processor, model):
    make_index(folder, tmp_path / "index", embedder)
    index = ImageIndex.load(tmp_path / "index")
    torch.manual_seed(4)
    other = ErnieModel(vl_config)
    other.init_weights()
    with pytest.raises(ImageIndexError, match="another vision tower"):
        image_search_tool(index, Embedder(other, processor, MAX_PIXELS))
    # What the vision tower is held in does not matter, nor what the rest of the model is.
    half = ErnieModel(vl_config)
    half.load_state_dict(model.state_dict())
    half.embed_tokens.weight.data.zero_()
    image_search_tool(index, Embedder(half.to(torch.bfloat16), processor, MAX_PIXELS))


def test_the_tool(folder, tmp_path, embedder):
    make_index(folder, tmp_path / "index", embedder)
    tools = ToolBox([image_search_tool(ImageIndex.load(tmp_path / "index"), embedder, count=2)])
    context = ToolContext((draw("circle", "green", 140), draw("square", "red")), (True, False), Limits())

    def search(number):
        return asyncio.run(tools.run("image_search", {"img_idx": number}, context))

    result = search(1)
    assert isinstance(result.parts[0], str) and result.parts[0] == "1. red square (likeness 1.00)\n"
    assert [image.size for image in result.images] == [(84, 84)] * 2
    assert search(0).parts[0].startswith("1. green circle")
    assert search(2).text == "error: img_idx is 2; the conversation has 2 images, counted from 0."
    assert search(-1).error and search("0").error and search(0.5).error
    (folder / "sub" / "red_square.png").unlink()
    assert search(1).parts[1] == "[the picture is gone]\n"
