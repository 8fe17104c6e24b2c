// The softmax of one tile, and how tiles are folded into a row's output.
#pragma once

#include "products.h"

namespace {

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

// What the values so far and those of a tile count when they are added, a vector at each place.
struct FoldWeights {
  alignas(64) float before[kPassVectors];
  alignas(64) float tile[kPassVectors];
};

// (top, sum) of `count` vectors += those of a tile.
static void fold_sums(int count, float* top, float* sum, const TileSums& tile, FoldWeights* weights) {
  for (int m = 0; m < count; m += kWidth) {  // all arrays are padded to a register
    const vf before = load<vf>(top + m), now = load<vf>(tile.top + m), highest = max(before, now);
    const vf old_weight = exp_nonpositive(before - highest), new_weight = exp_nonpositive(now - highest);
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
