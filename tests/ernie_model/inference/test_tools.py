"""Tools: arguments, time, sizes, errors as texts; the zoom's pixels."""

import asyncio
import os
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ernie_model.inference.tool_process import MAX_PROCESSES, tool_from_path
from ernie_model.inference.tools import (
    MAX_STUCK,
    TOKEN_SIDE,
    Limits,
    Tool,
    ToolBox,
    ToolContext,
    ToolError,
    ToolResult,
    as_result,
    bounded,
    crop,
    crop_box,
    tool,
    tool_from_function,
    zoom_tool,
)

ONE_NUMBER = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}


def call(box: ToolBox, name: str, arguments, context: ToolContext | None = None) -> ToolResult:
    return asyncio.run(box.run(name, arguments, context or ToolContext()))


def box_of(function, parameters=ONE_NUMBER) -> ToolBox:
    return ToolBox([tool_from_function(function, parameters, name="f", description="It.")])


def gradient(width: int, height: int) -> Image.Image:
    """Every pixel tells its column and row."""
    pixel_HW3 = np.zeros((height, width, 3), np.uint8)
    pixel_HW3[..., 0] = np.arange(width) % 256
    pixel_HW3[..., 1] = np.arange(height)[:, None] % 256
    return Image.fromarray(pixel_HW3)


# ----------------------------------------------------------------------------------------------------------------- zoom


@pytest.mark.parametrize(
    "bbox, size, pixels",
    [
        ([100, 200, 300, 400], (640, 480), (64, 96, 192, 192)),  # reference 5.3
        ([0, 0, 1000, 1000], (640, 480), (0, 0, 640, 480)),
        ([-50, 100.5, 2000, 1e9], (200, 100), (0, 10, 200, 100)),  # clamped
        ([333, 333, 667, 667], (100, 100), (33, 33, 67, 67)),  # rounded outwards: 33.3 down, 66.7 up
        ([0, 0, 10, 10], (100, 100), (0, 0, 1, 1)),  # exactly one pixel
    ],
)
def test_boxes_become_pixels(bbox, size, pixels):
    assert crop_box(bbox, *size) == pixels


@pytest.mark.parametrize(
    "bbox, problem",
    [
        ([300, 200, 100, 400], "x1 < x2"),
        ([100, 200, 100, 400], "x1 < x2"),
        ([1200, 0, 1300, 1000], "x1 < x2"),  # outside: nothing is left after clamping
        ([float("nan"), 0, 1, 1], "four numbers"),
        ([0, 0, float("inf"), 1], "four numbers"),
        ([0, 0, 9, 500], "less than one pixel"),  # 0.9 pixels of 100
        ([0, 0, 1000, 0.5], "less than one pixel"),
        ([0, 0, 1000, 10], None),  # 100 x 1: the longest that is allowed
        ([0, 0, 1000, 5], "times the other"),
    ],
)
def test_boxes_that_are_refused_say_why(bbox, problem):
    size = (202, 200) if problem == "times the other" else (100, 100)
    if problem is None:
        assert crop_box(bbox, *size) == (0, 0, 100, 1)
        return
    with pytest.raises(ToolError, match=problem):
        crop_box(bbox, *size)


@given(
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.integers(30, 400),
    st.integers(30, 400),
)
def test_a_crop_is_the_pixels_of_the_box_and_at_least_one_token_wide(corners, width, height):
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    picture = gradient(width, height)
    try:
        left, upper, right, lower = crop_box([x1, y1, x2, y2], width, height)
    except ToolError:
        return
    part = crop(picture, [x1, y1, x2, y2])
    assert 0 <= left <= x1 * width / 1000 < left + 1 and x2 * width / 1000 <= right <= width
    assert min(part.size) >= TOKEN_SIDE
    if min(right - left, lower - upper) >= TOKEN_SIDE:
        assert np.array_equal(np.asarray(part), np.asarray(picture)[upper:lower, left:right])
    else:  # enlarged: the shape is kept, up to the rounding of the longer side
        scale = TOKEN_SIDE / min(right - left, lower - upper)
        assert part.size == (round((right - left) * scale), round((lower - upper) * scale))


