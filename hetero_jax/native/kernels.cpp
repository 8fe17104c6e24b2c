// The kernels of one instruction set: compiled once per ISA with -DHJ_ISA=name and that ISA's flags.
//
// A tile of keys of one head passes over all query vectors of an item:
//   scores = q . k        registers hold [vectors x tokens]; a key word holds the same token's next 1, 2 or 4 dims
//   softmax of the tile   its own max and sum
//   values = weights . v  registers hold [vectors x dims]; a value word holds the same dim's next 1, 2 or 4 tokens
//   fold                  into the row's running (max, sum, values), or kept as a partial
// Every element is the same few chains of multiply-adds in a fixed order, however many vectors share the registers.
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
#if defined(__AVX512VNNI__)
#define HJ_INT8_DOT 1
#else
#define HJ_INT8_DOT 0
#endif

namespace {

using namespace hetero_jax;

constexpr int kBlockVectors = kBlock / kWidth;  // registers for a block's tokens
constexpr float kLowest = -3.402823466e38f;
constexpr int64_t kAheadBytes = 8 << 10;  // measured: 2 to 32 KiB
constexpr int64_t kLine = 64;              // of the cache

// Scores are summed in chains, so that one vector needs few blocks of keys at a time to hide the latency of its
// multiply-adds: memory is then read in nearly the order in which it lies.
#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kFloatChains = 2;
#else
constexpr int kFloatChains = 1;
#endif

// ---- element types: how a word of the pool multiplies -----------------------------------------------------------
//
// Word    a register of the pool's words          kPerWord   elements of a word
// Query   what queries and weights are kept as    kPerQuery  Query elements that multiply a word
// Acc     what products are summed in             kTail      Query elements behind a query's last word

// Sums of products with queries and weights as they are.
template <class Words>
struct FloatSums : Words {
  using typename Words::Query;
  using typename Words::Word;
  using Acc = vf;
  static constexpr bool kFixedPoint = false;
  static constexpr int kAccRegisters = 1, kChains = kFloatChains, kTail = 0;
  HJ_INLINE Acc start(const Query*) { return vf{}; }
  HJ_INLINE Acc add(Acc a, Acc b) { return a + b; }
  HJ_INLINE vf result(Acc a) { return a; }
  HJ_INLINE Word load_key(const char* from) { return Words::load_word(from); }
  HJ_INLINE Acc score(Acc acc, const Query* q, Word w) { return Words::dot(acc, q, w); }
  HJ_INLINE Acc weigh(Acc acc, const Query* p, Word w) { return Words::dot(acc, p, w); }
};

struct F32Words {
  using Query = float;
  static constexpr int kPerWord = 1, kPerQuery = 1, kWordBytes = 4;
  struct Word {
    vf x;
  };
  HJ_INLINE Word load_word(const char* from) { return {load<vf>(from)}; }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) { return fma(splat(*q), w.x, acc); }
};

struct F16Words {
  using Query = float;
  static constexpr int kPerWord = 1, kPerQuery = 1, kWordBytes = 2;
  struct Word {
    vf x;
  };
  HJ_INLINE Word load_word(const char* from) { return {half_to_float(load<vh>(from))}; }
  HJ_INLINE vf dot(vf acc, const Query* q, Word w) { return fma(splat(*q), w.x, acc); }
};

