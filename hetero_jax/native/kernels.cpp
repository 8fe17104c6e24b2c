// The kernels of one instruction set: compiled once per ISA with -DHJ_ISA=name and that ISA's flags.
//
// A tile of keys of one head passes over all query vectors of an item:
//   scores = q . k        registers hold [vectors x tokens]; a key word holds the same token's next 1, 2 or 4 dims
//   softmax of the tile   its own max and sum
//   values = weights . v  registers hold [vectors x dims]; a value word holds the same dim's next 1, 2 or 4 tokens
//   fold                  into the row's running (max, sum, values), or kept as a partial
// Every element is the same few chains of multiply-adds in a fixed order, however many vectors share the registers.
#include "item_run.h"

#ifndef HJ_ISA
#error "compile with -DHJ_ISA=name"
#endif
#define HJ_JOIN_(a, b) a##b
#define HJ_JOIN(a, b) HJ_JOIN_(a, b)
#define HJ_STRING_(a) #a
#define HJ_STRING(a) HJ_STRING_(a)

namespace {

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
