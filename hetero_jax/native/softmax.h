// The softmax of one tile, and how tiles are folded into a row's output.
#pragma once

#include "products.h"

namespace {

// Scores, their maxima and slopes are logarithms to base 2: a factor of log2(e), and weights are powers of 2.
constexpr float kLog2E = 1.44269504088896341f;

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
      if (c.softcap != 0) x = tanh_of(x * (1.0f / (c.softcap * kLog2E))) * (c.softcap * kLog2E);
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

// The maximum of a vector that sees all of a tile, without cap and bias. Its scores stay as they are, but for the scales
// of the keys.
static vf top_score(const Call& c, const HeadTile& in, const Vector& vector, float* scores) {
  const vf scale = splat(vector.scale);
  vf top = splat(kLowest);
#pragma GCC unroll 8
  for (int b = 0; b < kTileBlocks; ++b)
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) {
      float* at = scores + b * kBlock + j * kWidth;
      vf x = load<vf>(at);
      if (c.kv == KvType::kI8) store(at, x = x * load<vf>(in.k_scale[b] + j * kWidth));
      top = max(top, x * scale);
    }
  return top;
}

#if HJ_INT8_DOT
// Weights [registers] as words of 4 high and 4 low bytes of 16-bit fixed-point numbers; returns what one unit is worth.
HJ_INLINE float fix_weights(const vf* weights, int registers, int8_t* to) {
  constexpr float kMost = 65280.0f;  // 255 * 256
  __m512i bits = _mm512_setzero_si512();  // ordered as the weights are, NaN above all: it stays
  for (int i = 0; i < registers; ++i) bits = _mm512_max_epi32(bits, (__m512i)weights[i]);
  const float largest = cast<float>(_mm512_reduce_max_epi32(bits));
  const vf factor = splat(largest > 0 ? kMost / largest : 0.0f);
  // Of each four numbers of 32 bits, the second bytes and then the first; the fours of two registers one after the other.
  const __m512i bytes = _mm512_set4_epi32(0, 0, 0x0c080400, 0x0d090501);
  const __m512i halves = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  for (int i = 0; i < registers; i += 2) {
    const __m512i first = _mm512_shuffle_epi8(_mm512_cvtps_epi32((__m512)(weights[i] * factor)), bytes);
    const __m512i second = _mm512_shuffle_epi8(_mm512_cvtps_epi32((__m512)(weights[i + 1] * factor)), bytes);
    store(to + i * 2 * kWidth, _mm512_permutex2var_epi64(first, halves, second));
  }
  return largest / kMost;
}
#endif

// Scores of vector m over `blocks` blocks become weights, 2^(score * factor - top); keeps their sum and unit. WHOLE: all
// of a tile's tokens, and all of them seen.
template <class T, bool WHOLE>
HJ_INLINE void weights_of(const Call& c, const float* const* v_scale, int blocks, const float* scores, float factor,
                          typename T::Query* weights, TileSums* sums, int m, Ahead* ahead) {
  const bool scaled = c.kv == KvType::kI8;
  const int registers = WHOLE ? kTileBlocks * kBlockVectors : blocks * kBlockVectors;
  const vf top = splat(sums->top[m]), scale = splat(factor);
  vf p[kTileBlocks * kBlockVectors + 1] = {};
  vf sum[2] = {};
#pragma GCC unroll 16
  for (int i = 0; i < registers; ++i) {
    ahead->fetch<kSoftmaxLines>();  // the memory would stand idle meanwhile
    p[i] = exp2_nonpositive(fma(load<vf>(scores + i * kWidth), scale, -top));
    sum[i % 2] = sum[i % 2] + p[i];
    if (scaled) {
      const vf worth = p[i] * load<vf>(v_scale[i / kBlockVectors] + i % kBlockVectors * kWidth);
      // Scales of tokens that are not seen may be NaN.
      p[i] = WHOLE ? worth : cast<vf>(cast<vi>(worth) & (p[i] != 0.0f));
    }
    if constexpr (!T::kFixedPoint) store_query(weights + i * kWidth, p[i]);
  }
  sums->sum[m] = reduce_sum(sum[0] + sum[1]);
#if HJ_INT8_DOT
  if constexpr (T::kFixedPoint) sums->unit[m] = fix_weights(p, registers, weights);
#endif
}

// Scores of `count` vectors over blocks [begin, end) become weights. First all maxima and then all weights: what one
// vector waits for, others use.
template <class T>
static void softmax(const Call& c, const Tile& tile, const HeadTile& in, int begin, int end, const Vector* vectors,
                    int count, float* scores, typename T::Query* weights, TileSums* sums, Ahead* ahead) {
  constexpr int kSpread = T::kPerQuery / T::kPerWord;
  auto whole = [&](const Vector& vector) {
    return tile.whole && begin == 0 && end == kTileBlocks && c.softcap == 0 && !c.slopes &&
           tile.start[kTileBlocks - 1] + kBlock - 1 <= vector.position &&
           !(c.window && tile.start[0] < vector.position - c.window + 1);
  };
  for (int m = 0; m < count; ++m)
    sums->top[m] = reduce_max(whole(vectors[m]) ? top_score(c, in, vectors[m], scores + m * kTile)
                                                : finish_scores(c, tile, in, begin, end, vectors[m], scores + m * kTile));
  for (int m = 0; m < count; ++m)
    if (whole(vectors[m]))
      weights_of<T, true>(c, in.v_scale, kTileBlocks, scores + m * kTile, vectors[m].scale, weights + m * kTile * kSpread,
                          sums, m, ahead);
    else
      weights_of<T, false>(c, in.v_scale + begin, end - begin, scores + m * kTile + begin * kBlock, 1.0f,
                           weights + (m * kTile + begin * kBlock) * kSpread, sums, m, ahead);
}