def test_the_zoom_shows_the_last_picture_of_the_user():
    first, second, found = gradient(100, 100), gradient(200, 50), Image.new("RGB", (77, 77))
    context = ToolContext((first, second, found), (True, True, False))
    result = call(
        ToolBox([zoom_tool()]), "image_zoom_in_tool", {"bbox_2d": [500, 0, 1000, 1000], "label": "x"}, context
    )
    (part,) = result.images
    assert not result.error and part.size == (100, 50)
    assert np.array_equal(np.asarray(part), np.asarray(second)[:, 100:])


def test_the_zooms_definition_is_the_published_one():
    definition = zoom_tool().definition
    assert list(definition) == ["type", "function"]
    function = definition["function"]
    assert list(function) == ["name", "description", "parameters", "strict"] and function["strict"] is False
    assert function["parameters"]["required"] == ["bbox_2d"]
    box = function["parameters"]["properties"]["bbox_2d"]
    assert (box["type"], box["minItems"], box["maxItems"], box["items"]) == ("array", 4, 4, {"type": "number"})
    assert function["parameters"]["properties"]["label"]["type"] == "string"


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({}, "'bbox_2d' is a required property"),
        ({"bbox_2d": [1, 2, 3]}, "too short"),
        ({"bbox_2d": [1, 2, 3, "4"]}, "bbox_2d.3: '4' is not of type 'number'"),
        ({"bbox_2d": [0, 0, 9, 9], "label": 3}, "label: 3 is not of type 'string'"),
        ([0, 0, 9, 9], "must be a JSON object"),
        (None, "must be a JSON object"),
        ({"bbox_2d": [0, 0, 500, 500]}, "the user gave no image"),
    ],
)
def test_wrong_arguments_come_back_as_a_text(arguments, problem):
    result = call(ToolBox([zoom_tool()]), "image_zoom_in_tool", arguments)
    assert result.error and result.text.startswith("error: ") and problem in result.text
    assert len(result.text) < 600


# --------------------------------------------------------------------------------------------- functions, here: threads


def test_what_functions_return():
    picture = Image.new("RGB", (4, 4))
    assert as_result("a").parts == ("a",)
    assert as_result(picture).parts == (picture,)
    assert as_result(["a", picture]).parts == ("a", picture)
    assert as_result({"ä": [1, None]}).parts == ('{"ä": [1, null]}',)
    assert as_result([]).parts == ("[]",)
    assert as_result(None).parts == ("null",)
    with pytest.raises(TypeError, match="returned object"):
        as_result(object())


def test_a_function_becomes_a_tool_and_stays_a_function():
    @tool(ONE_NUMBER)
    def half(x: float, context: ToolContext) -> str:
        """Half of a number.

        More than the model needs to know.
        """
        return f"{x / 2} of {len(context.images)}"

    made = half.ernie_tool
    assert (made.name, made.description) == ("half", "Half of a number.")
    assert made.definition["function"] == {"name": "half", "description": "Half of a number.", "parameters": ONE_NUMBER}
    context = ToolContext((Image.new("RGB", (1, 1)),), (True,))
    assert call(ToolBox([made]), "half", {"x": 3}, context).text == "1.5 of 1"
    assert half(3, ToolContext()) == "1.5 of 0"


def test_tools_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no description"):
        tool_from_function(lambda x: x, ONE_NUMBER)
    for schema in ({"type": "array"}, {"type": "object", "properties": 3}, {}, []):
        with pytest.raises(ValueError, match="parameters of tool 'f'"):
            Tool("f", "It.", schema, lambda arguments, context: ToolResult(()))
    with pytest.raises(ValueError, match="two tools named 'image_zoom_in_tool'"):
        ToolBox([zoom_tool(), zoom_tool()])