#if HJ_BF16_DOT
struct Bf16Words {
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
struct Bf16Words {
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

using F32 = FloatSums<F32Words>;
using F16 = FloatSums<F16Words>;
using Bf16 = FloatSums<Bf16Words>;

#if HJ_INT8_DOT
// Dot products of bytes, one side unsigned: queries and weights become fixed-point numbers of 16 bits, whose two bytes
// multiply apart. Sums are whole numbers and exact.
struct I8 {
  using Query = int8_t;
  static constexpr int kPerWord = 4, kPerQuery = 8, kWordBytes = 4;
  static constexpr bool kFixedPoint = true;
  static constexpr int kAccRegisters = 2, kChains = 1, kTail = 64;
  struct Word {
    __m512i x;
  };
  struct Acc {
    __m512i high, low;
  };
  HJ_INLINE Acc start(const Query* tail) {
    return {_mm512_set1_epi32(load<int32_t>(tail)), _mm512_set1_epi32(load<int32_t>(tail + 4))};
  }
  HJ_INLINE Acc add(Acc a, Acc b) { return {_mm512_add_epi32(a.high, b.high), _mm512_add_epi32(a.low, b.low)}; }
  HJ_INLINE vf result(Acc a) {
    return fma(splat(256.0f), (vf)_mm512_cvtepi32_ps(a.high), (vf)_mm512_cvtepi32_ps(a.low));
  }
  HJ_INLINE Word load_word(const char* from) { return {load<__m512i>(from)}; }
  HJ_INLINE Word load_key(const char* from) {  // + 128, which `start` takes off again
    return {_mm512_xor_si512(load<__m512i>(from), _mm512_set1_epi8((char)0x80))};
  }
  HJ_INLINE Acc score(Acc acc, const Query* q, Word w) {
    return {_mm512_dpbusd_epi32(acc.high, w.x, _mm512_set1_epi32(load<int32_t>(q))),
            _mm512_dpbusd_epi32(acc.low, w.x, _mm512_set1_epi32(load<int32_t>(q + 4)))};
  }
  HJ_INLINE Acc weigh(Acc acc, const Query* p, Word w) {
    return {_mm512_dpbusd_epi32(acc.high, _mm512_set1_epi32(load<int32_t>(p)), w.x),
            _mm512_dpbusd_epi32(acc.low, _mm512_set1_epi32(load<int32_t>(p + 4)), w.x)};
  }
};
#else
struct I8Words {
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
using I8 = FloatSums<I8Words>;
#endif

HJ_INLINE void store_query(float* to, vf x) { store(to, x); }
#if HJ_BF16_DOT
HJ_INLINE void store_query(uint16_t* to, vf x) { store(to, cast<__m256i>(_mm512_cvtneps_pbh((__m512)x))); }
#endif

// ---- register blocks --------------------------------------------------------------------------------------------

template <int N>
struct Size {
  static constexpr int value = N;
};

// How many query vectors, and registers of tokens or dims with them, share the registers: 32 of them with AVX-512 and
// NEON, 16 else.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 6;
constexpr int columns_of(int vectors) { return vectors <= 3 ? 8 : 4; }
constexpr int key_blocks_of(int) { return 2; }
#elif defined(__ARM_NEON)
constexpr int kMaxVectors = 3;
constexpr int columns_of(int vectors) { return vectors == 1 ? 8 : 4; }
constexpr int key_blocks_of(int) { return 1; }
#elif defined(__AVX2__)
constexpr int kMaxVectors = 3;
constexpr int columns_of(int vectors) { return vectors == 1 ? 8 : vectors == 2 ? 4 : 2; }
constexpr int key_blocks_of(int vectors) { return vectors == 1 ? 2 : 1; }
#else
constexpr int kMaxVectors = 2;
constexpr int columns_of(int vectors) { return vectors == 1 ? 8 : 4; }
constexpr int key_blocks_of(int) { return 1; }
#endif

// Walks the memory that will be read next, in the order in which it will be read, a short distance ahead. Within a run
// the hardware's own prefetchers follow; at the beginning of the next run, somewhere else, they have to be led.
class Ahead {
 public:
  // What is read from now on: the parts of the current tile and head, and those of the next.
  void begin() { count_ = 0; }
  void add(const char* from, int64_t bytes) {
    if (count_ && end_[count_ - 1] == from) {
      end_[count_ - 1] = from + bytes;
    } else {
      begin_[count_] = from, end_[count_++] = from + bytes;
    }
  }
  // Stands `done` bytes behind the beginning of what was added.
  void go_to(int64_t done) {
    for (run_ = 0; run_ < count_ && done >= end_[run_] - begin_[run_]; ++run_) done -= end_[run_] - begin_[run_];
    at_ = run_ < count_ ? begin_[run_] + done : nullptr;
  }
  void fetch(int lines) {
    if (!at_) return;
    for (int i = 0; i < lines; ++i) __builtin_prefetch(at_ + i * kLine, 0, 3);
    at_ += lines * kLine;
    if (at_ >= end_[run_]) at_ = ++run_ < count_ ? begin_[run_] : nullptr;
  }

