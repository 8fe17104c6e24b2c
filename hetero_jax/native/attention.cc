// The XLA custom call: checks, append, and the tasks spread over XLA's own threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace hetero {
namespace {

// HETERO_JAX_ISA=plain|avx2|avx512 forces one, so that each can be tested on one machine.
Kernel ChooseKernel() {
  const char* forced = std::getenv("HETERO_JAX_ISA");
  const std::string wanted = forced ? forced : "";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (wanted.empty() || wanted == "avx512")) return KernelAvx512();
  if (avx2 && (wanted.empty() || wanted == "avx2")) return KernelAvx2();
#endif
  return wanted.empty() || wanted == "plain" ? KernelPlain() : nullptr;
}

bool ElementOf(ffi::DataType type, Element* element) {
  if (type != ffi::F32 && type != ffi::BF16) return false;
  *element = type == ffi::F32 ? Element::kF32 : Element::kBF16;
  return true;
}

uint16_t ToBF16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float FromBF16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// rows[row][head][d] to element `index` of a pool, from one type to the other.
void Put(void* pool, Element pool_type, int64_t index, const void* rows, Element row_type, int64_t source) {
  if (pool_type == row_type && pool_type == Element::kF32) {
    static_cast<float*>(pool)[index] = static_cast<const float*>(rows)[source];
  } else if (pool_type == row_type) {
    static_cast<uint16_t*>(pool)[index] = static_cast<const uint16_t*>(rows)[source];
  } else if (pool_type == Element::kBF16) {
    static_cast<uint16_t*>(pool)[index] = ToBF16(static_cast<const float*>(rows)[source]);
  } else {
    static_cast<float*>(pool)[index] = FromBF16(static_cast<const uint16_t*>(rows)[source]);
  }
}

// Tasks that the caller and pool threads take in turn. Helpers that start late find nothing and touch nothing else.
struct Work {
  Call call;
  Kernel kernel;
  std::vector<Task> tasks;
  std::atomic<size_t> next{0}, done{0};

  void Drain() {
    for (size_t i = next.fetch_add(1); i < tasks.size(); i = next.fetch_add(1)) {
      kernel(call, tasks[i]);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

ffi::Error Refuse(const std::string& why) { return ffi::Error::InvalidArgument("paged_attention: " + why); }

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer k_in, ffi::AnyBuffer v_in, ffi::AnyBuffer q,
                          ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> page_table,
                          ffi::Buffer<ffi::S32> first_row, ffi::Buffer<ffi::S32> num_rows,
                          ffi::Buffer<ffi::S32> context, ffi::Buffer<ffi::S32> row_slot,
                          ffi::Result<ffi::AnyBuffer> k_pool, ffi::Result<ffi::AnyBuffer> v_pool,
                          ffi::Result<ffi::AnyBuffer> out, float scale, float softcap, int64_t window) {
  static const Kernel kernel = ChooseKernel();
  if (kernel == nullptr) return Refuse("HETERO_JAX_ISA names no instruction set of this machine");
  auto work = std::make_shared<Work>();
  Call& call = work->call;
  const auto kp = k_pool->dimensions(), vp = v_pool->dimensions(), qd = q.dimensions();
  if (kp.size() != 4 || vp.size() != 4 || qd.size() != 3) return Refuse("pools must have 4 axes and q 3");
  if (k_in.untyped_data() != k_pool->untyped_data() || v_in.untyped_data() != v_pool->untyped_data())
    return Refuse("the pools must be donated");
  if (!ElementOf(k_pool->element_type(), &call.pool_type) || !ElementOf(q.element_type(), &call.row_type))
    return Refuse("pools and rows must be float32 or bfloat16");
  const int64_t pages = kp[0], kv_heads = kp[1], dim = kp[2], page_size = kp[3], v_dim = vp[3], rows = qd[0];
  if (vp[0] != pages || vp[1] != kv_heads || vp[2] != page_size || qd[2] != dim || qd[1] % kv_heads != 0)
    return Refuse("pools and q do not fit together");
  if (page_size % 16 != 0) return Refuse("page_size must be a multiple of 16");
  const int64_t sequences = page_table.dimensions()[0], per_sequence = page_table.dimensions()[1];
  const int32_t* table = page_table.typed_data();

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = row_slot.typed_data()[row], page = slot / page_size, offset = slot % page_size;
    if (slot < 0) return Refuse("row_slot is negative");
    if (page >= pages) continue;  // a padding row
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t d = 0; d < dim; ++d)
        Put(k_pool->untyped_data(), call.pool_type, ((page * kv_heads + head) * dim + d) * page_size + offset,
            k.untyped_data(), call.row_type, (row * kv_heads + head) * dim + d);
      for (int64_t d = 0; d < v_dim; ++d)
        Put(v_pool->untyped_data(), call.pool_type, ((page * kv_heads + head) * page_size + offset) * v_dim + d,
            v.untyped_data(), call.row_type, (row * kv_heads + head) * v_dim + d);
    }
  }

  call.k_pool = k_pool->untyped_data();
  call.v_pool = v_pool->untyped_data();
  call.q = q.untyped_data();
  call.out = out->untyped_data();
  call.page_table = table;
  call.pages_per_sequence = per_sequence;
  call.page_size = page_size;
  call.num_heads = qd[1];
  call.num_kv_heads = kv_heads;
  call.head_dim = dim;
  call.v_head_dim = v_dim;
  call.scale = scale;
  call.softcap = softcap;
  call.window = window;
  std::memset(call.out, 0, out->size_bytes());
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t count = num_rows.typed_data()[s], first = first_row.typed_data()[s];
    const int64_t end = context.typed_data()[s];
    if (count == 0) continue;
    if (count < 0 || first < 0 || first + count > rows || end < count || end > per_sequence * page_size)
      return Refuse("rows or context of sequence " + std::to_string(s) + " do not fit the call");
    for (int64_t p = 0; p * page_size < end; ++p)
      if (table[s * per_sequence + p] < 0 || table[s * per_sequence + p] >= pages)
        return Refuse("page_table of sequence " + std::to_string(s) + " names a page outside the pool");
    for (int64_t start = 0; start < count; start += kTaskRows)
      for (int64_t head = 0; head < kv_heads; ++head)
        work->tasks.push_back({s, head, first + start, std::min(kTaskRows, count - start), end - count + start});
  }
  // The dearest first, so that the last ones to run are short.
  std::stable_sort(work->tasks.begin(), work->tasks.end(), [](const Task& a, const Task& b) {
    return (a.position + a.num_rows) * a.num_rows > (b.position + b.num_rows) * b.num_rows;
  });
  work->kernel = kernel;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), work->tasks.size()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Drain(); });
  work->Drain();
  while (work->done.load(std::memory_order_acquire) < work->tasks.size()) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace hetero

XLA_FFI_DEFINE_HANDLER_SYMBOL(hetero_paged_attention, hetero::PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
