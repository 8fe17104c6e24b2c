"""The page allocator against a set of free pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_jax.pages import PageAllocator, pages_for


@given(st.integers(0, 200), st.integers(1, 17))
def test_pages_for_is_the_fewest_pages_that_cover(num_positions: int, page_size: int) -> None:
    pages = pages_for(num_positions, page_size)
    assert pages * page_size >= num_positions
    assert pages == 0 or (pages - 1) * page_size < num_positions


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_agrees_with_a_set_of_free_pages(num_pages: int, steps: list[tuple[bool, int]]) -> None:
    pool = PageAllocator(num_pages)
    held: list[list[int]] = []
    free = set(range(num_pages))
    for allocates, number in steps:
        if allocates:
            pages = pool.allocate(number)
            assert (pages is None) == (number > len(free))
            if pages is not None:
                assert len(pages) == number and set(pages) <= free
                free -= set(pages)
                held.append(pages)
        elif held:
            pages = held.pop(number % len(held))
            pool.free(pages)
            free |= set(pages)
        assert (pool.num_free, pool.num_used, pool.num_pages) == (len(free), num_pages - len(free), num_pages)


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
    assert pool.num_free == 4