 private:
  const char* begin_[8 * kTileBlocks];
  const char* end_[8 * kTileBlocks];
  int count_ = 0, run_ = 0;
  const char* at_ = nullptr;
};

// scores[MR][NB blocks] of q and NB blocks of keys. As many lines are fetched ahead as are read.
template <class T, int MR, int NB, bool AHEAD>
static __attribute__((noinline)) void score_blocks(const char* const* keys, int64_t words, const typename T::Query* q,
                                                   int64_t q_stride, float* scores, Ahead* ahead) {
  typename T::Acc acc[MR][NB][kBlockVectors][T::kChains];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < NB * kBlockVectors * T::kChains; ++n)
      (&acc[m][0][0][0])[n] = T::start(q + m * q_stride + words * T::kPerQuery);
  auto step = [&](int64_t w, auto chain) __attribute__((always_inline)) {
    constexpr int c = decltype(chain)::value;
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) {
        auto word = T::load_key(keys[b] + (w * kBlock + j * kWidth) * T::kWordBytes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
          acc[m][b][j][c] = T::score(acc[m][b][j][c], q + m * q_stride + w * T::kPerQuery, word);
      }
  };
  int64_t w = 0;
  for (; w + T::kChains <= words; w += T::kChains) {
    if (AHEAD) ahead->fetch(NB * T::kChains * kBlock * T::kWordBytes / kLine);
    step(w, Size<0>{});
    if constexpr (T::kChains > 1) step(w + 1, Size<1>{});
  }
  if (w < words) step(w, Size<0>{});
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) {
        auto sum = acc[m][b][j][0];
        if constexpr (T::kChains > 1) sum = T::add(sum, acc[m][b][j][1]);
        store(scores + m * kTile + b * kBlock + j * kWidth, T::result(sum));
      }
}

// values[MR][NV registers of dims] = weights . v over `blocks` blocks of values; units: of fixed-point weights.
template <class T, int MR, int NV, bool AHEAD>
static __attribute__((noinline)) void weigh_blocks(const char* const* values, int64_t column, int64_t blocks,
                                                   int64_t v_pad, const typename T::Query* weights, const float* units,
                                                   float* out, Ahead* ahead) {
  typename T::Acc acc[MR][NV] = {};
  constexpr int kSteps = kBlock / T::kPerWord, kSpread = T::kPerQuery / T::kPerWord;
  constexpr int kBytes = NV * kWidth * T::kWordBytes, kTogether = kBytes < kLine ? kLine / kBytes : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const char* row = values[b] + column * T::kWordBytes;
    const typename T::Query* p = weights + b * kBlock * kSpread;
    for (int t = 0; t < kSteps; ++t, row += v_pad * T::kWordBytes, p += T::kPerQuery) {
      if (AHEAD && t % kTogether == 0) ahead->fetch(kBytes * kTogether / kLine);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        auto word = T::load_word(row + n * kWidth * T::kWordBytes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) acc[m][n] = T::weigh(acc[m][n], p + m * kTile * kSpread, word);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      vf sum = T::result(acc[m][n]);
      if constexpr (T::kFixedPoint) sum = sum * units[m];
      store(out + m * v_pad + n * kWidth, sum);
    }
}

// Blocks of one tile, in order of position.
struct Tile {
  int count;
  const char* at[kTileBlocks];  // the block's page, of head 0
  int32_t within[kTileBlocks];  // number of the block in its page
  int64_t start[kTileBlocks];   // position of the first token
  int32_t tokens[kTileBlocks];
  bool whole;  // all blocks are there and full
};

// What one head has in them.
struct HeadTile {
  const char* keys[kTileBlocks];
  const char* values[kTileBlocks];
  const float* k_scale[kTileBlocks];  // int8 only
  const float* v_scale[kTileBlocks];
};

// Query elements of one vector.
template <class T>
static int64_t query_length(const Call& c) {
  return c.dim_pad / T::kPerWord * T::kPerQuery + T::kTail;
}

template <class T, int MR, int NB>
static void scores_of(const Call& c, const HeadTile& in, int begin, int end, const typename T::Query* q, float* scores,
                      Ahead* ahead) {
  const int64_t words = c.dim_pad / T::kPerWord;
  int b = begin;
  for (; b + NB <= end; b += NB) {
    auto run = ahead ? score_blocks<T, MR, NB, true> : score_blocks<T, MR, NB, false>;
    run(in.keys + b, words, q, query_length<T>(c), scores + b * kBlock, ahead);
  }
  if constexpr (NB > 1) {
    if (b < end) scores_of<T, MR, NB / 2>(c, in, b, end, q, scores, ahead);
  }
}

template <class T, int MR, int NV>
static void values_of(const Call& c, const HeadTile& in, int begin, int end, int64_t column,
                      const typename T::Query* weights, const float* units, float* out, Ahead* ahead) {
  constexpr int kSpread = T::kPerQuery / T::kPerWord;
  for (; column + NV * kWidth <= c.v_pad; column += NV * kWidth) {
    auto run = ahead ? weigh_blocks<T, MR, NV, true> : weigh_blocks<T, MR, NV, false>;
    run(in.values + begin, column, end - begin, c.v_pad, weights + begin * kBlock * kSpread, units, out + column, ahead);
  }
  if constexpr (NV > 1) {
    if (column < c.v_pad) values_of<T, MR, NV / 2>(c, in, begin, end, column, weights, units, out, ahead);
  }
}

// Calls f(Size, first vector) over parts of nearly equal size, at most kMaxVectors each.
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
  float scale;  // of its scores
};

