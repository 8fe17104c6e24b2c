// Element types: how a word of the pool multiplies. Everything is static, as in simd.h.
#pragma once

#include "call.h"
#include "simd.h"

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
// How the memory is read, all measured: how far ahead it is fetched at least (less leaves it idle, more is lost again), how
// many blocks of keys and bytes of values all vectors pass over before the next, lines fetched with a register of weights.
constexpr int64_t kAheadBytes = 8 << 10;
constexpr int kKeyChunk = 2;
constexpr int64_t kValueChunkBytes = 16 << 10;
constexpr int kSoftmaxLines = 2;
constexpr int64_t kLine = 64;  // of the cache

// Scores are summed in chains, so that one vector needs few blocks of keys at a time to hide the latency of its
// multiply-adds: memory is then read in nearly the order in which it lies.
#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kFloatChains = 2;
#else
constexpr int kFloatChains = 1;
#endif

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
  // The compiler's own function costs copies of the sums, and a third of the speed.
  HJ_INLINE __m512i dot(__m512i acc, __m512i bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(bytes), "v"(signed_bytes));
    return acc;
  }
  HJ_INLINE Acc score(Acc acc, const Query* q, Word w) {
    return {dot(acc.high, w.x, _mm512_set1_epi32(load<int32_t>(q))),
            dot(acc.low, w.x, _mm512_set1_epi32(load<int32_t>(q + 4)))};
  }
  HJ_INLINE Acc weigh(Acc acc, const Query* p, Word w) {
    return {dot(acc.high, _mm512_set1_epi32(load<int32_t>(p)), w.x),
            dot(acc.low, _mm512_set1_epi32(load<int32_t>(p + 4)), w.x)};
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

}  // namespace
