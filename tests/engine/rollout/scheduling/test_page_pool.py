"""Pages are taken lowest first, counted by owner, and none is leaked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.rollout.scheduling.page_pool import OutOfPages, PagePool


def test_the_lowest_free_pages_come_first():
    pool = PagePool(5)
    assert pool.take(3) == [0, 1, 2]
    pool.release([1])
    pool.release([0])
    assert pool.take(3) == [0, 1, 3]
    assert pool.num_free == 1


def test_a_shared_page_is_free_after_its_last_owner():
    pool = PagePool(2)
    pages = pool.take(1)
    pool.share(pages)
    pool.release(pages)
    assert (pool.num_free, pool.num_owners(0)) == (1, 1)
    pool.release(pages)
    assert (pool.num_free, pool.num_owners(0)) == (2, 0)
    pool.assert_all_free()


def test_a_request_for_too_many_pages_takes_none():
    pool = PagePool(3)
    pool.take(2)
    with pytest.raises(OutOfPages, match="2 pages requested, 1 of 3 are free"):
        pool.take(2)
    assert pool.num_free == 1
    assert pool.take(0) == []


@pytest.mark.parametrize("call", ["release", "share"])
def test_a_free_page_is_neither_released_nor_shared(call):
    pool = PagePool(2)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 0"):
        getattr(pool, call)(pages)


def test_a_leaked_page_is_named():
    pool = PagePool(3)
    pool.take(2)
    pool.release([0])
    with pytest.raises(AssertionError, match=r"\{1: 1\}"):
        pool.assert_all_free()


def test_a_pool_has_pages():
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)


@settings(max_examples=100, deadline=None)
@given(
    num_pages=st.integers(1, 12), calls=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=40)
)
def test_owners_are_counted_as_a_plain_list_counts_them(num_pages, calls):
    pool, holdings = PagePool(num_pages), []  # each holding: pages that one owner has
    for kind, number in calls:
        if kind == 0:
            free = sorted(set(range(num_pages)) - {page for pages in holdings for page in pages})
            if number > len(free):
                with pytest.raises(OutOfPages):
                    pool.take(number)
            else:
                holdings.append(pool.take(number))
                assert holdings[-1] == free[:number]
        elif holdings:
            pages = holdings[number % len(holdings)]
            if kind == 1:
                pool.share(pages)
                holdings.append(pages)
            else:
                pool.release(pages)
                holdings.remove(pages)
        for page in range(num_pages):
            assert pool.num_owners(page) == sum(page in pages for pages in holdings)
    for pages in holdings:
        pool.release(pages)
    pool.assert_all_free()