static float exp2_scalar(float x) { return exp2_nonpositive(splat(x))[0]; }

// What the values so far and those of a tile count when they are added, a vector at each place.
struct FoldWeights {
  alignas(64) float before[kPassVectors];
  alignas(64) float tile[kPassVectors];
};

// (top, sum) of `count` vectors += those of a tile.
static void fold_sums(int count, float* top, float* sum, const TileSums& tile, FoldWeights* weights) {
  for (int m = 0; m < count; m += kWidth) {  // all arrays are padded to a register
    const vf before = load<vf>(top + m), now = load<vf>(tile.top + m), highest = max(before, now);
    const vf old_weight = exp2_nonpositive(before - highest), new_weight = exp2_nonpositive(now - highest);
    store(top + m, highest);
    store(sum + m, fma(load<vf>(sum + m), old_weight, load<vf>(tile.sum + m) * new_weight));
    store(weights->before + m, old_weight), store(weights->tile + m, new_weight);
  }
}

// One copy for items and partials: same bits.
static __attribute__((noinline)) void fold_values(int64_t v_pad, float* values, float old_weight,
                                                  const float* tile_values, float new_weight) {
  for (int64_t d = 0; d < v_pad; d += kWidth)
    store(values + d, fma(load<vf>(values + d), splat(old_weight), load<vf>(tile_values + d) * new_weight));
}

static float log_scalar(float x) { return __builtin_logf(x); }

// A partial: values, max and sum.
static int64_t partial_length(const Call& c) { return c.v_pad + kPartialTail; }

static void put_partial(const Call& c, float* to, const float* values, float top, float sum) {
  __builtin_memcpy(to, values, c.v_pad * sizeof(float));
  to[c.v_pad] = top, to[c.v_pad + 1] = sum;
}

static void get_partial(const Call& c, const float* from, float* values, float* top, float* sum) {
  __builtin_memcpy(values, from, c.v_pad * sizeof(float));
  *top = from[c.v_pad], *sum = from[c.v_pad + 1];
}

// What is known of one head of a row before its first tile.
static void begin_output(const Call& c, int64_t row, int64_t head, float* values, float* top, float* sum) {
  if (c.part == Part::kRest) return get_partial(c, c.begun + (row * c.heads + head) * partial_length(c), values, top, sum);
  __builtin_memset(values, 0, c.v_pad * sizeof(float));
  *top = kLowest, *sum = 0;
}

// Divides by the sum and writes one head of one row.
static void write_output(const Call& c, int64_t row, int64_t head, float top, float sum, float* values) {
  if (c.part == Part::kBehind) return put_partial(c, c.ended + (row * c.heads + head) * partial_length(c), values, top, sum);
  if (c.sinks) {
    const float sink = c.sinks[head] * kLog2E;
    const float highest = top > sink ? top : sink;
    const float weight = exp2_scalar(top - highest);
    for (int64_t d = 0; d < c.v_pad; d += kWidth) store(values + d, load<vf>(values + d) * weight);
    sum = sum * weight + exp2_scalar(sink - highest);
    top = highest;
  }
  const int64_t at = row * c.heads + head;
  if (c.lse) c.lse[at] = sum == 0 ? -__builtin_inff() : top / kLog2E + log_scalar(sum);
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
  return c.partials + ((row.partial + tile) * c.kv_heads + head) * c.group * partial_length(c);
}

static void finish(const Call& c, const QueryRow& row, int head) {
  const int64_t stride = partial_length(c);
  float* values = (float*)thread_scratch(c.v_pad * 4);
  for (int64_t g = 0; g < c.group; ++g) {
    float top[kWidth] = {}, sum[kWidth] = {};
    if (row.folded > row.first_tile)
      get_partial(c, partial_of(c, row, row.first_tile, head) + g * stride, values, top, sum);
    else
      begin_output(c, row.row, head * c.group + g, values, top, sum);
    for (int tile = row.folded; tile <= row.last_tile; ++tile) {
      const float* more = partial_of(c, row, tile, head) + g * stride;
      TileSums sums;
      FoldWeights weights;
      store(sums.top, splat(more[c.v_pad])), store(sums.sum, splat(more[c.v_pad + 1]));
      fold_sums(1, top, sum, sums, &weights);
      fold_values(c.v_pad, values, weights.before[0], more, weights.tile[0]);
    }
    write_output(c, row.row, head * c.group + g, top[0], sum[0], values);
  }
}

}  // namespace
