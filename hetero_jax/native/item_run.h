// One item of work: query vectors of some heads pass over the tiles of a sequence.
#pragma once

#include "softmax.h"

namespace {

static void find_tile(const Call& c, const Item& item, int index, int64_t last_position, Tile* tile) {
  tile->count = 0, tile->whole = c.page_size % kBlock == 0;
  for (int64_t block = (int64_t)index * kTileBlocks; block < (int64_t)(index + 1) * kTileBlocks; ++block) {
    const int64_t page = block / c.page_blocks, within = block % c.page_blocks;
    const int64_t start = page * c.page_size + within * kBlock;
    if (start > last_position) break;
    const int64_t left = c.page_size - within * kBlock;
    const int b = tile->count++;
    tile->start[b] = start;
    tile->tokens[b] = (int32_t)(left < kBlock ? left : kBlock);
    // Pages outside the window may be anyone's by now: their blocks are listed and never read.
    tile->at[b] = c.pool + item.pages[page] * c.page_bytes;
    tile->within[b] = (int32_t)within;
  }
  tile->whole &= tile->count == kTileBlocks;
}

static void find_head(const Call& c, const Tile& tile, int head, HeadTile* in) {
  for (int b = 0; b < tile.count; ++b) {
    const char* at = tile.at[b] + head * c.head_bytes;
    in->keys[b] = at + c.k_offset + tile.within[b] * c.k_block_bytes;
    in->values[b] = at + c.v_offset + tile.within[b] * c.v_block_bytes;
    in->k_scale[b] = (const float*)at + tile.within[b] * kBlock;
    in->v_scale[b] = in->k_scale[b] + c.page_blocks * kBlock;
  }
}

static void list(const Call& c, const Tile& tile, const HeadTile& in, int head, Ahead* ahead) {
  if (c.page_blocks == kTileBlocks && tile.count == kTileBlocks)  // the usual case
    return ahead->add(tile.at[0] + head * c.head_bytes, c.head_bytes);
  if (c.kv == KvType::kI8) {
    for (int b = 0; b < tile.count; ++b) ahead->add((const char*)in.k_scale[b], kBlock * sizeof(float));
    for (int b = 0; b < tile.count; ++b) ahead->add((const char*)in.v_scale[b], kBlock * sizeof(float));
  }
  for (int b = 0; b < tile.count; ++b) ahead->add(in.keys[b], c.k_block_bytes);
  for (int b = 0; b < tile.count; ++b) ahead->add(in.values[b], c.v_block_bytes);
}

// The values behind the sequence's end may be anything, and 0 * NaN is NaN: such a block is replaced by a clean copy.
template <class T>
static void clean_last_block(const Call& c, const Item& item, const Tile& tile, HeadTile* in, char* copy) {
  const int b = tile.count - 1;
  if (b < 0 || tile.start[b] + tile.tokens[b] <= item.context) return;
  const int64_t held = item.context - tile.start[b];
  constexpr int64_t size = T::kWordBytes / T::kPerWord;
  __builtin_memcpy(copy, in->values[b], c.v_block_bytes);
  for (int64_t token = held; token < kBlock; ++token)
    for (int64_t d = 0; d < c.v_pad; ++d) {
      const int64_t at = ((token / T::kPerWord) * c.v_pad + d) * T::kPerWord + token % T::kPerWord;
      __builtin_memset(copy + at * size, 0, size);
    }
  in->values[b] = copy;
}

HJ_INLINE float read_query(const Call& c, int64_t at) {
  return c.q_bf16 ? to_float(((const uint16_t*)c.q)[at]) : ((const float*)c.q)[at];
}
HJ_INLINE void put_query(float* to, float x) { *to = x; }
HJ_INLINE void put_query(uint16_t* to, float x) { *to = to_bf16(x); }

// The query vector at `from` as T keeps it; returns what one of its units is worth.
template <class T>
static float encode_query(const Call& c, int64_t from, typename T::Query* to) {
  if constexpr (!T::kFixedPoint) {
    for (int64_t d = 0; d < c.dim; ++d) put_query(to + d, read_query(c, from + d));
    for (int64_t d = c.dim; d < c.dim_pad; ++d) put_query(to + d, 0.0f);
    return 1.0f;
  } else {
    constexpr float kMost = 32512.0f;  // 127 * 256
    // Simple loops over one array each, which the compiler makes vectors of.
    float* q = (float*)__builtin_alloca(c.dim_pad * 4);
    int32_t* whole = (int32_t*)__builtin_alloca(c.dim_pad * 4);
    int32_t largest_bits = 0, sums[2] = {};
    for (int64_t d = 0; d < c.dim_pad; ++d) q[d] = d < c.dim ? read_query(c, from + d) : 0.0f;
    for (int64_t d = 0; d < c.dim_pad; ++d) {
      const int32_t bits = cast<int32_t>(q[d]) & 0x7fffffff;  // ordered as the sizes are, NaN above all
      largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    const float largest = cast<float>(largest_bits);
    const float factor = largest > 0 && largest < __builtin_inff() ? kMost / largest : 0.0f;
    for (int64_t d = 0; d < c.dim_pad; ++d) {
      const float x = q[d] * factor;
      whole[d] = factor > 0 ? (int32_t)(x < 0 ? x - 0.5f : x + 0.5f) : 0;
    }
    for (int64_t d = 0; d < c.dim_pad; ++d) {
      const int32_t low = (int8_t)whole[d], high = (whole[d] - low) >> 8;
      int8_t* word = to + d / T::kPerWord * T::kPerQuery + d % T::kPerWord;
      word[0] = (int8_t)high, word[T::kPerWord] = (int8_t)low;
      sums[0] += high, sums[1] += low;
    }
    // Keys are unsigned, 128 too large.
    for (int i = 0; i < 2; ++i) {
      const int32_t excess = -128 * sums[i];
      __builtin_memcpy(to + c.dim_pad / T::kPerWord * T::kPerQuery + 4 * i, &excess, 4);
    }
    return largest / kMost;
  }
}

HJ_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
HJ_INLINE int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// The next bytes of a buffer.
struct Carve {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* here = (T*)at;
    at += round_up(count * sizeof(T), kLine);
    return here;
  }
};

// Query vectors of one head of an item, and what is known of their outputs so far.
template <class T>
struct HeadState {
  typename T::Query* q;  // [vectors, dim_pad]
  Vector* vector;
  float *values, *top, *sum;  // [vectors, v_pad], [vectors], [vectors]
};

template <class T>
class ItemRun {
 public:
  ItemRun(const Call& call, const Item& of)
      : c(call), item(of), vectors((int)(of.num_rows * call.group)) {
    const int heads = item.head_end - item.head_begin;
    const int pass = vectors < kPassVectors ? vectors : kPassVectors;
    const int64_t list_bytes = round_up(vectors * 4, kLine), vector_bytes = round_up(vectors * sizeof(Vector), kLine);
    const int64_t q_bytes = round_up(vectors * query_length<T>(c) * sizeof(Query), kLine);
    const int64_t values_bytes = vectors * c.v_pad * 4;
    const int64_t pass_bytes = pass * (c.v_pad + 2 * kTile) * 4;
    const int64_t copy_bytes = round_up(c.v_block_bytes, kLine);
    carve.at = (char*)thread_scratch(heads * (q_bytes + values_bytes + vector_bytes + 2 * list_bytes) + pass_bytes +
                                     copy_bytes + round_up(heads * sizeof(HeadState<T>), kLine));
    states = carve.template take<HeadState<T>>(heads);
    tile_values = carve.template take<float>(pass * c.v_pad);
    scores = carve.template take<float>(pass * kTile);
    weights = carve.template take<Query>(pass * kTile * sizeof(float) / sizeof(Query));
    copy = carve.template take<char>(c.v_block_bytes);
    for (int head = item.head_begin; head < item.head_end; ++head) read_head(head);
  }

