// The kernels of one instruction set: compiled once per ISA with -DHJ_ISA=name and that ISA's flags.
//
// A tile of keys passes over all query vectors of an item:
//   scores = q . k        registers hold [vectors x tokens]; a key word holds the same token's next 1, 2 or 4 dims
//   softmax of the tile   its own max and sum
//   values = weights . v  registers hold [vectors x dims]; a value word holds the same dim's next 1, 2 or 4 tokens
//   fold                  into the row's running (max, sum, values), or kept as a partial
// Every element is one chain of multiply-adds in a fixed order, however many vectors share the registers.
#include "call.h"
#include "simd.h"

#ifndef HJ_ISA
#error "compile with -DHJ_ISA=name"
#endif
#define HJ_JOIN_(a, b) a##b
#define HJ_JOIN(a, b) HJ_JOIN_(a, b)
#define HJ_STRING_(a) #a
#define HJ_STRING(a) HJ_STRING_(a)

#if defined(__AVX512BF16__)
#define HJ_BF16_DOT 1
#else
#define HJ_BF16_DOT 0
#endif

namespace {

using namespace hetero_jax;

constexpr int kBlockVectors = kBlock / kWidth;  // registers for a block's tokens
constexpr float kLowest = -3.402823466e38f;
constexpr int64_t kAheadBytes = 64 << 10;  // measured: 16 and 128 KiB are slower by 5 to 15%
constexpr int64_t kLine = 64;              // of the cache

// ---- element types: how a word of the pool multiplies -----------------------------------------------------------

struct F32 {
  using Query = float;
  static constexpr int kPerWord = 1, kPerQuery = 1, kWordBytes = 4;
  struct Word {
    vf x;
  };
  HJ_INLINE Word load_word(const char* from) { return {load<vf>(from)}; }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) { return fma(splat(*q), w.x, acc); }
  HJ_INLINE uint32_t encode(float x) { return cast<uint32_t>(x); }
};

struct F16 {
  using Query = float;
  static constexpr int kPerWord = 1, kPerQuery = 1, kWordBytes = 2;
  struct Word {
    vf x;
  };
  HJ_INLINE Word load_word(const char* from) { return {half_to_float(load<vh>(from))}; }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) { return fma(splat(*q), w.x, acc); }
};

#if HJ_BF16_DOT
struct Bf16 {
  using Query = uint16_t;
  static constexpr int kPerWord = 2, kPerQuery = 2, kWordBytes = 4;
  struct Word {
    __m512i x;
  };
  HJ_INLINE Word load_word(const char* from) { return {load<__m512i>(from)}; }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) {
    __m512i pair = _mm512_set1_epi32(load<int32_t>(q));
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pair, (__m512bh)w.x);
  }
};
#else
struct Bf16 {
  using Query = float;
  static constexpr int kPerWord = 2, kPerQuery = 2, kWordBytes = 4;
  struct Word {
    vf low, high;
  };
  HJ_INLINE Word load_word(const char* from) {
    vu both = load<vu>(from);
    return {cast<vf>(both << 16), cast<vf>(both & 0xffff0000u)};
  }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) { return fma(splat(q[1]), w.high, fma(splat(q[0]), w.low, acc)); }
};
#endif

struct I8 {
  using Query = float;
  static constexpr int kPerWord = 4, kPerQuery = 4, kWordBytes = 4;
  struct Word {
    vf x[4];
  };
  HJ_INLINE Word load_word(const char* from) {
    vi all = load<vi>(from);
    return {{__builtin_convertvector((all << 24) >> 24, vf), __builtin_convertvector((all << 16) >> 24, vf),
             __builtin_convertvector((all << 8) >> 24, vf), __builtin_convertvector(all >> 24, vf)}};
  }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) {
    for (int i = 0; i < 4; ++i) acc = fma(splat(q[i]), w.x[i], acc);
    return acc;
  }
};

HJ_INLINE void store_query(float* to, vf x) { store(to, x); }
#if HJ_BF16_DOT
HJ_INLINE void store_query(uint16_t* to, vf x) { store(to, cast<__m256i>(_mm512_cvtneps_pbh((__m512)x))); }
#endif

// ---- register blocks --------------------------------------------------------------------------------------------

