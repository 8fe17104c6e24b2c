// Paged causal attention for one instruction set; see kernel.inc.h for the arithmetic.
#pragma once
#include <cstdint>

namespace hetero {

enum class Element : int32_t { kF32 = 0, kBF16 = 1 };

// One call: rows of several sequences over the pages of one site. Shapes are in native_attention.py.
struct Call {
  const void* k_pool;
  const void* v_pool;
  const void* q;
  void* out;
  const int32_t* page_table;
  Element pool_type, row_type;
  int64_t pages_per_sequence, page_size, num_heads, num_kv_heads, head_dim, v_head_dim;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

// Queries [first_row, first_row + num_rows) of one sequence and one KV head. The first one is at position `position`.
struct Task {
  int64_t sequence, kv_head, first_row, num_rows, position;
};

using Kernel = void (*)(const Call&, const Task&);

// Query rows of one task; more rows of a sequence are several tasks.
constexpr int64_t kTaskRows = 16;

Kernel KernelPlain();
#if defined(__x86_64__)
Kernel KernelAvx2();
Kernel KernelAvx512();
#endif

}  // namespace hetero