  void run() {
    // At least a chunk of keys, for each part of the vectors passes over it at a part of the pace.
    const int64_t ahead_bytes = max_of(kAheadBytes, kKeyChunk * c.k_block_bytes);
    Tile tiles[2];
    HeadTile heads[2];
    find_tile(c, item, item.tile_begin, last_position, &tiles[0]);
    find_head(c, tiles[0], item.head_begin, &heads[0]);
    int now = 0;  // of `heads`
    for (int t = item.tile_begin; t < item.tile_end; ++t) {
      const Tile& tile = tiles[(t - item.tile_begin) % 2];
      Tile& next = tiles[(t - item.tile_begin + 1) % 2];
      if (t + 1 < item.tile_end) find_tile(c, item, t + 1, last_position, &next);
      for (int head = item.head_begin; head < item.head_end; ++head, now = 1 - now) {
        ahead.begin();
        list(c, tile, heads[now], head, &ahead);
        if (head + 1 < item.head_end) {
          find_head(c, tile, head + 1, &heads[1 - now]);
          list(c, tile, heads[1 - now], head + 1, &ahead);
        } else if (t + 1 < item.tile_end) {
          find_head(c, next, item.head_begin, &heads[1 - now]);
          list(c, next, heads[1 - now], item.head_begin, &ahead);
        }
        ahead.go_to(ahead_bytes);
        clean_last_block<T>(c, item, tile, &heads[now], copy);
        for (int m0 = 0; m0 < vectors; m0 += kPassVectors)
          pass_over(t, tile, heads[now], head, m0, vectors - m0 < kPassVectors ? vectors - m0 : kPassVectors);
      }
    }
    if (!item.folds) return;
    for (int head = item.head_begin; head < item.head_end; ++head) {
      const HeadState<T>& state = states[head - item.head_begin];
      for (int m = 0; m < vectors; ++m)
        if (!item.complete)
          keep(item.rows[m / c.group].first_tile, head, m, state.values + m * c.v_pad, state.top[m], state.sum[m]);
        else
          write_output(c, item.rows[m / c.group].row, head * c.group + m % c.group, state.top[m], state.sum[m],
                     state.values + m * c.v_pad);
    }
  }

