// The arithmetic, compiled once per instruction set with LANES floats to a vector (GCC/Clang vector extensions).
//
// A task holds the queries (rows x group) of one sequence and one KV head and walks its keys in blocks of 64 from the
// first visible one on, with an online softmax (Milakov & Gimelshein 2018; FlashAttention). Keys lie dimension-major in
// a page, so a vector holds the same dimension of LANES keys and a score needs no horizontal sum; values lie
// token-major, so a vector holds LANES dimensions of one value. Both passes stream. Each query's arithmetic is a fixed
// sequence that depends on its own position alone: not on the tile it is in, the other rows, the threads or the pages.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernel.h"

namespace hetero {
namespace {

constexpr int kBlock = 64;                 // keys of one step
constexpr int kVectors = kBlock / LANES;   // vectors of a row of scores
constexpr int kTile = LANES == 16 ? 4 : 2; // queries of a register tile

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t VecI __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t VecH __attribute__((vector_size(LANES * 2), aligned(2)));

inline Vec Splat(float x) { return x - Vec{}; }

inline Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// bfloat16 is the upper half of a float.
inline Vec Load(const uint16_t* p) {
  typedef uint32_t VecU __attribute__((vector_size(LANES * 4)));
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const VecH*>(p), VecU) << 16);  // the bits, not the value
}