// Accumulators that fit beside the operands: 32 registers with AVX-512 and NEON, 16 else.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 8;
constexpr int columns_of(int vectors) { return vectors <= 2 ? 8 : vectors <= 6 ? 4 : 2; }
#elif defined(__ARM_NEON)
constexpr int kMaxVectors = 4;
constexpr int columns_of(int vectors) { return vectors == 1 ? 8 : 4; }
#elif defined(__AVX2__)
constexpr int kMaxVectors = 4;
constexpr int columns_of(int vectors) { return vectors == 1 ? 8 : vectors == 2 ? 4 : 2; }
#else
constexpr int kMaxVectors = 2;
constexpr int columns_of(int vectors) { return vectors == 1 ? 8 : 4; }
#endif

// Walks the memory that will be read next, in the order in which it will be read, a fixed distance ahead: one
// sequential stream, which the hardware's own prefetchers follow, where the register blocks below read several at once.
struct Ahead {
  const char* blocks[4 * kTileBlocks];  // keys and values of this tile, then of the next
  int32_t lines[4 * kTileBlocks];
  int count = 0, block = 0;
  int32_t line = 0;  // next one of the current block
  int tile_blocks = 0;  // of this tile: keys and values
};

HJ_INLINE void fetch_lines(Ahead* ahead, int count) {
  if (ahead->block >= ahead->count) return;
  const char* at = ahead->blocks[ahead->block] + ahead->line * kLine;
  for (int i = 0; i < count; ++i) __builtin_prefetch(at + i * kLine, 0, 3);
  ahead->line += count;
  if (ahead->line >= ahead->lines[ahead->block]) ahead->line = 0, ++ahead->block;
}

// scores[MR][NB blocks] of q and NB blocks of keys. As many lines are fetched ahead as are read.
template <class T, int MR, int NB, bool AHEAD>
static __attribute__((noinline)) void score_blocks(const char* const* keys, int64_t words, const typename T::Query* q,
                                                   int64_t q_stride, float* scores, Ahead* ahead) {
  vf acc[MR][NB][kBlockVectors] = {};
  for (int64_t w = 0; w < words; ++w) {
    if (AHEAD && (NB > 1 || (w & 1))) fetch_lines(ahead, NB > 1 ? NB : 2);
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) {
        auto word = T::load_word(keys[b] + (w * kBlock + j * kWidth) * T::kWordBytes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) acc[m][b][j] = T::dot(acc[m][b][j], q + m * q_stride + w * T::kPerQuery, word);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) store(scores + m * kTile + b * kBlock + j * kWidth, acc[m][b][j]);
}

// values[MR][NV registers of dims] = weights . v over `blocks` blocks of values.
template <class T, int MR, int NV, bool AHEAD>
static __attribute__((noinline)) void weigh_blocks(const char* const* values, int64_t column, int64_t blocks,
                                                   int64_t v_pad, const typename T::Query* weights, float* out,
                                                   Ahead* ahead) {
  vf acc[MR][NV] = {};
  constexpr int kSteps = kBlock / T::kPerWord;
  constexpr int kLines = NV / kBlockVectors > 0 ? NV / kBlockVectors : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const char* row = values[b] + column * T::kWordBytes;
    const typename T::Query* p = weights + b * kBlock;
    for (int t = 0; t < kSteps; ++t, row += v_pad * T::kWordBytes, p += T::kPerQuery) {
      if (AHEAD) fetch_lines(ahead, kLines);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        auto word = T::load_word(row + n * kWidth * T::kWordBytes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) acc[m][n] = T::dot(acc[m][n], p + m * kTile, word);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) store(out + m * v_pad + n * kWidth, acc[m][n]);
}

// Blocks of one tile, in order of position.
struct Tile {
  int count;
  const char* keys[kTileBlocks];
  const char* values[kTileBlocks];
  int64_t start[kTileBlocks];  // position of the first token
  int32_t tokens[kTileBlocks];
  int64_t slot[kTileBlocks];  // of the first token, over all pages
};

template <class T, int MR, int NB>
static void scores_of(const Call& c, const Tile& tile, int begin, int end, const typename T::Query* q, float* scores,
                      Ahead* ahead) {
  const int64_t words = c.dim_pad / T::kPerWord;
  int b = begin;
  for (; b + NB <= end; b += NB) {
    auto run = ahead ? score_blocks<T, MR, NB, true> : score_blocks<T, MR, NB, false>;
    run(tile.keys + b, words, q, c.dim_pad, scores + b * kBlock, ahead);
  }
  if constexpr (NB > 1) {
    if (b < end) scores_of<T, MR, NB / 2>(c, tile, b, end, q, scores, ahead);
  }
}