HJ_INLINE vi lane_index() {
  vi lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// What a pass of vectors over one tile leaves, a vector at each place.
struct TileSums {
  alignas(64) float top[kPassVectors];
  alignas(64) float sum[kPassVectors];
  alignas(64) float unit[kPassVectors];  // of its weights, where they are fixed-point
};

// Scores of one vector over blocks [begin, end), as they come from the product, become those that the softmax takes;
// returns their maxima.
static vf finish_scores(const Call& c, const Tile& tile, const HeadTile& in, int begin, int end, const Vector& vector,
                        float* scores) {
  const bool scaled = c.kv == KvType::kI8;
  const int64_t first = c.window ? vector.position - c.window + 1 : 0;
  const vf scale = splat(vector.scale);
  vf top = splat(kLowest);
  for (int b = begin; b < end; ++b) {
    const int64_t start = tile.start[b];
    const bool whole = tile.tokens[b] == kBlock && start + kBlock - 1 <= vector.position && start >= first;
    for (int j = 0; j < kBlockVectors; ++j) {
      float* at = scores + b * kBlock + j * kWidth;
      vf x = load<vf>(at) * scale;
      if (scaled) x = x * load<vf>(in.k_scale[b] + j * kWidth);
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
  return top;
}

// The same for a vector that sees all of a tile, without cap and bias.
static vf scale_scores(const Call& c, const HeadTile& in, const Vector& vector, float* scores) {
  const vf scale = splat(vector.scale);
  vf top = splat(kLowest);
  for (int b = 0; b < kTileBlocks; ++b)
    for (int j = 0; j < kBlockVectors; ++j) {
      float* at = scores + b * kBlock + j * kWidth;
      vf x = load<vf>(at) * scale;
      if (c.kv == KvType::kI8) x = x * load<vf>(in.k_scale[b] + j * kWidth);
      store(at, x);
      top = max(top, x);
    }
  return top;
}

#if HJ_INT8_DOT
// Weights [registers] as words of 4 high and 4 low bytes of 16-bit fixed-point numbers; returns what one unit is worth.
HJ_INLINE float fix_weights(const vf* weights, int registers, float largest, int8_t* to) {
  constexpr float kMost = 65280.0f;  // 255 * 256
  const vf factor = splat(largest > 0 ? kMost / largest : 0.0f);
#pragma GCC unroll 8
  for (int i = 0; i < registers; ++i) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(weights[i] * factor));
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)), low = _mm512_cvtepi32_epi8(whole);
    store(to + i * 2 * kWidth, _mm_unpacklo_epi32(high, low));
    store(to + i * 2 * kWidth + kWidth, _mm_unpackhi_epi32(high, low));
  }
  return largest / kMost;
}
#endif

// Scores over `blocks` blocks become weights; keeps sum and unit of vector m.
template <class T>
HJ_INLINE void weights_of(const Call& c, const float* const* v_scale, int blocks, const float* scores, float top,
                          typename T::Query* weights, TileSums* sums, int m, Ahead* ahead) {
  const bool scaled = c.kv == KvType::kI8;
  vf p[kTileBlocks * kBlockVectors];
  vf sum = {}, scaled_sum = {}, largest = {};
#pragma GCC unroll 16
  for (int i = 0; i < blocks * kBlockVectors; ++i) {
    ahead->fetch(1);  // the memory would stand idle meanwhile
    p[i] = exp_nonpositive(load<vf>(scores + i * kWidth) - top);
    sum = sum + p[i];
    if (scaled) {
      // Scales of tokens that are not seen may be NaN.
      const vf scale = load<vf>(v_scale[i / kBlockVectors] + i % kBlockVectors * kWidth);
      p[i] = cast<vf>(cast<vi>(p[i] * scale) & (p[i] != 0.0f));
      scaled_sum = scaled_sum + p[i], largest = max(largest, p[i]);
    }
    if constexpr (!T::kFixedPoint) store_query(weights + i * kWidth, p[i]);
  }
  sums->sum[m] = reduce_sum(sum);
#if HJ_INT8_DOT
  if constexpr (T::kFixedPoint) {
    const float total = reduce_sum(scaled_sum);
    sums->unit[m] = fix_weights(p, blocks * kBlockVectors, reduce_max(largest), weights) + (total - total);  // NaN stays
  }
#endif
}

