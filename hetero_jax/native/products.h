// Products of one tile: how many query vectors and keys or values share the registers, and what is fetched ahead.
#pragma once

#include "words.h"

namespace {

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

// Beyond so many parts of a pass arithmetic binds, and nothing is fetched ahead.
constexpr int kFetchingParts = 4;

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
  template <int LINES>
  __attribute__((always_inline)) void fetch() {
    if (!at_) return;
#pragma GCC unroll 16
    for (int i = 0; i < LINES; ++i) __builtin_prefetch(at_ + i * kLine, 0, 3);
    at_ += LINES * kLine;
    if (at_ >= end_[run_]) at_ = ++run_ < count_ ? begin_[run_] : nullptr;
  }

 private:
  const char* begin_[8 * kTileBlocks];
  const char* end_[8 * kTileBlocks];
  int count_ = 0, run_ = 0;
  const char* at_ = nullptr;
};

// scores[MR][NB blocks] of q and NB blocks of keys. One of `parts` that do so: together they fetch as many lines ahead as
// one reads, evenly.
template <class T, int MR, int NB, bool AHEAD>
static __attribute__((noinline)) void score_blocks(const char* const* keys, int64_t words, const typename T::Query* q,
                                                   int64_t q_stride, float* scores, Ahead* ahead, int parts) {
  int steps = parts;  // until the next lines are fetched
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
    if (AHEAD && --steps == 0) ahead->fetch<NB * T::kChains * kBlock * T::kWordBytes / kLine>(), steps = parts;
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

// values[MR][NV registers of dims] = weights . v over `blocks` blocks of values, or += where they go on; units: of
// fixed-point weights, which cannot go on.
template <class T, int MR, int NV, bool AHEAD>
static __attribute__((noinline)) void weigh_blocks(const char* const* values, int64_t column, int64_t blocks,
                                                   int64_t v_pad, const typename T::Query* weights, const float* units,
                                                   float* out, bool goes_on, Ahead* ahead, int parts) {
  int steps = parts;  // as above
  typename T::Acc acc[MR][NV] = {};
  if constexpr (!T::kFixedPoint)
    if (goes_on)
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] = load<vf>(out + m * v_pad + n * kWidth);
  constexpr int kSteps = kBlock / T::kPerWord, kSpread = T::kPerQuery / T::kPerWord;
  constexpr int kBytes = NV * kWidth * T::kWordBytes, kTogether = kBytes < kLine ? kLine / kBytes : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const char* row = values[b] + column * T::kWordBytes;
    const typename T::Query* p = weights + b * kBlock * kSpread;
    for (int t = 0; t < kSteps; ++t, row += v_pad * T::kWordBytes, p += T::kPerQuery) {
      if (AHEAD && t % kTogether == 0 && --steps == 0) ahead->fetch<kBytes * kTogether / kLine>(), steps = parts;
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
                      Ahead* ahead, int parts) {
  const int64_t words = c.dim_pad / T::kPerWord;
  int b = begin;
  for (; b + NB <= end; b += NB) {
    auto run = parts <= kFetchingParts ? score_blocks<T, MR, NB, true> : score_blocks<T, MR, NB, false>;
    run(in.keys + b, words, q, query_length<T>(c), scores + b * kBlock, ahead, parts);
  }
  if constexpr (NB > 1) {
    if (b < end) scores_of<T, MR, NB / 2>(c, in, b, end, q, scores, ahead, parts);
  }
}

template <class T, int MR, int NV>
static void values_of(const Call& c, const HeadTile& in, int begin, int end, int64_t column,
                      const typename T::Query* weights, const float* units, float* out, bool goes_on, Ahead* ahead,
                      int parts) {
  constexpr int kSpread = T::kPerQuery / T::kPerWord;
  for (; column + NV * kWidth <= c.v_pad; column += NV * kWidth) {
    auto run = parts <= kFetchingParts ? weigh_blocks<T, MR, NV, true> : weigh_blocks<T, MR, NV, false>;
    run(in.values + begin, column, end - begin, c.v_pad, weights + begin * kBlock * kSpread, units, out + column, goes_on,
        ahead, parts);
  }
  if constexpr (NV > 1) {
    if (column < c.v_pad)
      values_of<T, MR, NV / 2>(c, in, begin, end, column, weights, units, out, goes_on, ahead, parts);
  }
}

template <int N, class F>
HJ_INLINE void with_size(int size, F&& f) {
  if constexpr (N > 1) {
    if (size < N) return with_size<N - 1>(size, f);
  }
  f(Size<N>{});
}

// Vectors cut into parts of nearly equal size, as many each at most as T's registers hold: those of fixed-point numbers
// are two operands each.
template <class T>
class Parts {
 public:
  explicit Parts(int vectors) : count((vectors + kMost - 1) / kMost), least_(vectors / count), more_(vectors % count) {}
  // Calls f(Size, first vector) for each.
  template <class F>
  __attribute__((always_inline)) void each(F&& f) const {
    for (int part = 0, begin = 0; part < count; ++part) {
      const int size = least_ + (part < more_);
      with_size<kMost>(size, [&](auto fixed) { f(fixed, begin); });
      begin += size;
    }
  }

  const int count;

 private:
  static constexpr int kMost = T::kFixedPoint ? kMaxVectors * 2 / 3 : kMaxVectors;
  const int least_, more_;
};

}  // namespace
