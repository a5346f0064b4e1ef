"""Pages and features by hand."""

import pytest
import torch

from ernie_model.inference.features import FeatureCache
from ernie_model.inference.pages import START, PagePool, page_name
from ernie_model.inference.request import MediaItem


def test_pages_are_found_shared_and_forgotten_from_the_end():
    pool = PagePool(num_pages=3, page_tokens=2)
    first, second = pool.take(), pool.take()
    pool.name(first, b"a")
    pool.name(second, b"b")
    assert pool.find(b"a") == first and pool.find(b"c") is None
    pool.share(first)
    pool.check([[first, second], [first]])
    pool.release([first, second])
    assert (pool.num_used, pool.num_free) == (1, 2)
    pool.release([first])
    pool.check([])
    assert pool.find(b"b") == second  # nobody uses it, but it is still there
    assert pool.take() not in (first, second)  # what holds nothing goes first,
    assert pool.take() == second and pool.find(b"b") is None  # then the end of a beginning
    assert pool.find(b"a") == first
    pool.forget_all()
    assert pool.find(b"a") is None and pool.take() == first


def test_a_page_that_is_found_again_is_not_the_next_to_go():
    pool = PagePool(num_pages=2, page_tokens=2)
    for name in (b"a", b"b"):
        page = pool.take()
        pool.name(page, name)
        pool.release([page])
    old = pool.find(b"a")
    assert old is not None
    pool.share(old)
    pool.release([old])
    pool.take()
    assert pool.find(b"a") == old and pool.find(b"b") is None


def test_of_two_pages_with_one_content_that_which_knows_its_experts_is_found():
    pool = PagePool(num_pages=3, page_tokens=2)
    plain, knows, later = pool.take(), pool.take(), pool.take()
    pool.name(plain, b"a")
    assert pool.find(b"a", experts=True) is None
    pool.write_experts(knows, 0, torch.tensor([[[3, 1]]], dtype=torch.int16))
    pool.write_experts(knows, 1, torch.tensor([[[0, 2]]], dtype=torch.int16))
    pool.name(knows, b"a")
    pool.name(later, b"a")
    assert pool.find(b"a") == pool.find(b"a", experts=True) == knows
    assert pool.experts(knows).tolist() == [[[3, 1]], [[0, 2]]]
    pool.check([[plain], [knows, later]])
    pool.release([plain])
    assert pool.take() == plain


@pytest.mark.parametrize("pages", [[0], [0, 1, 2], [0, 0]])
def test_the_check_notices_what_is_wrong(pages):
    pool = PagePool(num_pages=4, page_tokens=2)
    pool.check([[pool.take(), pool.take()]])
    with pytest.raises(AssertionError):
        pool.check([pages])


def test_a_name_stands_for_all_before_it_and_for_pictures():
    picture = MediaItem((1, 2, 2), torch.zeros(4, 3))
    other = MediaItem((1, 2, 2), torch.ones(4, 3))
    names = {
        page_name(START, [1, 2]),
        page_name(START, [2, 1]),
        page_name(page_name(START, [1, 2]), [1, 2]),
        page_name(START, [1, 2], [picture]),
        page_name(START, [1, 2], [other]),
        page_name(START, [1, 2], [picture, other]),
        page_name(START, [1, 2], [other, picture]),
    }
    assert len(names) == 7
    assert page_name(START, [1, 2], [picture]) == page_name(START, [1, 2], [MediaItem((1, 2, 2), torch.zeros(4, 3))])


def test_features_stay_within_their_bytes_and_the_longest_unused_go():
    cache = FeatureCache(max_bytes=3 * 40)  # ten float32 numbers are 40 bytes
    whole = torch.arange(40.0).view(4, 10)
    keys = [((1, 2, 2), bytes([number])) for number in range(5)]
    for key, row in zip(keys, whole.split(1), strict=False):
        cache.put(key, row)
        cache.get(keys[0])
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True, False]
    found = cache.get(keys[3])
    assert found is not None and found.tolist() == [list(range(30, 40))] and cache.bytes == 120
    assert found.untyped_storage().nbytes() == 40, "a part must not keep the whole alive"
    cache.put(keys[4], whole)  # larger than all there may be
    assert cache.get(keys[4]) is None and cache.bytes == 120
    cache.clear()
    assert cache.bytes == 0 and cache.get(keys[0]) is None