inline float Scalar(float x) { return x; }
inline float Scalar(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void Store(float* p, float x) { *p = x; }
inline void Store(uint16_t* p, float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0 within 2 ulp: 2^n e^r, |r| <= ln 2 / 2, with a polynomial of degree 6. Below -87 it is 0.
inline Vec Exp(Vec x) {
  const Vec clamped = Max(x, Splat(-87.0f));
  const Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
  return x < Splat(-87.0f) ? Vec{} : p * (Vec)exponent;
}

inline float HorizontalMax(Vec x) {
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

inline float HorizontalSum(Vec x) {  // a fixed tree
  float part[LANES];
  std::memcpy(part, &x, sizeof part);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

// Pointers to the keys and values of one block of 64 positions; pages need not be neighbours.
template <typename T>
struct Pages {
  const T* k_pool;
  const T* v_pool;
  const int32_t* table;
  int64_t page_size, kv_heads, kv_head, dim, v_dim;

  // Keys of LANES positions from `position` on: dimension d is at the result + d * page_size.
  const T* Keys(int64_t position) const {
    const int64_t page = table[position / page_size];
    return k_pool + (page * kv_heads + kv_head) * dim * page_size + position % page_size;
  }
  const T* Value(int64_t position) const {
    const int64_t page = table[position / page_size];
    return v_pool + ((page * kv_heads + kv_head) * page_size + position % page_size) * v_dim;
  }
};

// scores[query][key] for QUERIES queries and the keys of one block; `limit` keys of it exist.
template <int QUERIES, typename T>
inline void Scores(const Pages<T>& pages, const float* q, int64_t first_key, int64_t limit, float* scores) {
  for (int vector = 0; vector < kVectors; vector += 2) {
    if (vector * LANES >= limit) break;
    // A vector beyond the last page reads the block's last existing vector again; its scores are masked.
    const bool second = (vector + 1) * LANES < limit;
    const T* k0 = pages.Keys(first_key + vector * LANES);
    const T* k1 = second ? pages.Keys(first_key + (vector + 1) * LANES) : k0;
    Vec sum0[QUERIES] = {}, sum1[QUERIES] = {};
    for (int64_t d = 0; d < pages.dim; ++d) {
      const Vec x0 = Load(k0 + d * pages.page_size), x1 = Load(k1 + d * pages.page_size);
#pragma GCC unroll 8
      for (int i = 0; i < QUERIES; ++i) {
        const float value = q[i * pages.dim + d];
        sum0[i] += value * x0;
        sum1[i] += value * x1;
      }
    }
    for (int i = 0; i < QUERIES; ++i) {
      *reinterpret_cast<Vec*>(scores + i * kBlock + vector * LANES) = sum0[i];
      *reinterpret_cast<Vec*>(scores + i * kBlock + (vector + 1) * LANES) = sum1[i];
    }
  }
}

// acc[query][dim] = acc * correction + sum over the block's keys of weights[query][key] * value[key].
template <int QUERIES, typename T>
inline void Accumulate(const T* const* values, int64_t v_dim, const float* weights, const float* correction,
                       int64_t limit, float* acc) {
  constexpr int kWide = 4;
  int64_t d = 0;
  for (; d + kWide * LANES <= v_dim; d += kWide * LANES) {
    Vec sum[QUERIES][kWide];
    for (int i = 0; i < QUERIES; ++i)
      for (int w = 0; w < kWide; ++w) sum[i][w] = correction[i] * Load(acc + i * v_dim + d + w * LANES);
    for (int64_t key = 0; key < limit; ++key) {
      Vec x[kWide];
      for (int w = 0; w < kWide; ++w) x[w] = Load(values[key] + d + w * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < QUERIES; ++i)
        for (int w = 0; w < kWide; ++w) sum[i][w] += weights[i * kBlock + key] * x[w];
    }
    for (int i = 0; i < QUERIES; ++i)
      for (int w = 0; w < kWide; ++w) *reinterpret_cast<Vec*>(acc + i * v_dim + d + w * LANES) = sum[i][w];
  }
  for (; d + LANES <= v_dim; d += LANES)
    for (int i = 0; i < QUERIES; ++i) {
      Vec sum = correction[i] * Load(acc + i * v_dim + d);
      for (int64_t key = 0; key < limit; ++key) sum += weights[i * kBlock + key] * Load(values[key] + d);
      *reinterpret_cast<Vec*>(acc + i * v_dim + d) = sum;
    }
  for (; d < v_dim; ++d)
    for (int i = 0; i < QUERIES; ++i) {
      float sum = correction[i] * acc[i * v_dim + d];
      for (int64_t key = 0; key < limit; ++key) sum += weights[i * kBlock + key] * Scalar(values[key][d]);
      acc[i * v_dim + d] = sum;
    }
}

// Calls f<n>(start) for tiles of at most kTile out of `count` queries.
template <typename F>
inline void Tiles(int64_t count, F f) {
  int64_t start = 0;
  for (; start + kTile <= count; start += kTile) f(std::integral_constant<int, kTile>(), start);
  switch (count - start) {
    case 3: f(std::integral_constant<int, 3>(), start); break;
    case 2: f(std::integral_constant<int, 2>(), start); break;
    case 1: f(std::integral_constant<int, 1>(), start); break;
    default: break;
  }
}

struct Scratch {
  std::vector<float> q, scores, acc, top, total, correction;
};

template <typename T, typename Row>
void Attend(const Call& call, const Task& task) {
  thread_local Scratch s;
  const int64_t group = call.num_heads / call.num_kv_heads, count = task.num_rows * group;
  const int64_t dim = call.head_dim, v_dim = call.v_head_dim;
  s.q.resize(count * dim);
  s.scores.resize(count * kBlock);
  s.acc.assign(count * v_dim, 0.0f);
  s.top.assign(count, -INFINITY);
  s.total.assign(count, 0.0f);
  s.correction.resize(count);
  const Row* q = static_cast<const Row*>(call.q);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = task.first_row + i / group, head = task.kv_head * group + i % group;
    for (int64_t d = 0; d < dim; ++d) s.q[i * dim + d] = Scalar(q[(row * call.num_heads + head) * dim + d]) * call.scale;
  }
  const Pages<T> pages{static_cast<const T*>(call.k_pool), static_cast<const T*>(call.v_pool),
                       call.page_table + task.sequence * call.pages_per_sequence, call.page_size,
                       call.num_kv_heads, task.kv_head, dim, v_dim};
  const int64_t last = task.position + task.num_rows - 1;
  int64_t begin = call.window ? task.position - call.window + 1 : 0;
  begin = begin > 0 ? begin / kBlock * kBlock : 0;
  for (int64_t first = begin; first <= last; first += kBlock) {
    const int64_t limit = last + 1 - first < kBlock ? last + 1 - first : kBlock;
    Tiles(count, [&](auto n, int64_t start) {
      Scores<n.value>(pages, s.q.data() + start * dim, first, limit, s.scores.data() + start * kBlock);
    });
    for (int64_t i = 0; i < count; ++i) {
      float* row = s.scores.data() + i * kBlock;
      if (call.softcap != 0)
        for (int64_t key = 0; key < limit; ++key) row[key] = call.softcap * std::tanh(row[key] / call.softcap);
      const int64_t position = task.position + i / group;
      for (int64_t key = position + 1 - first < 0 ? 0 : position + 1 - first; key < kBlock; ++key) row[key] = -INFINITY;
      if (call.window)
        for (int64_t key = 0; key < kBlock && first + key <= position - call.window; ++key) row[key] = -INFINITY;
      Vec best = Load(row);
      for (int v = 1; v < kVectors; ++v) best = Max(best, Load(row + v * LANES));
      const float block_top = HorizontalMax(best), old = s.top[i];
      const float top = block_top > old ? block_top : old;
      if (top == -INFINITY) {  // nothing of this block is visible to this query yet
        std::memset(row, 0, kBlock * sizeof(float));
        s.correction[i] = 1.0f;
        continue;
      }
      Vec sum{};
      for (int v = 0; v < kVectors; ++v) {
        const Vec weight = Exp(Load(row + v * LANES) - top);
        *reinterpret_cast<Vec*>(row + v * LANES) = weight;
        sum += weight;
      }
      s.correction[i] = old == top ? 1.0f : Exp(Splat(old - top))[0];
      s.total[i] = s.total[i] * s.correction[i] + HorizontalSum(sum);
      s.top[i] = top;
    }
    const T* values[kBlock];
    for (int64_t key = 0; key < limit; ++key) values[key] = pages.Value(first + key);
    Tiles(count, [&](auto n, int64_t start) {
      Accumulate<n.value>(values, v_dim, s.scores.data() + start * kBlock, s.correction.data() + start, limit,
                          s.acc.data() + start * v_dim);
    });
  }
  Row* out = static_cast<Row*>(call.out);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = task.first_row + i / group, head = task.kv_head * group + i % group;
    for (int64_t d = 0; d < v_dim; ++d)
      Store(out + (row * call.num_heads + head) * v_dim + d, s.acc[i * v_dim + d] / s.total[i]);
  }
}

void Run(const Call& call, const Task& task) {
  const bool wide_pool = call.pool_type == Element::kF32, wide_rows = call.row_type == Element::kF32;
  if (wide_pool && wide_rows) return Attend<float, float>(call, task);
  if (wide_pool) return Attend<float, uint16_t>(call, task);
  if (wide_rows) return Attend<uint16_t, float>(call, task);
  return Attend<uint16_t, uint16_t>(call, task);
}

}  // namespace
}  // namespace hetero