 private:
  using Query = typename T::Query;

  void read_head(int head) {
    HeadState<T>& state = states[head - item.head_begin];
    state.q = carve.template take<Query>(vectors * query_length<T>(c));
    state.vector = carve.template take<Vector>(vectors);
    state.values = carve.template take<float>(vectors * c.v_pad);
    state.top = carve.template take<float>(vectors);
    state.sum = carve.template take<float>(vectors);
    for (int m = 0; m < vectors; ++m) {
      const QueryRow& row = item.rows[m / c.group];
      const int64_t query_head = head * c.group + m % c.group;
      if (row.position > last_position) last_position = row.position;
      const float unit = encode_query<T>(c, (row.row * c.heads + query_head) * c.dim, state.q + m * query_length<T>(c));
      state.vector[m] = {row.position, c.slopes ? c.slopes[query_head] * kLog2E : 0.0f, c.scale * unit * kLog2E};
      if (item.folds) begin_output(c, row.row, query_head, state.values + m * c.v_pad, state.top + m, state.sum + m);
    }
  }

  // Calls f(Size, first vector, first block, end). All vectors pass over a chunk of so many blocks before the next one is
  // read: it stays near, and memory is read in order. Where arithmetic binds a tile is one chunk.
  template <class F>
  __attribute__((always_inline)) static void in_chunks(const Parts<T>& parts, int begin, int end, int blocks, F&& f) {
    if (parts.count > kFetchingParts) blocks = kTileBlocks;
    for (int b = begin; b < end; b += blocks)
      parts.each([&](auto size, int m) { f(size, m, b, b + blocks < end ? b + blocks : end); });
  }