template <class T, int MR, int NV>
static void values_of(const Call& c, const Tile& tile, int begin, int end, int64_t column,
                      const typename T::Query* weights, float* out, Ahead* ahead) {
  for (; column + NV * kWidth <= c.v_pad; column += NV * kWidth) {
    auto run = ahead ? weigh_blocks<T, MR, NV, true> : weigh_blocks<T, MR, NV, false>;
    run(tile.values + begin, column, end - begin, c.v_pad, weights + begin * kBlock, out + column, ahead);
  }
  if constexpr (NV > 1) {
    if (column < c.v_pad) values_of<T, MR, NV / 2>(c, tile, begin, end, column, weights, out, ahead);
  }
}

static void list_blocks(const char* const* blocks, int count, int64_t bytes, Ahead* ahead) {
  for (int b = 0; b < count; ++b) {
    ahead->blocks[ahead->count] = blocks[b];
    ahead->lines[ahead->count++] = (int32_t)((bytes + kLine - 1) / kLine);
  }
}

// Lists what is read from the start of `tile` on, and keeps the place where fetching stands, or sets it to
// kAheadBytes behind the start where it fell out of step.
static void look_ahead(const Call& c, const Tile& tile, const Tile* next, bool first, Ahead* ahead) {
  const int place = first ? 0 : ahead->block - ahead->tile_blocks;
  ahead->count = 0;
  for (const Tile* part = &tile; part; part = part == next ? nullptr : next) {
    list_blocks(part->keys, part->count, c.k_block_bytes, ahead);
    list_blocks(part->values, part->count, c.v_block_bytes, ahead);
  }
  // Not past what is listed: small blocks would never be fetched ahead.
  const int wanted = (int)(kAheadBytes / c.k_block_bytes), least = wanted < 2 * tile.count ? wanted : 2 * tile.count;
  const int most = 2 * least + 1;
  if (place < least || place > most) ahead->line = 0;
  ahead->block = place < least ? least : place > most ? most : place;
  ahead->tile_blocks = 2 * tile.count;
}

// Calls f(Size, first vector) over parts of nearly equal size, at most kMaxVectors each.
template <int N>
struct Size {
  static constexpr int value = N;
};
template <int N, class F>
HJ_INLINE void with_size(int size, F&& f) {
  if constexpr (N > 1) {
    if (size < N) return with_size<N - 1>(size, f);
  }
  f(Size<N>{});
}
template <class F>
HJ_INLINE void for_parts(int vectors, F&& f) {
  const int parts = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int part = 0; part < parts; ++part) {
    const int begin = vectors * part / parts, end = vectors * (part + 1) / parts;
    with_size<kMaxVectors>(end - begin, [&](auto size) { f(size, begin); });
  }
}

// ---- softmax and fold -------------------------------------------------------------------------------------------

struct Vector {  // one query head of one row
  int64_t position;
  float slope;
};

