"""Attention over the paged cache, as Triton kernels; `executor_svc.gpu.attention` launches them.

Query heads that share a key head are rows of one tile of queries: what is read of the cache is read once for all of
them. Keys lie in blocks in no order, so a tile of keys is gathered, through the row's block table, into shared memory;
Triton overlaps that with the arithmetic of the tiles before. Softmax is float32, in powers of two, and never holds more
than one tile of scores.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # below every score; unlike -inf it can be subtracted from itself
ROW_TILE = tl.constexpr(256)  # rows among which a program looks for its own at once
SPLIT_TILE = tl.constexpr(16)  # splits that are put together at once


@triton.constexpr_function
def tile_of(dim):
    """Numbers of a tile that holds `dim`: a power of two, and no less than a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit(do_not_specialize=["positions", "rows", "tables", "table_starts", "table_offset"])
def store_kernel(
    key,
    value,
    keys,
    values,
    positions,
    rows,
    tables,
    table_starts,
    table_offset,  # of the layer group in `table_starts`
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    key_stride,
    value_stride,
    block_size: tl.constexpr,
    key_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_heads: tl.constexpr,
    value_dim: tl.constexpr,
    head_tile: tl.constexpr,
):
    """Write the key and the value of one token, some of its heads, into its slot."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token)
    position = tl.load(positions + token)
    if row < 0:
        return
    table = tables + tl.load(table_starts + table_offset + row)
    block = tl.load(table + position // block_size).to(tl.int64)
    offset = position % block_size
    head = (tl.program_id(1) * head_tile + tl.arange(0, head_tile)).to(tl.int64)[:, None]

    column = tl.arange(0, tile_of(key_dim))[None, :]
    is_in_head = (head < key_heads) & (column < key_dim)
    new = tl.load(key + head * key_head_stride + token * key_token_stride + column, mask=is_in_head)
    place = ((block * key_stride + offset) * key_heads + head) * key_dim + column
    tl.store(keys + place, new.to(keys.dtype.element_ty), mask=is_in_head)

    column = tl.arange(0, tile_of(value_dim))[None, :]
    is_in_head = (head < value_heads) & (column < value_dim)
    new = tl.load(value + head * value_head_stride + token * value_token_stride + column, mask=is_in_head)
    place = ((block * value_stride + offset) * value_heads + head) * value_dim + column
    tl.store(values + place, new.to(values.dtype.element_ty), mask=is_in_head)


@triton.jit
def product(a, b):
    """Matrix product in float32."""
    if INTERPRETED:  # which takes bfloat16 for the integers that it keeps it in
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series near 0, where 1 - exp(-2x) would lose what x has."""
    size = tl.abs(x)
    small = tl.minimum(size, 0.25)
    square = small * small
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = tl.exp2(size * (-2 * LOG2_E))
    tangent = tl.where(size < 0.25, small * series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0, -tangent, tangent)