// Scores of vector m of a pass over blocks [begin, end) become weights.
template <class T>
static void softmax_row(const Call& c, const Tile& tile, const HeadTile& in, int begin, int end, const Vector& vector,
                        float* scores, typename T::Query* weights, TileSums* sums, int m, Ahead* ahead) {
  const bool sees_all = tile.whole && begin == 0 && end == kTileBlocks &&
                        tile.start[kTileBlocks - 1] + kBlock - 1 <= vector.position &&
                        !(c.window && tile.start[0] < vector.position - c.window + 1);
  if (sees_all && c.softcap == 0 && !c.slopes) {
    sums->top[m] = reduce_max(scale_scores(c, in, vector, scores));
    return weights_of<T>(c, in.v_scale, kTileBlocks, scores, sums->top[m], weights, sums, m, ahead);
  }
  sums->top[m] = reduce_max(finish_scores(c, tile, in, begin, end, vector, scores));
  weights_of<T>(c, in.v_scale + begin, end - begin, scores + begin * kBlock, sums->top[m],
                weights + begin * kBlock * T::kPerQuery / T::kPerWord, sums, m, ahead);
}

static float exp_scalar(float x) { return exp_nonpositive(splat(x))[0]; }

// (top, sum) of `count` vectors += those of a tile; what is left are the weights of the old values and the tile's.
static void fold_sums(int count, float* top, float* sum, const TileSums& tile, TileSums* old_and_new) {
  for (int m = 0; m < count; m += kWidth) {  // all arrays are padded to a register
    const vf before = load<vf>(top + m), now = load<vf>(tile.top + m), highest = max(before, now);
    const vf old_weight = exp_nonpositive(before - highest), new_weight = exp_nonpositive(now - highest);
    store(top + m, highest);
    store(sum + m, fma(load<vf>(sum + m), old_weight, load<vf>(tile.sum + m) * new_weight));
    store(old_and_new->top + m, old_weight), store(old_and_new->sum + m, new_weight);
  }
}

// One copy for items and partials: same bits.
static __attribute__((noinline)) void fold_values(int64_t v_pad, float* values, float old_weight,
                                                  const float* tile_values, float new_weight) {
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
    float top[kWidth] = {kLowest}, sum[kWidth] = {};
    __builtin_memset(values, 0, c.v_pad * 4);
    if (row.folded > row.first_tile) {
      const float* begun = partial_of(c, row, row.first_tile, head) + g * stride;
      __builtin_memcpy(values, begun, c.v_pad * 4);
      top[0] = begun[c.v_pad], sum[0] = begun[c.v_pad + 1];
    }
    for (int tile = row.folded; tile <= row.last_tile; ++tile) {
      const float* more = partial_of(c, row, tile, head) + g * stride;
      TileSums sums, weights;
      store(sums.top, splat(more[c.v_pad])), store(sums.sum, splat(more[c.v_pad + 1]));
      fold_sums(1, top, sum, sums, &weights);
      fold_values(c.v_pad, values, weights.top[0], more, weights.sum[0]);
    }
    write_output(c, row.row, head * c.group + g, top[0], sum[0], values);
  }
}

