"""What is known of prompts' beginnings, against the beginnings themselves."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hetero_jax.prefixes import Prefixes, page_keys

TOKENS = st.lists(st.integers(0, 1), max_size=20)


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_keys_are_equal_exactly_where_all_tokens_so_far_are(one: list[int], other: list[int], page_size: int) -> None:
    ours, theirs = page_keys(one, page_size), page_keys(other, page_size)
    assert (len(ours), len(theirs)) == (len(one) // page_size, len(other) // page_size)
    for page, (mine, its) in enumerate(zip(ours, theirs, strict=False)):
        end = (page + 1) * page_size
        assert (mine == its) == (one[:end] == other[:end])
    assert len(set(ours)) == len(ours)


def test_tokens_of_any_size_differ() -> None:
    assert len({page_keys([token], 1) for token in (0, 1, 256, 1 << 16, 1 << 32)}) == 5


def _find(prefixes: Prefixes, keys: tuple[bytes, ...]) -> list[int]:
    """Pages that a sequence may begin behind where it needs all of them."""
    return prefixes.pages(0, keys[: prefixes.num_found(keys, [lambda _: 0])])


def test_as_many_pages_as_are_known_without_a_gap() -> None:
    prefixes, keys = Prefixes(), page_keys(range(8), 2)
    for index in (0, 1, 3):
        prefixes.learn(keys[index], [10 + index])
    assert _find(prefixes, keys) == [10, 11]
    assert _find(prefixes, page_keys([0, 1, 5, 5], 2)) == [10]
    prefixes.learn(keys[1], [99])  # computed twice: the first stays
    assert _find(prefixes, keys) == [10, 11]
    assert 11 in prefixes and 99 not in prefixes
    prefixes.forget([99, 10])
    assert _find(prefixes, keys) == [] and 10 not in prefixes
    prefixes.learn(keys[0], [20])
    assert _find(prefixes, keys) == [20, 11]


@given(st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=3), st.data())
def test_a_beginning_is_found_where_each_group_has_what_is_seen_of_it(
    lacking: list[set[int]], data: st.DataObject
) -> None:
    needs = [data.draw(st.integers(1, 14)) for _ in lacking]  # pages before it that a group needs
    prefixes, keys = Prefixes(len(lacking)), page_keys(range(12), 1)
    numbers = itertools.count()
    for key in keys:
        prefixes.learn(key, [next(numbers) for _ in lacking])
    prefixes.forget(page * len(lacking) + group for group, pages in enumerate(lacking) for page in pages)
    fitting = [
        count
        for count in range(13)
        if all(pages.isdisjoint(range(max(0, count - need), count)) for pages, need in zip(lacking, needs, strict=True))
    ]
    first_needed = [lambda count, need=need: max(0, count - need) for need in needs]
    found = prefixes.num_found(keys, first_needed)
    assert found == max(fitting)
    for group, first in enumerate(first_needed):
        assert prefixes.pages(group, keys[first(found) : found]) == [
            page * len(lacking) + group for page in range(first(found), found)
        ]


def test_what_is_awaited_ends_when_it_is_computed_or_given_up() -> None:
    prefixes, keys = Prefixes(), page_keys(range(8), 2)
    prefixes.expect(keys[:2], seq_id=1)
    prefixes.expect(keys, seq_id=2)  # computes the last two; the first two are in other hands
    assert prefixes.last_awaited(keys) == keys[3]
    assert prefixes.last_awaited([*keys[:1], *page_keys([9, 9], 2)]) == keys[0]
    assert prefixes.last_awaited(page_keys([9, 9], 2)) is None
    prefixes.learn(keys[0], [5])
    prefixes.give_up(keys, seq_id=2)
    assert prefixes.last_awaited(keys) == keys[1] and not prefixes.is_awaited(keys[3])
    prefixes.give_up(keys, seq_id=1)
    assert prefixes.last_awaited(keys) is None and _find(prefixes, keys) == [5]