  // Vectors [m0, m0 + count) of a head over one tile.
  void pass_over(int t, const Tile& tile, const HeadTile& in, int head, int m0, int count) {
    const HeadState<T>& state = states[head - item.head_begin];
    // Blocks that some vector of this pass sees. Leaving out the others changes no bit: their weights are 0.
    int64_t lowest = INT64_MAX, highest = -1;
    for (int m = m0; m < m0 + count; ++m) {
      if (state.vector[m].position < lowest) lowest = state.vector[m].position;
      if (state.vector[m].position > highest) highest = state.vector[m].position;
    }
    int begin = 0, end = tile.count;
    while (end > 0 && tile.start[end - 1] > highest) --end;
    if (c.window)
      while (begin < end && tile.start[begin] + tile.tokens[begin] <= lowest - c.window + 1) ++begin;
    if (begin == end) return;
    const Parts<T> parts(count);
    in_chunks(parts, begin, end, kKeyChunk, [&](auto size, int m, int from, int to) {
      constexpr int MR = decltype(size)::value;
      scores_of<T, MR, key_blocks_of(MR)>(c, in, from, to, state.q + (m0 + m) * query_length<T>(c), scores + m * kTile,
                                          &ahead, parts.count);
    });
    TileSums sums;
    softmax<T>(c, tile, in, begin, end, state.vector + m0, count, scores, weights, &sums, &ahead);
    constexpr int kWeights = kTile * T::kPerQuery / T::kPerWord;  // of one vector
    const int chunk = T::kFixedPoint ? kTileBlocks : (int)max_of(1, kValueChunkBytes / c.v_block_bytes);
    in_chunks(parts, begin, end, chunk, [&](auto size, int m, int from, int to) {
      constexpr int MR = decltype(size)::value;
      values_of<T, MR, columns_of(MR) / T::kAccRegisters>(c, in, from, to, 0, weights + m * kWeights, sums.unit + m,
                                                          tile_values + m * c.v_pad, from > begin, &ahead, parts.count);
    });
    if (!item.folds) {
      for (int m = 0; m < count; ++m) {
        const QueryRow& row = item.rows[(m0 + m) / c.group];
        if (t >= row.first_tile && t <= row.last_tile)
          keep(t, head, m0 + m, tile_values + m * c.v_pad, sums.top[m], sums.sum[m]);
      }
      return;
    }
    FoldWeights fold;
    fold_sums(count, state.top + m0, state.sum + m0, sums, &fold);
    for (int m = 0; m < count; ++m)
      fold_values(c.v_pad, state.values + (m0 + m) * c.v_pad, fold.before[m], tile_values + m * c.v_pad, fold.tile[m]);
  }

  // Writes vector m's partial of a tile where `finish` will find it.
  void keep(int t, int head, int m, const float* values, float top, float sum) {
    put_partial(c, partial_of(c, item.rows[m / c.group], t, head) + m % c.group * partial_length(c), values, top, sum);
  }

  const Call& c;
  const Item& item;
  const int vectors;  // of each head
  int64_t last_position = 0;
  Carve carve;
  HeadState<T>* states;
  float *tile_values, *scores;
  Query* weights;
  char* copy;
  Ahead ahead;
};

template <class T>
static void attend_item(const Call& c, const Item& item) {
  ItemRun<T>(c, item).run();
}

static void attend(const Call& c, const Item& item) {
  switch (c.kv) {
    case KvType::kF32: return attend_item<F32>(c, item);
    case KvType::kBf16: return attend_item<Bf16>(c, item);
    case KvType::kF16: return attend_item<F16>(c, item);
    case KvType::kI8: return attend_item<I8>(c, item);
  }
}

}  // namespace