// ---- an item ----------------------------------------------------------------------------------------------------

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
      : c(call), item(of), vectors((int)(of.num_rows * call.group)), folds(of.complete || of.leads) {
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
        ahead.go_to(kAheadBytes);
        clean_last_block<T>(c, item, tile, &heads[now], copy);
        for (int m0 = 0; m0 < vectors; m0 += kPassVectors)
          pass_over(t, tile, heads[now], head, m0, vectors - m0 < kPassVectors ? vectors - m0 : kPassVectors);
      }
    }
    if (!folds) return;
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
      state.vector[m] = {row.position, c.slopes ? c.slopes[query_head] : 0.0f, c.scale * unit};
      state.top[m] = kLowest, state.sum[m] = 0;
    }
    if (folds) __builtin_memset(state.values, 0, vectors * c.v_pad * 4);
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
    for_parts(count, [&](auto size, int m) {
      constexpr int MR = decltype(size)::value;
      scores_of<T, MR, key_blocks_of(MR)>(c, in, begin, end, state.q + (m0 + m) * query_length<T>(c),
                                          scores + m * kTile, m0 + m == 0 ? &ahead : nullptr);
    });
    constexpr int kWeights = kTile * T::kPerQuery / T::kPerWord;  // of one vector
    TileSums sums;
    for (int m = 0; m < count; ++m)
      softmax_row<T>(c, tile, in, begin, end, state.vector[m0 + m], scores + m * kTile, weights + m * kWeights, &sums, m,
                     &ahead);
    for_parts(count, [&](auto size, int m) {
      constexpr int MR = decltype(size)::value;
      values_of<T, MR, columns_of(MR) / T::kAccRegisters>(c, in, begin, end, 0, weights + m * kWeights, sums.unit + m,
                                                          tile_values + m * c.v_pad, m0 + m == 0 ? &ahead : nullptr);
    });
    if (!folds) {
      for (int m = 0; m < count; ++m) {
        const QueryRow& row = item.rows[(m0 + m) / c.group];
        if (t >= row.first_tile && t <= row.last_tile)
          keep(t, head, m0 + m, tile_values + m * c.v_pad, sums.top[m], sums.sum[m]);
      }
      return;
    }
    TileSums fold;
    fold_sums(count, state.top + m0, state.sum + m0, sums, &fold);
    for (int m = 0; m < count; ++m)
      fold_values(c.v_pad, state.values + (m0 + m) * c.v_pad, fold.top[m], tile_values + m * c.v_pad, fold.sum[m]);
  }

  // Writes vector m's partial of a tile where `finish` will find it.
  void keep(int t, int head, int m, const float* values, float top, float sum) {
    float* to = partial_of(c, item.rows[m / c.group], t, head) + m % c.group * (c.v_pad + kPartialTail);
    __builtin_memcpy(to, values, c.v_pad * sizeof(float));
    to[c.v_pad] = top, to[c.v_pad + 1] = sum;
  }

  const Call& c;
  const Item& item;
  const int vectors;  // of each head
  const bool folds;   // its tiles, one after the other
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
    const int64_t block = offset / kBlock, token = offset % kBlock;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      char* at = c.pool + page * c.page_bytes + h * c.head_bytes;
      float* scale = (float*)at + block * kBlock + token;
      put(c, at + c.k_offset + block * c.k_block_bytes, (const char*)c.k + (r * c.kv_heads + h) * c.dim * size, c.dim, scale,
          [&](int64_t d) { return (d / per_word * kBlock + token) * per_word + d % per_word; });
      put(c, at + c.v_offset + block * c.v_block_bytes, (const char*)c.v + (r * c.kv_heads + h) * c.v_dim * size,
          c.v_dim, scale + c.page_blocks * kBlock,
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
  vf zeros = {};
  typename T::Query q[T::kPerQuery + T::kTail] = {};
  asm volatile("" : "+m"(zeros), "+m"(q));  // unknown to the compiler, which would drop a product with 0
  typename T::Acc acc[12];
  for (auto& sum : acc) sum = T::start(q + T::kPerQuery);
  auto word = T::load_key((const char*)&zeros);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = T::score(acc[i], q, word);
  for (int i = 1; i < 12; ++i) acc[0] = T::add(acc[0], acc[i]);
  return reduce_sum(T::result(acc[0]));
}

// Runs `steps` steps and returns the multiply-adds of one.
static int64_t probe_multiply_add(KvType kv, int64_t steps) {
  volatile float sink;
  switch (kv) {
    case KvType::kBf16: sink = probe_chains<Bf16>(steps); (void)sink; return 12 * kWidth * Bf16::kPerWord;
    case KvType::kI8: sink = probe_chains<I8>(steps); (void)sink; return 12 * kWidth * I8::kPerWord;
    default: sink = probe_chains<F32>(steps); (void)sink; return 12 * kWidth;
  }
}

}  // namespace

namespace hetero_jax {
extern const Kernels HJ_JOIN(kernels_, HJ_ISA);
const Kernels HJ_JOIN(kernels_, HJ_ISA) = {HJ_STRING(HJ_ISA), append, attend, finish, probe_read,
                                                  probe_multiply_add};
}  // namespace hetero_jax