HJ_INLINE vi lane_index() {
  vi lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// Scores of one vector over blocks [begin, end) become weights in place; returns max and sum.
template <class T>
static void softmax_row(const Call& c, const Tile& tile, int begin, int end, int head, const Vector& vector,
                        float* scores, typename T::Query* weights, float* top_out, float* sum_out) {
  const bool scaled = c.kv == KvType::kI8;
  const float* k_scale = c.k_scale + (scaled ? head * c.num_pages * c.page_blocks * kBlock : 0);
  const float* v_scale = c.v_scale + (scaled ? head * c.num_pages * c.page_blocks * kBlock : 0);
  const int64_t first = c.window ? vector.position - c.window + 1 : 0;
  vf top = splat(kLowest);
  for (int b = begin; b < end; ++b) {
    const int64_t start = tile.start[b];
    const bool whole = tile.tokens[b] == kBlock && start + kBlock - 1 <= vector.position && start >= first;
    for (int j = 0; j < kBlockVectors; ++j) {
      float* at = scores + b * kBlock + j * kWidth;
      vf x = load<vf>(at) * c.scale;
      if (scaled) x = x * load<vf>(k_scale + tile.slot[b] + j * kWidth);
      if (c.softcap != 0) x = tanh_of(x * (1.0f / c.softcap)) * c.softcap;
      vi lane = lane_index() + j * kWidth;
      if (c.slopes) {
        vi distance = lane + (int32_t)(start - vector.position);
        x = fma(__builtin_convertvector(distance, vf), splat(vector.slope), x);
      }
      if (!whole) {
        // Lanes [low, high) are seen.
        const int64_t low = first - start, behind = vector.position - start + 1;
        const int64_t high = behind < tile.tokens[b] ? behind : tile.tokens[b];
        vi seen = (lane >= (int32_t)(low < 0 ? 0 : low > kBlock ? kBlock : low)) & (lane < (int32_t)(high < 0 ? 0 : high));
        x = cast<vf>((cast<vi>(x) & seen) | (splat_i((int32_t)0xff800000) & ~seen));
      }
      store(at, x);
      top = max(top, x);
    }
  }
  const float highest = reduce_max(top);
  vf sum = {};
  for (int b = begin; b < end; ++b)
    for (int j = 0; j < kBlockVectors; ++j) {
      const int at = b * kBlock + j * kWidth;
      vf p = exp_nonpositive(load<vf>(scores + at) - highest);
      sum = sum + p;
      if (scaled) p = p * load<vf>(v_scale + tile.slot[b] + j * kWidth);
      store_query(weights + at, p);
    }
  *top_out = highest;
  *sum_out = reduce_sum(sum);
}

static float exp_scalar(float x) { return exp_nonpositive(splat(x))[0]; }

// (top, sum, values) += (tile_top, tile_sum, tile_values). One copy for items and partials: same bits.
static __attribute__((noinline)) void fold(int64_t v_pad, float* top, float* sum, float* values, float tile_top,
                                           float tile_sum, const float* tile_values) {
  const float highest = *top > tile_top ? *top : tile_top;
  const float old_weight = exp_scalar(*top - highest), new_weight = exp_scalar(tile_top - highest);
  *top = highest;
  *sum = fma(splat(*sum), splat(old_weight), splat(tile_sum * new_weight))[0];
  for (int64_t d = 0; d < v_pad; d += kWidth)
    store(values + d, fma(load<vf>(values + d), splat(old_weight), load<vf>(tile_values + d) * new_weight));
}

static float log_scalar(float x) { return __builtin_logf(x); }

// Divides by the sum and writes one head of one row.
static void write_output(const Call& c, int64_t row, int64_t head, float top, float sum, float* values) {
  if (c.sinks) {
    const float sink = c.sinks[head];
    const float highest = top > sink ? top : sink;
    const float weight = exp_scalar(top - highest);
    for (int64_t d = 0; d < c.v_pad; d += kWidth) store(values + d, load<vf>(values + d) * weight);
    sum = sum * weight + exp_scalar(sink - highest);
    top = highest;
  }
  const int64_t at = row * c.heads + head;
  if (c.lse) c.lse[at] = sum == 0 ? -__builtin_inff() : top + log_scalar(sum);
  const vf factor = splat(sum == 0 ? 0.0f : 1.0f / sum);
  for (int64_t d = 0; d < c.v_pad; d += kWidth) store(values + d, load<vf>(values + d) * factor);
  if (c.q_bf16) {
    uint16_t* out = (uint16_t*)c.out + at * c.v_dim;
    for (int64_t d = 0; d < c.v_dim; ++d) out[d] = to_bf16(values[d]);
  } else {
    __builtin_memcpy((float*)c.out + at * c.v_dim, values, c.v_dim * sizeof(float));
  }
}

static float* partial_of(const Call& c, const QueryRow& row, int tile, int head) {
  return c.partials + ((row.partial + tile) * c.kv_heads + head) * c.group * (c.v_pad + kPartialTail);
}

static void finish(const Call& c, const QueryRow& row, int head) {
  const int64_t stride = c.v_pad + kPartialTail;
  float* values = (float*)thread_scratch(c.v_pad * 4);
  for (int64_t g = 0; g < c.group; ++g) {
    float top = kLowest, sum = 0;
    __builtin_memset(values, 0, c.v_pad * 4);
    for (int tile = row.first_tile; tile <= row.last_tile; ++tile) {
      const float* more = partial_of(c, row, tile, head) + g * stride;
      fold(c.v_pad, &top, &sum, values, more[c.v_pad], more[c.v_pad + 1], more);
    }
    write_output(c, row.row, head * c.group + g, top, sum, values);
  }
}

// ---- an item ----------------------------------------------------------------------------------------------------

static void find_tile(const Call& c, const Item& item, int index, int64_t last_position, Tile* tile) {
  tile->count = 0;
  for (int64_t block = (int64_t)index * kTileBlocks; block < (int64_t)(index + 1) * kTileBlocks; ++block) {
    const int64_t page = block / c.page_blocks, within = block % c.page_blocks;
    const int64_t start = page * c.page_size + within * kBlock;
    if (start > last_position) break;
    const int64_t left = c.page_size - within * kBlock;
    const int b = tile->count++;
    tile->start[b] = start;
    tile->tokens[b] = (int32_t)(left < kBlock ? left : kBlock);
    // Pages outside the window may be anyone's by now: their blocks are listed and never read.
    const int64_t at = item.pages[page] * c.page_blocks + within;
    tile->slot[b] = at * kBlock;
    const int64_t in_head = (int64_t)item.head * c.num_pages * c.page_blocks + at;
    tile->keys[b] = c.k_pool + in_head * c.k_block_bytes;
    tile->values[b] = c.v_pool + in_head * c.v_block_bytes;
  }
}

// The values behind the sequence's end may be anything, and 0 * NaN is NaN: such a block is replaced by a clean copy.
template <class T>
static void clean_last_block(const Call& c, const Item& item, Tile* tile, char* copy) {
  const int b = tile->count - 1;
  if (b < 0 || tile->start[b] + tile->tokens[b] <= item.context) return;
  const int64_t held = item.context - tile->start[b];
  constexpr int64_t size = T::kWordBytes / T::kPerWord;
  __builtin_memcpy(copy, tile->values[b], c.v_block_bytes);
  for (int64_t token = held; token < kBlock; ++token)
    for (int64_t d = 0; d < c.v_pad; ++d) {
      const int64_t at = ((token / T::kPerWord) * c.v_pad + d) * T::kPerWord + token % T::kPerWord;
      __builtin_memset(copy + at * size, 0, size);
    }
  tile->values[b] = copy;
}

HJ_INLINE float read_query(const Call& c, int64_t at) {
  return c.q_bf16 ? to_float(((const uint16_t*)c.q)[at]) : ((const float*)c.q)[at];
}
HJ_INLINE void encode_query(float* to, float x) { *to = x; }
HJ_INLINE void encode_query(uint16_t* to, float x) { *to = to_bf16(x); }

HJ_INLINE int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

template <class T>
static void attend_item(const Call& c, const Item& item) {
  using Query = typename T::Query;
  const int vectors = (int)(item.num_rows * c.group);
  const int pass = vectors < kPassVectors ? vectors : kPassVectors;
  // One buffer: queries | running values | tile values | scores | weights | copy of a block | per vector: top, sum, ...
  const int64_t q_bytes = round_up(vectors * c.dim_pad * sizeof(Query), 64), values_bytes = vectors * c.v_pad * 4;
  const int64_t pass_bytes = pass * c.v_pad * 4, scores_bytes = pass * kTile * 4;
  const int64_t block_bytes = round_up(c.v_block_bytes, 64), list_bytes = round_up(vectors * 4, 64);
  char* at = (char*)thread_scratch(q_bytes + values_bytes + pass_bytes + 2 * scores_bytes + block_bytes +
                                   2 * list_bytes + round_up(vectors * sizeof(Vector), 64));
  auto take = [&](int64_t bytes) { char* here = at; at += bytes; return here; };
  Query* q = (Query*)take(q_bytes);
  float* values = (float*)take(values_bytes);
  float* tile_values = (float*)take(pass_bytes);
  float* scores = (float*)take(scores_bytes);
  Query* weights = (Query*)take(scores_bytes);
  char* copy = take(block_bytes);
  float* top = (float*)take(list_bytes);
  float* sum = (float*)take(list_bytes);
  Vector* vector = (Vector*)at;

  int64_t last_position = 0;
  for (int r = 0; r < item.num_rows; ++r) {
    const QueryRow& row = item.rows[r];
    if (row.position > last_position) last_position = row.position;
    for (int64_t g = 0; g < c.group; ++g) {
      const int64_t m = r * c.group + g, head = item.head * c.group + g;
      const int64_t from = (row.row * c.heads + head) * c.dim;
      vector[m] = {row.position, c.slopes ? c.slopes[head] : 0.0f};
      for (int64_t d = 0; d < c.dim; ++d) encode_query(q + m * c.dim_pad + d, read_query(c, from + d));
      for (int64_t d = c.dim; d < c.dim_pad; ++d) encode_query(q + m * c.dim_pad + d, 0.0f);
    }
  }
  for (int m = 0; m < vectors; ++m) top[m] = kLowest, sum[m] = 0;
  if (item.complete) __builtin_memset(values, 0, values_bytes);

  Tile tiles[2];
  Ahead ahead;
  find_tile(c, item, item.tile_begin, last_position, &tiles[0]);
  for (int t = item.tile_begin; t < item.tile_end; ++t) {
    Tile& tile = tiles[(t - item.tile_begin) % 2];
    Tile* next = nullptr;
    if (t + 1 < item.tile_end) {
      next = &tiles[(t - item.tile_begin + 1) % 2];
      find_tile(c, item, t + 1, last_position, next);
    }
    look_ahead(c, tile, next, t == item.tile_begin, &ahead);
    clean_last_block<T>(c, item, &tile, copy);
    for (int m0 = 0; m0 < vectors; m0 += pass) {
      const int count = vectors - m0 < pass ? vectors - m0 : pass;
      // Blocks that some vector of this pass sees. Leaving out the others changes no bit: their weights are 0.
      int64_t lowest = INT64_MAX, highest = -1;
      for (int m = m0; m < m0 + count; ++m) {
        if (vector[m].position < lowest) lowest = vector[m].position;
        if (vector[m].position > highest) highest = vector[m].position;
      }
      int begin = 0, end = tile.count;
      while (end > 0 && tile.start[end - 1] > highest) --end;
      if (c.window)
        while (begin < end && tile.start[begin] + tile.tokens[begin] <= lowest - c.window + 1) ++begin;
      if (begin == end) continue;
      for_parts(count, [&](auto size, int m) {
        constexpr int MR = decltype(size)::value;
        constexpr int NB = columns_of(MR) / kBlockVectors > 0 ? columns_of(MR) / kBlockVectors : 1;
        scores_of<T, MR, NB>(c, tile, begin, end, q + (m0 + m) * c.dim_pad, scores + m * kTile,
                             m0 + m == 0 ? &ahead : nullptr);
      });
      float tile_top[kPassVectors], tile_sum[kPassVectors];
      for (int m = 0; m < count; ++m)
        softmax_row<T>(c, tile, begin, end, item.head, vector[m0 + m], scores + m * kTile, weights + m * kTile,
                       tile_top + m, tile_sum + m);
      for_parts(count, [&](auto size, int m) {
        constexpr int MR = decltype(size)::value;
        values_of<T, MR, columns_of(MR)>(c, tile, begin, end, 0, weights + m * kTile, tile_values + m * c.v_pad,
                                         m0 + m == 0 ? &ahead : nullptr);
      });
      for (int m = 0; m < count; ++m) {
        const float* more = tile_values + m * c.v_pad;
        if (item.complete) {
          fold(c.v_pad, top + m0 + m, sum + m0 + m, values + (m0 + m) * c.v_pad, tile_top[m], tile_sum[m], more);
          continue;
        }
        const QueryRow& row = item.rows[(m0 + m) / c.group];
        if (t < row.first_tile || t > row.last_tile) continue;
        float* to = partial_of(c, row, t, item.head) + (m0 + m) % c.group * (c.v_pad + kPartialTail);
        __builtin_memcpy(to, more, c.v_pad * sizeof(float));
        to[c.v_pad] = tile_top[m], to[c.v_pad + 1] = tile_sum[m];
      }
    }
  }
  if (!item.complete) return;
  for (int m = 0; m < vectors; ++m)
    write_output(c, item.rows[m / c.group].row, item.head * c.group + m % c.group, top[m], sum[m], values + m * c.v_pad);
}

static void attend(const Call& c, const Item& item) {
  switch (c.kv) {
    case KvType::kF32: return attend_item<F32>(c, item);
    case KvType::kBf16: return attend_item<Bf16>(c, item);
    case KvType::kF16: return attend_item<F16>(c, item);
    case KvType::kI8: return attend_item<I8>(c, item);
  }
}

// ---- append -----------------------------------------------------------------------------------------------------

// Writes one head's dims; element (token, dim) is at at(dim).
template <class At>
static void put(const Call& c, char* block, const char* from, int64_t dims, float* scale, At at) {
  auto read = [&](int64_t d) { return c.kv_bf16 ? to_float(((const uint16_t*)from)[d]) : ((const float*)from)[d]; };
  switch (c.kv) {
    case KvType::kF32:
      for (int64_t d = 0; d < dims; ++d) ((float*)block)[at(d)] = read(d);
      return;
    case KvType::kBf16:
      if (c.kv_bf16)
        for (int64_t d = 0; d < dims; ++d) ((uint16_t*)block)[at(d)] = ((const uint16_t*)from)[d];
      else
        for (int64_t d = 0; d < dims; ++d) ((uint16_t*)block)[at(d)] = to_bf16(((const float*)from)[d]);
      return;
    case KvType::kF16:
      for (int64_t d = 0; d < dims; ++d) ((uint16_t*)block)[at(d)] = to_half(read(d));
      return;
    case KvType::kI8: {
      float largest = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const float size = __builtin_fabsf(read(d));
        if (!(size <= largest)) largest = size;  // NaN too: the token is lost, and says so
      }
      *scale = largest / 127.0f;
      const float factor = largest > 0 && largest < __builtin_inff() ? 127.0f / largest : 0.0f;
      for (int64_t d = 0; d < dims; ++d) {
        const float x = factor == 0.0f ? 0.0f : read(d) * factor;
        ((int8_t*)block)[at(d)] = (int8_t)(x < 0 ? x - 0.5f : x + 0.5f);
      }
      return;
    }
  }
}