@triton.jit
def first_seen(position, window: tl.constexpr, chunk: tl.constexpr):
    """The first position that a position sees."""
    first = position * 0
    if window:
        first = tl.maximum(first, position - (window - 1))
    if chunk:
        first = tl.maximum(first, position // chunk * chunk)
    return first


@triton.jit
def load_rows(pool, slot, is_key, width: tl.constexpr, dim: tl.constexpr, masked: tl.constexpr):
    """One head of the keys or values in these slots, `[slots, tile]`; 0 where there is no key, and behind `dim`."""
    is_whole: tl.constexpr = tile_of(dim) == dim
    column = tl.arange(0, tile_of(dim))
    address = pool + slot[:, None] * width + column[None, :]
    if masked:
        if is_whole:
            return tl.load(address, mask=is_key[:, None], other=0.0)
        return tl.load(address, mask=is_key[:, None] & (column < dim)[None, :], other=0.0)
    if is_whole:
        return tl.load(address)
    return tl.load(address, mask=(column < dim)[None, :], other=0.0)


@triton.jit
def attend_range(
    q,  # [M, tile of dim]
    query_position,  # [M]
    highest,  # [M] the highest score so far, times log2(e), as all scores here
    total,  # [M] sum of the weights so far, relative to the highest
    acc,  # [M, tile of value dim] sum of the weighted values so far
    begin,  # keys [begin, end) are attended to now
    end,
    keys,  # from the key head on
    values,
    table,  # from the row's first entry on
    key_stride,
    value_stride,
    scale,
    cap,
    block_size: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_cap: tl.constexpr,
    key_width: tl.constexpr,  # numbers of a slot
    key_dim: tl.constexpr,
    value_width: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
    masked: tl.constexpr,  # whether some of the queries do not see some of the keys
):
    """Attend to a range of one row's keys, tile by tile.

    Blocks are looked up one tile ahead: what the keys of a tile wait for would else count as a stage of its own, and
    half as many keys would be on their way.
    """
    index = tl.arange(0, key_tile)
    next_block = tl.load(table + (begin + index) // block_size, mask=begin + index < end, other=0)
    for start in range(begin, end, key_tile):
        position = start + index
        is_key = position < end
        block = next_block.to(tl.int64)
        next_block = tl.load(table + (position + key_tile) // block_size, mask=position + key_tile < end, other=0)
        offset = position % block_size
        k = load_rows(keys, block * key_stride + offset, is_key, key_width, key_dim, masked)
        scores = product(q, tl.trans(k)) * scale
        if has_cap:
            scores = tanh(scores) * cap
        if masked:
            is_seen = (position[None, :] <= query_position[:, None]) & is_key[None, :]
            if window or chunk:
                is_seen = is_seen & (position[None, :] >= first_seen(query_position, window, chunk)[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(values, block * value_stride + offset, is_key, value_width, value_dim, masked)
        acc = acc * shrink[:, None] + product(weights.to(v.dtype), v)
        highest = higher
    return highest, total, acc


@triton.jit
def split_range(first, end, split, split_limit, least_keys, key_tile: tl.constexpr):
    """The part of the keys [first, end) that a split attends to, and how many splits have any; at least one does."""
    keys = tl.maximum(end - first, 1)
    tiles = (keys + key_tile - 1) // key_tile
    splits = tl.minimum(split_limit, (keys + least_keys - 1) // least_keys)
    tiles_each = (tiles + splits - 1) // splits
    used = (tiles + tiles_each - 1) // tiles_each
    begin = first + split * tiles_each * key_tile
    return begin, tl.minimum(begin + tiles_each * key_tile, end), used


@triton.jit(do_not_specialize=["row_starts", "contexts", "tables", "table_starts", "table_offset", "least_keys"])
def decode_kernel(
    query,
    keys,
    values,
    output,
    split_values,  # [R, query heads, splits, value dim] float32: what each split attended, where there are several
    split_weights,  # [R, query heads, splits, 2] its highest score and the sum of its weights
    sinks,
    row_starts,
    contexts,
    tables,
    table_starts,
    table_offset,
    query_head_stride,
    query_token_stride,
    key_stride,
    value_stride,
    scale,
    cap,
    least_keys,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_cap: tl.constexpr,
    has_sinks: tl.constexpr,
    key_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    query_tile: tl.constexpr,
    key_tile: tl.constexpr,
):
    """Attend from the only token of one row, the query heads of one key head, to one split of its keys."""
    key_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    split_limit = tl.num_programs(1)
    token, row_end = tl.load(row_starts + row).to(tl.int64), tl.load(row_starts + row + 1)
    context = tl.load(contexts + row)
    table = tables + tl.load(table_starts + table_offset + row)
    if row_end != token + 1:  # only now: what comes after it waits for it
        return
    first = first_seen(context - 1, window, chunk)
    begin, end, used = split_range(first, context, split, split_limit, least_keys, key_tile)
    if split >= used:
        return
    member = tl.arange(0, query_tile)
    head = (key_head * group_size + member).to(tl.int64)
    column = tl.arange(0, tile_of(key_dim))
    q = tl.load(
        query + (head * query_head_stride + token * query_token_stride)[:, None] + column[None, :],
        mask=(member < group_size)[:, None] & (column < key_dim)[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)
    highest = tl.full([query_tile], LOWEST, tl.float32)
    total = tl.zeros([query_tile], tl.float32)
    if has_sinks:
        sink = tl.load(sinks + head, mask=member < group_size, other=0.0).to(tl.float32)
        highest = tl.where(split == 0, sink * LOG2_E, LOWEST)
        total += tl.where(split == 0, 1.0, 0.0)
    highest, total, acc = attend_range(
        q,
        tl.zeros([query_tile], tl.int32) + (context - 1),
        highest,
        total,
        tl.zeros([query_tile, tile_of(value_dim)], tl.float32),
        begin,
        end,
        keys + key_head * key_dim,
        values + key_head * value_dim,
        table,
        key_stride,
        value_stride,
        scale,
        cap,
        block_size,
        0,  # all keys from the first one on are seen
        0,
        has_cap,
        key_heads * key_dim,
        key_dim,
        key_heads * value_dim,
        value_dim,
        key_tile,
        True,
    )
    column = tl.arange(0, tile_of(value_dim))
    is_written = (member < group_size)[:, None] & (column < value_dim)[None, :]
    if used == 1:
        attended = acc / tl.where(total == 0, 1.0, total)[:, None]
        place = (token * key_heads * group_size + head)[:, None] * value_dim + column[None, :]
        tl.store(output + place, attended.to(output.dtype.element_ty), mask=is_written)
    else:
        part = (row.to(tl.int64) * key_heads * group_size + head) * split_limit + split
        tl.store(split_values + part[:, None] * value_dim + column[None, :], acc, mask=is_written)
        tl.store(split_weights + part * 2, highest, mask=member < group_size)
        tl.store(split_weights + part * 2 + 1, total, mask=member < group_size)


@triton.jit(do_not_specialize=["row_starts", "contexts", "split_limit", "least_keys"])
def combine_kernel(
    output,
    split_values,
    split_weights,
    row_starts,
    contexts,
    split_limit,
    least_keys,
    window: tl.constexpr,
    chunk: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
):
    """Put together what the splits of one decoding row attended, one query head; always in the same order."""
    head, row = tl.program_id(0), tl.program_id(1)
    token, row_end = tl.load(row_starts + row).to(tl.int64), tl.load(row_starts + row + 1)
    context = tl.load(contexts + row)
    first = first_seen(context - 1, window, chunk)
    _, _, used = split_range(first, context, 0, split_limit, least_keys, key_tile)
    if (used == 1) | (row_end != token + 1):
        return
    part = (row.to(tl.int64) * tl.num_programs(0) + head) * split_limit
    column = tl.arange(0, tile_of(value_dim))
    highest = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([tile_of(value_dim)], tl.float32)
    for start in range(0, used, SPLIT_TILE):
        split = start + tl.arange(0, SPLIT_TILE)
        is_used = split < used
        scores = tl.load(split_weights + (part + split) * 2, mask=is_used, other=LOWEST)
        sums = tl.load(split_weights + (part + split) * 2 + 1, mask=is_used, other=0.0)
        attended = tl.load(
            split_values + (part + split)[:, None] * value_dim + column[None, :],
            mask=is_used[:, None] & (column < value_dim)[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(scores, 0, keep_dims=True))
        shares, shrink = tl.exp2(scores - higher), tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares * sums, 0, keep_dims=True)
        acc = acc * shrink + tl.sum(shares[:, None] * attended, 0)
        highest = higher
    place = (token * tl.num_programs(0) + head) * value_dim + column
    tl.store(output + place, (acc / total).to(output.dtype.element_ty), mask=column < value_dim)


@triton.jit
def find_row(row_starts, row_count, tile, tile_tokens: tl.constexpr):
    """The row of a tile of queries. Row r has those from `row_starts[r] // tile_tokens + r` on; one may be empty."""
    found = 0
    for start in range(0, row_count, ROW_TILE):
        row = start + tl.arange(0, ROW_TILE)
        is_row = row < row_count
        first_tile = tl.load(row_starts + row, mask=is_row, other=0) // tile_tokens + row
        found += tl.sum((is_row & (first_tile <= tile)).to(tl.int32), 0)
    return found - 1


@triton.jit(do_not_specialize=["row_starts", "contexts", "tables", "table_starts", "table_offset", "row_count"])
def prompt_kernel(
    query,
    keys,
    values,
    output,
    sinks,
    row_starts,
    contexts,
    tables,
    table_starts,
    table_offset,
    row_count,
    query_head_stride,
    query_token_stride,
    key_stride,
    value_stride,
    scale,
    cap,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_cap: tl.constexpr,
    has_sinks: tl.constexpr,
    key_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    query_tile: tl.constexpr,
    key_tile: tl.constexpr,
):
    """Attend from some tokens of a row that has more than one, the query heads of one key head."""
    tile_tokens: tl.constexpr = query_tile // group_size
    tile, key_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # later ones see more: they go first
    row = find_row(row_starts, row_count, tile, tile_tokens)
    row_start = tl.load(row_starts + row)
    length = tl.load(row_starts + row + 1) - row_start
    begin = (tile - row_start // tile_tokens - row) * tile_tokens
    context = tl.load(contexts + row)
    if (length == 1) | (begin >= length) | (context == 0):
        return
    member = tl.arange(0, query_tile)
    index = begin + member // group_size  # of the row's tokens
    head = (key_head * group_size + member % group_size).to(tl.int64)
    is_query = (member < tile_tokens * group_size) & (index < length)
    token = (row_start + index).to(tl.int64)
    column = tl.arange(0, tile_of(key_dim))
    q = tl.load(
        query + (head * query_head_stride + token * query_token_stride)[:, None] + column[None, :],
        mask=is_query[:, None] & (column < key_dim)[None, :],
        other=0.0,
    ).to(keys.dtype.element_ty)
    highest = tl.full([query_tile], LOWEST, tl.float32)
    total = tl.zeros([query_tile], tl.float32)
    if has_sinks:
        highest = tl.load(sinks + head, mask=is_query, other=0.0).to(tl.float32) * LOG2_E
        total += 1.0
    acc = tl.zeros([query_tile, tile_of(value_dim)], tl.float32)
    first_position = context - length + begin
    first = first_seen(first_position, window, chunk)
    key_end = tl.minimum(first_position + tile_tokens, context)
    keys += key_head * key_dim
    values += key_head * value_dim
    table = tables + tl.load(table_starts + table_offset + row)
    position = context - length + index
    if not (window or chunk):
        seen_by_all = (first_position + 1) // key_tile * key_tile
        highest, total, acc = attend_range(
            q,
            position,
            highest,
            total,
            acc,
            0,
            seen_by_all,
            keys,
            values,
            table,
            key_stride,
            value_stride,
            scale,
            cap,
            block_size,
            0,
            0,
            has_cap,
            key_heads * key_dim,
            key_dim,
            key_heads * value_dim,
            value_dim,
            key_tile,
            False,
        )
        first = seen_by_all
    highest, total, acc = attend_range(
        q,
        position,
        highest,
        total,
        acc,
        first,
        key_end,
        keys,
        values,
        table,
        key_stride,
        value_stride,
        scale,
        cap,
        block_size,
        window,
        chunk,
        has_cap,
        key_heads * key_dim,
        key_dim,
        key_heads * value_dim,
        value_dim,
        key_tile,
        True,
    )
    attended = acc / tl.where(total == 0, 1.0, total)[:, None]
    column = tl.arange(0, tile_of(value_dim))
    place = (token * key_heads * group_size + head)[:, None] * value_dim + column[None, :]
    is_written = is_query[:, None] & (column < value_dim)[None, :]
    tl.store(output + place, attended.to(output.dtype.element_ty), mask=is_written)
