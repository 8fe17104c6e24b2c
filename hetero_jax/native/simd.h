// Vectors of the instruction set that this file is compiled for. Everything is static: the same names are compiled
// several times with different flags, and the linker must not merge them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define HJ_WIDTH 16
#elif defined(__AVX2__)
#define HJ_WIDTH 8
#else
#define HJ_WIDTH 4
#endif

namespace {

constexpr int kWidth = HJ_WIDTH;
typedef float vf __attribute__((vector_size(4 * HJ_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * HJ_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * HJ_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * HJ_WIDTH)));

#define HJ_INLINE static inline __attribute__((always_inline))

template <class V>
HJ_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}
template <class V>
HJ_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}
template <class V, class S>
HJ_INLINE V cast(S value) {
  static_assert(sizeof(V) == sizeof(S));
  V result;
  __builtin_memcpy(&result, &value, sizeof(V));
  return result;
}
HJ_INLINE vf splat(float x) { return x - vf{}; }
HJ_INLINE vi splat_i(int32_t x) { return x - vi{}; }

// a * b + c, fused where the instruction is there. Written out everywhere, and compiled with -ffp-contract=off, so that
// the compiler does not fuse one copy of an expression and not another: bits would depend on the path taken.
HJ_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
HJ_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Halves are folded onto each other, so the order is the same for every width that has as many lanes.
HJ_INLINE float reduce_max(vf x) {
#if defined(__AVX512F__)
  __m256 half = _mm256_max_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
#else
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
#endif
}
HJ_INLINE float reduce_sum(vf x) {
#if defined(__AVX512F__)
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// 2^x for x <= 0 (and a rounding error above it), within 2e-7 of the true value relatively and exact for 0; 0 below -126
// (and for -inf), NaN for NaN. The polynomials are least in their largest relative error, with 1 for x = 0.
HJ_INLINE vf exp2_nonpositive(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  vf p = splat(1.8689563730731606e-3f);
  p = fma(p, r, splat(9.014884941279888e-3f));
  p = fma(p, r, splat(5.579930171370506e-2f));
  p = fma(p, r, splat(2.4016565084457397e-1f));
  p = fma(p, r, splat(6.9315105676651e-1f));
  p = fma(p, r, splat(1.0f));
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vf rounded = x + magic;
  const vf r = x - (rounded - magic);
  vf p = splat(1.3274633093e-3f);
  p = fma(p, r, splat(9.671961888670921e-3f));
  p = fma(p, r, splat(5.5506784468889236e-2f));
  p = fma(p, r, splat(2.4022234976291656e-1f));
  p = fma(p, r, splat(6.931470632553101e-1f));
  p = fma(p, r, splat(1.0f));
  const vf result = cast<vf>(cast<vu>(p) + (cast<vu>(rounded) << 23));
  return x < -126.0f ? vf{} : result;
#endif
}

// tanh(x), within 2e-7 relatively.
HJ_INLINE vf tanh_of(vf x) {
  vf size = cast<vf>(cast<vi>(x) & splat_i(0x7fffffff));
  vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  vf near = fma(p * z, x, x);
  vf e = exp2_nonpositive(size * -2.88539008177792681f);  // e^(-2 size)
  vf far = (1.0f - e) / (1.0f + e);
  far = cast<vf>(cast<vi>(far) | (cast<vi>(x) & splat_i(INT32_MIN)));
  return size < 0.625f ? near : far;
}

HJ_INLINE float to_float(uint16_t bf16) { return cast<float>((uint32_t)bf16 << 16); }

// To the nearest, ties to even; NaN stays NaN.
HJ_INLINE uint16_t to_bf16(float x) {
  uint32_t bits = cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

HJ_INLINE vf half_to_float(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  // The exponent is moved by a product, which also makes subnormal halves right; 0x7c00 and above are inf and NaN.
  vu wide = __builtin_convertvector(h, vu);
  vf value = cast<vf>((wide & 0x7fffu) << 13) * splat(0x1p112f);
  vu special = cast<vu>((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return cast<vf>(cast<vu>(value) | special | ((wide & 0x8000u) << 16));
#endif
}

HJ_INLINE uint16_t to_half(float x) {
  uint32_t bits = cast<uint32_t>(x);
  uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // subnormal: let an addition round
    float shifted = cast<float>(bits) + 0.5f;
    return sign | (uint16_t)(cast<uint32_t>(shifted) - 0x3f000000);
  }
  return sign | (uint16_t)((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}

}  // namespace