@pytest.mark.parametrize("error", [ValueError("no such item"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_what_a_tool_raises_is_a_text_of_bounded_length(error):
    def f(x):
        raise error

    result = call(box_of(f), "f", {"x": 1})
    assert result.error and result.text.startswith("error: f failed: ") and type(error).__name__ in result.text

    def long(x):
        raise ValueError("x" * 10**6)

    assert len(call(box_of(long), "f", {"x": 1}).text) < 600


def test_a_tools_own_timeout_is_its_error_and_an_unknown_tool_names_those_there_are():
    def f(x):
        raise TimeoutError("the shop is closed")

    assert call(box_of(f), "f", {"x": 1}).text == "error: f failed: TimeoutError: the shop is closed"
    assert call(box_of(f), "g", {}).text == "error: there is no tool 'g'; there is f."
    assert call(ToolBox([]), "g", {}).text == "error: there is no tool 'g'; there is none."


def test_a_tool_that_hangs_blocks_nobody_and_is_not_called_without_end():
    free = threading.Event()

    def f(x):
        if x == 0:
            return "quick"
        free.wait(30)

    box, context = box_of(f), ToolContext(limits=Limits(tool_time_s=0.05))

    async def many():
        begin = time.monotonic()
        late = await asyncio.gather(*(box.run("f", {"x": 1}, context) for _ in range(MAX_STUCK)))
        refused = await box.run("f", {"x": 0}, context)
        took = time.monotonic() - begin
        free.set()
        for _ in range(200):
            await asyncio.sleep(0.01)
            again = await box.run("f", {"x": 0}, context)
            if not again.error:
                break
        return late, refused, again, took

    late, refused, again, took = asyncio.run(many())
    assert {result.text for result in late} == {"error: f took longer than 0.05 s."}
    assert "still busy" in refused.text
    assert again.text == "quick", "calls that returned after all free their place"
    assert took < 5


def test_calls_run_at_once():
    barrier = threading.Barrier(4)

    def f(x):
        barrier.wait(10)
        return "met"

    async def four():
        box = box_of(f)
        return await asyncio.gather(*(box.run("f", {"x": 1}, ToolContext()) for _ in range(4)))

    assert [result.text for result in asyncio.run(four())] == ["met"] * 4


# --------------------------------------------------------------------------------------------------------------- limits


def test_results_are_cut_to_their_limits():
    limits = Limits(max_result_chars=10, max_result_images=1, max_image_pixels=100)
    picture = Image.new("RGB", (40, 10))
    parts = bounded(ToolResult(("abcdef", picture, "ghijklmnop", "q", picture, picture)), limits).parts
    assert parts[0] == "abcdef"
    assert parts[1].size == (20, 5)
    assert parts[2] == "ghij\n[cut: 6 more characters]"
    assert parts[3] == "\n[cut: 1 more characters]"
    assert parts[4] == "[2 more pictures left out]" and len(parts) == 5
    for odd, pixel in (
        (Image.new("L", (10, 10), 7), (7, 7, 7)),
        (Image.new("RGBA", (10, 10), (9, 9, 9, 0)), (255, 255, 255)),  # what cannot be seen is white, as in load_image
        (Image.new("I;16", (10, 10), 512), (2, 2, 2)),
    ):
        (shown,) = bounded(ToolResult((odd,)), limits).images
        assert shown.mode == "RGB" and shown.getpixel((5, 5)) == pixel


@pytest.mark.parametrize("name, value", [("max_turns", 0), ("time_s", 0.0), ("max_calls", -1), ("max_tokens", 0)])
def test_limits_have_a_rule(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Limits(**{name: value})


# --------------------------------------------------------------------------------------- functions, there: processes


MODULE = '''
import os, signal, subprocess, sys, time
from PIL import Image
from ernie_model.inference.tools import tool

X = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}

@tool(X)
def double(x):
    """Twice a number."""
    print("printed, and in nobody's way")
    return 2 * x

@tool(X)
def where(x, context):
    """Its process, and the pictures it is shown."""
    return [f"{os.getpid()}", *context.images]

@tool(X)
def hang(x):
    """Never returns, and starts a process that doesn't either."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.environ["CHILD_FILE"], "w").write(str(child.pid))
    while True:
        pass

@tool(X)
def nap(x):
    """Sleeps."""
    time.sleep(x)
    return "awake"

@tool(X)
def fall(x):
    """Ends its process."""
    if x:
        os._exit(3)
    return "stood"

@tool(X)
def huge(x):
    """Says more than anybody reads."""
    return "y" * 10**6

def plain(x):
    return x
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "shop_tools.py").write_text(MODULE)
    (folder / "broken_tools.py").write_text("raise RuntimeError('not today')")
    sys.path.insert(0, str(folder))
    yield "shop_tools"
    sys.path.remove(str(folder))


def test_a_function_in_a_process(module):
    box = ToolBox([tool_from_path(f"{module}.{name}") for name in ("double", "where")])
    assert module not in sys.modules, "it is imported there, not here"
    function = box.definitions()[0]["function"]
    assert function["name"] == "double" and function["description"] == "Twice a number."
    assert call(box, "double", {"x": 4}).text == "8"
    assert "'y' is not of type 'number'" in call(box, "double", {"x": "y"}).text
    context = ToolContext((gradient(30, 20),), (True,))
    result = call(box, "where", {"x": 0}, context)
    assert int(result.text) != os.getpid()
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(context.images[0]))


def test_a_process_that_hangs_is_killed_with_all_it_started(module, tmp_path, monkeypatch):
    child_file = tmp_path / "child"
    monkeypatch.setenv("CHILD_FILE", str(child_file))
    box = ToolBox([tool_from_path(f"{module}.hang")])
    begin = time.monotonic()
    result = call(box, "hang", {"x": 1}, ToolContext(limits=Limits(tool_time_s=3.0)))
    assert result.text == "error: hang took longer than 3 s." and time.monotonic() - begin < 30
    child = int(child_file.read_text())
    for _ in range(100):
        if not _runs(child):
            break
        time.sleep(0.05)
    assert not _runs(child)


def test_a_process_that_nobody_waits_for_is_killed(module, tmp_path, monkeypatch):
    """Long before its own time is over."""
    child_file = tmp_path / "child"
    monkeypatch.setenv("CHILD_FILE", str(child_file))
    box = ToolBox([tool_from_path(f"{module}.hang")])

    async def leave():
        running = asyncio.create_task(box.run("hang", {"x": 1}, ToolContext(limits=Limits(tool_time_s=600.0))))
        await asyncio.to_thread(_until, lambda: child_file.exists() and child_file.read_text())
        running.cancel()
        await asyncio.to_thread(_until, lambda: not _runs(int(child_file.read_text())))
        return running.cancelled()

    assert asyncio.run(leave())


def _until(holds) -> None:
    for _ in range(200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came true")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_ends_is_followed_by_another(module):
    box = ToolBox([tool_from_path(f"{module}.fall")])
    assert call(box, "fall", {"x": 1}).text == "error: fall ended its process (exit code 3)."
    assert call(box, "fall", {"x": 0}).text == "stood"


def test_more_calls_than_processes_wait_for_their_turn(module):
    """Three rounds of naps: together longer than one call may take, and each much shorter."""
    box = ToolBox([tool_from_path(f"{module}.nap")])
    context = ToolContext(limits=Limits(tool_time_s=3.0))

    async def many():
        return await asyncio.gather(*(box.run("nap", {"x": 1.1}, context) for _ in range(3 * MAX_PROCESSES)))

    assert {result.text for result in asyncio.run(many())} == {"awake"}
    late = call(box, "nap", {"x": 0.4}, ToolContext(limits=Limits(tool_time_s=0.1)))
    assert late.text == "error: nap took longer than 0.1 s."


def test_results_are_cut_in_the_process(module):
    box = ToolBox([tool_from_path(f"{module}.huge")])
    result = call(box, "huge", {"x": 1}, ToolContext(limits=Limits(max_result_chars=5)))
    assert result.text == "yyyyy\n[cut: 999,995 more characters]"


@pytest.mark.parametrize(
    "path, problem",
    [
        ("shop_tools.plain", "Mark the function with @tool"),
        ("shop_tools.nothing", "shop_tools has no nothing"),
        ("no_such_tools.f", "importing no_such_tools failed: ModuleNotFoundError"),
        ("broken_tools.f", "RuntimeError: not today"),
        ("justaname", "must be python:module.function"),
    ],
)
def test_a_path_that_is_no_tool_says_why(module, path, problem):
    with pytest.raises(ValueError, match=problem):
        tool_from_path(path)