static void append(const Call& c, int64_t row_begin, int64_t row_end) {
  const int64_t per_word = c.kv == KvType::kBf16 ? 2 : c.kv == KvType::kI8 ? 4 : 1, size = c.kv_bf16 ? 2 : 4;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t page = c.row_slot[r] / c.page_size, offset = c.row_slot[r] % c.page_size;
    if (page >= c.num_pages) continue;
    const int64_t token = offset % kBlock;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      const int64_t block = (h * c.num_pages + page) * c.page_blocks + offset / kBlock, slot = block * kBlock + token;
      put(c, c.k_pool + block * c.k_block_bytes, (const char*)c.k + (r * c.kv_heads + h) * c.dim * size, c.dim,
          c.k_scale + slot, [&](int64_t d) { return (d / per_word * kBlock + token) * per_word + d % per_word; });
      put(c, c.v_pool + block * c.v_block_bytes, (const char*)c.v + (r * c.kv_heads + h) * c.v_dim * size, c.v_dim,
          c.v_scale + slot,
          [&](int64_t d) { return (token / per_word * c.v_pad + d) * per_word + token % per_word; });
    }
  }
}

// ---- what the machine can do, for benchmarks --------------------------------------------------------------------

static float probe_read(const char* from, int64_t bytes) {
  vf sum[8] = {};
  for (int64_t at = 0; at + 8 * (int64_t)sizeof(vf) <= bytes; at += 8 * sizeof(vf))
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = sum[i] + load<vf>(from + at + i * sizeof(vf));
  for (int i = 1; i < 8; ++i) sum[0] = sum[0] + sum[i];
  return reduce_sum(sum[0]);
}

template <class T>
static float probe_chains(int64_t steps) {
  vf acc[12] = {}, zeros = {};
  typename T::Query q[T::kPerQuery] = {};
  asm volatile("" : "+m"(zeros), "+m"(q));  // unknown to the compiler, which would drop a product with 0
  auto word = T::load_word((const char*)&zeros);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = T::dot(acc[i], q, word);
  for (int i = 1; i < 12; ++i) acc[0] = acc[0] + acc[i];
  return reduce_sum(acc[0]);
}

// Runs `steps` steps and returns the multiply-adds of one.
static int64_t probe_multiply_add(KvType kv, int64_t steps) {
  volatile float sink;
  switch (kv) {
    case KvType::kBf16: sink = probe_chains<Bf16>(steps); (void)sink; return 12 * kWidth * Bf16::kPerWord;
    default: sink = probe_chains<F32>(steps); (void)sink; return 12 * kWidth;
  }
}

}  // namespace

namespace hetero_jax {
extern const Kernels HJ_JOIN(kernels_, HJ_ISA);
const Kernels HJ_JOIN(kernels_, HJ_ISA) = {HJ_STRING(HJ_ISA), append, attend, finish, probe_read,
                                                  probe_multiply_add};
}  // namespace hetero_jax
