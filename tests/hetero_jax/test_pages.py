"""The page allocator against a count of users."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_jax.pages import PageAllocator, pages_for


@given(st.integers(0, 200), st.integers(1, 17))
def test_pages_for_is_the_fewest_pages_that_cover(num_positions: int, page_size: int) -> None:
    pages = pages_for(num_positions, page_size)
    assert pages * page_size >= num_positions
    assert pages == 0 or (pages - 1) * page_size < num_positions


STEPS = st.lists(st.tuples(st.sampled_from(["allocate", "share", "free", "take back"]), st.integers(0, 6)), max_size=60)


@given(st.integers(0, 12), STEPS)
def test_agrees_with_a_count_of_the_users_of_each_page(num_pages: int, steps: list[tuple[str, int]]) -> None:
    pool = PageAllocator(num_pages)
    held: list[list[int]] = []  # by each user
    kept: list[int] = []  # even pages are worth keeping; the oldest first
    for step, number in steps:
        used = Counter(page for pages in held for page in pages)
        if step == "allocate":
            pages = pool.allocate(number)
            assert (pages is None) == (number > num_pages - len(used))
            if pages is not None:
                assert len(set(pages)) == number and not used.keys() & set(pages)
                plain = num_pages - len(used) - len(kept)
                assert pages[plain:] == kept[: max(0, number - plain)]  # which go last
                kept = kept[max(0, number - plain) :]
                held.append(pages)
        elif held and step == "share":
            held.append(held[number % len(held)][: number + 1])
            pool.share(held[-1])
        elif step == "take back" and kept:
            held.append([kept.pop(number % len(kept))])
            pool.share(held[-1])
        elif held:
            pages = held.pop(number % len(held))
            pool.free(pages, keep=range(0, num_pages, 2))
            kept += [page for page in pages if used[page] == 1 and page % 2 == 0]
        used = Counter(page for pages in held for page in pages)
        assert [pool.num_users(page) for page in range(num_pages)] == [used[page] for page in range(num_pages)]
        assert (pool.num_free, pool.num_used, pool.num_pages) == (num_pages - len(used), len(used), num_pages)


def test_order_is_a_function_of_the_calls() -> None:
    pool = PageAllocator(6)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([1])
    assert pool.allocate(2) == [3, 1] or pool.num_free == 2
    again = PageAllocator(6)
    again.allocate(3)
    again.free([1])
    again.allocate(2)
    assert pool.allocate(2) == again.allocate(2)


def test_double_free_and_foreign_pages_are_bugs() -> None:
    pool = PageAllocator(4)
    pages = pool.allocate(2)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(AssertionError, match="not in use"):
        pool.free(pages[:1])
    with pytest.raises(AssertionError, match="not in use"):
        pool.free([4])
    with pytest.raises(AssertionError, match="not in use"):
        pool.share(pages[:1])
    assert pool.num_free == 4
