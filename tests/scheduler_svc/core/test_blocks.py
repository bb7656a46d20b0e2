"""The block pool by itself."""

import timeit
from collections import Counter

from scheduler_svc.core.blocks import BlockPool


def test_the_picture_follows_each_block_through_its_states():
    """The block map is drawn from it: what is held, what could be used again, what is empty."""
    pool = BlockPool(6, 1)
    pool.claim([5])
    taken = pool.take(3)
    pool.offer(0, b"a", taken[0])
    pictures = [pool.picture()]
    pool.share([taken[0]])
    pool.give_back(taken)
    pictures.append(pool.picture())
    pool.give_back([taken[0]])
    pictures.append(pool.picture())
    pool.share([taken[0]])
    pictures.append(pool.picture())
    pool.give_back([taken[0]])
    pool.take(5)  # the last of them is the one that could be found
    pictures.append(pool.picture())

    assert taken == [0, 1, 2]
    assert [list(picture) for picture in pictures] == [
        [2, 2, 2, 0, 0, 2],
        [2, 0, 0, 0, 0, 2],
        [1, 0, 0, 0, 0, 2],
        [2, 0, 0, 0, 0, 2],
        [2, 2, 2, 2, 2, 2],
    ]
    pool.check_invariants(Counter(range(6)))


def test_a_look_at_the_blocks_costs_no_loop_over_them():
    """It is made on the event loop that plans: with half a million blocks, a loop would hold up every token."""
    pool = BlockPool(500_000, 1)
    pool.take(250_000)

    look_s = min(timeit.repeat(pool.picture, number=1, repeat=5))
    loop_s = min(timeit.repeat(lambda: sum(1 for _ in range(pool.block_count)), number=1, repeat=5))
    assert look_s < loop_s / 10
