// The XLA custom call: checks shapes, makes the plan, and runs append and attention on XLA's own threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "call.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hetero_jax {

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif
#if defined(HJ_HAS_AVX512_BF16)
extern const Kernels kernels_avx512_bf16;
#endif

namespace ffi = xla::ffi;

namespace {

struct Aligned {
  void* at = nullptr;
  int64_t bytes = 0;
  ~Aligned() { std::free(at); }
};
thread_local Aligned scratch;

// The kernels that this machine runs, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(HJ_HAS_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kernels_avx512_bf16);
#endif
  if (avx512) found.push_back(&kernels_avx512);
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_plain);
  return found;
}

std::string usable_names() {
  std::string names;
  for (const Kernels* kernels : usable_kernels()) names += (names.empty() ? "" : " ") + std::string(kernels->isa);
  return names;
}

// What is asked for: by the call, else by the environment, else nothing.
std::string name_of(std::string_view isa) {
  const char* forced = std::getenv("HETERO_JAX_ISA");
  return isa.empty() && forced ? forced : std::string(isa);
}

const Kernels* find_kernels(const std::string& isa) {
  static const std::vector<const Kernels*> usable = usable_kernels();
  if (isa.empty()) return usable.front();
  for (const Kernels* kernels : usable)
    if (isa == kernels->isa) return kernels;
  return nullptr;
}

// Subnormals become 0 on every thread alike: XLA's threads and the caller's may differ in that, and so would bits.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Tasks 0 .. count-1, each run once by one of several threads. Even workers take from the front and odd ones from the
// back, so that with prefill in front and decode behind, one thread computes while another loads.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}

  // The next task from that end, or -1.
  int64_t take(bool front) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t from_front = ends >> 32, from_back = ends & 0xffffffffu;
      if (static_cast<int64_t>(from_front + from_back) >= count_) return -1;
      const uint64_t next = front ? ends + (uint64_t{1} << 32) : ends + 1;
      if (ends_.compare_exchange_weak(ends, next, std::memory_order_relaxed))
        return front ? static_cast<int64_t>(from_front) : count_ - 1 - static_cast<int64_t>(from_back);
    }
  }
  int64_t count() const { return count_; }

 private:
  const int64_t count_;
  std::atomic<uint64_t> ends_{0};
};

// Everything that a run needs; helpers may look at it after the call returned, to find that nothing is left.
class Run {
 public:
  Run(const Call& call, const Kernels& kernels, Plan plan)
      : call_(call),
        kernels_(kernels),
        plan_(std::move(plan)),
        pending_(new std::atomic<int32_t>[plan_.pending.size() * call.kv_heads]),
        appends_((call.appended + kAppendRows - 1) / kAppendRows),
        attends_(static_cast<int64_t>(plan_.items.size())) {
    for (size_t i = 0; i < plan_.pending.size(); ++i)
      for (int64_t head = 0; head < call.kv_heads; ++head)
        pending_[i * call.kv_heads + head].store(plan_.pending[i], std::memory_order_relaxed);
  }

  // Works until nothing is left to take; returns after this thread's tasks are done, others' may not be.
  void work(int worker) {
    FlushSubnormals flush;
    for (int64_t task; (task = appends_.take(worker % 2 == 0)) >= 0;) {
      const int64_t begin = task * kAppendRows;
      kernels_.append(call_, begin, std::min(begin + kAppendRows, call_.appended));
      done(&appended_);
    }
    wait_for(&appended_, appends_.count());
    for (int64_t task; (task = attends_.take(worker % 2 == 0)) >= 0;) {
      attend(task);
      done(&attended_);
    }
  }

  void wait() { wait_for(&attended_, attends_.count()); }

 private:
  static constexpr int64_t kAppendRows = 8;

  void attend(int64_t task) {
    const Item& item = plan_.items[task];
    kernels_.attend(call_, item);
    if (item.complete) return;
    for (int32_t r = 0; r < item.num_rows; ++r)
      for (int32_t head = item.head_begin; head < item.head_end; ++head) {
        auto& left = pending_[(plan_.item_first[task] + r) * call_.kv_heads + head];
        // Whoever brings the last partial folds them all, in order of position.
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) kernels_.finish(call_, item.rows[r], head);
      }
  }

  void done(std::atomic<int64_t>* counter) {
    counter->fetch_add(1, std::memory_order_release);
  }

  // Short waits only: whoever took a task is running it.
  void wait_for(std::atomic<int64_t>* counter, int64_t count) {
    for (int spins = 0; counter->load(std::memory_order_acquire) < count; ++spins) {
      if (spins > 4096) std::this_thread::yield();
    }
  }

  const Call call_;
  const Kernels& kernels_;
  const Plan plan_;
  std::unique_ptr<std::atomic<int32_t>[]> pending_;
  TaskQueue appends_, attends_;
  std::atomic<int64_t> appended_{0}, attended_{0};
};

std::string shape_of(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

ffi::Error refuse(const std::string& what) { return ffi::Error::InvalidArgument("paged_attention: " + what); }

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

bool is(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  auto found = buffer.dimensions();
  return found.size() == shape.size() && std::equal(found.begin(), found.end(), shape.begin());
}

bool kv_type_of(ffi::DataType type, KvType* kv, int64_t* per_word, int64_t* size) {
  switch (type) {
    case ffi::DataType::F32: return *kv = KvType::kF32, *per_word = 1, *size = 4, true;
    case ffi::DataType::BF16: return *kv = KvType::kBf16, *per_word = 2, *size = 2, true;
    case ffi::DataType::F16: return *kv = KvType::kF16, *per_word = 1, *size = 2, true;
    case ffi::DataType::S8: return *kv = KvType::kI8, *per_word = 4, *size = 1, true;
    default: return false;
  }
}

bool is_float(ffi::DataType type) { return type == ffi::DataType::F32 || type == ffi::DataType::BF16; }

struct Buffers {
  ffi::AnyBuffer kv, q, k, v, page_table, first_row, num_rows, context, row_slot, slopes, sinks, begun;
};

struct Outputs {
  ffi::Result<ffi::AnyBuffer> kv, out, lse, ended;
};

// Checks every shape that a kernel relies on and fills the call; returns what does not fit.
std::string describe(const Buffers& b, int64_t page_size, Call* c) {
  int64_t per_word = 0, size = 0;
  if (!kv_type_of(b.kv.element_type(), &c->kv, &per_word, &size))
    return "the pool's type must be float32, bfloat16, float16 or int8";
  if (!is_float(b.q.element_type()) || !is_float(b.k.element_type()) || b.v.element_type() != b.k.element_type())
    return "q, k and v must be float32 or bfloat16, k and v the same";
  for (const auto* table : {&b.page_table, &b.first_row, &b.num_rows, &b.context, &b.row_slot})
    if (table->element_type() != ffi::DataType::S32) return "the layout's arrays must be int32";
  for (const auto* list : {&b.slopes, &b.sinks})
    if (list->element_type() != ffi::DataType::F32) return "slopes and sinks must be float32";
  auto q = b.q.dimensions(), k = b.k.dimensions(), v = b.v.dimensions(), pool = b.kv.dimensions();
  if (q.size() != 3 || k.size() != 3 || v.size() != 3 || pool.size() != 3)
    return "q, k, v and the pool must have 3 dimensions";
  if (page_size < 1) return "page_size is " + std::to_string(page_size) + "; allowed: 1 and above";
  c->q_bf16 = b.q.element_type() == ffi::DataType::BF16;
  c->kv_bf16 = b.k.element_type() == ffi::DataType::BF16;
  c->rows = q[0], c->heads = q[1], c->dim = q[2], c->appended = k[0], c->kv_heads = k[1], c->v_dim = v[2];
  if (c->kv_heads < 1 || c->heads < 1 || c->heads % c->kv_heads || c->dim < 1 || c->v_dim < 1)
    return "q " + shape_of(b.q) + " does not fit k " + shape_of(b.k);
  if (c->appended && c->appended != c->rows) return "k " + shape_of(b.k) + " has neither q's rows nor none";
  if (!is(b.k, {c->appended, c->kv_heads, c->dim}) || !is(b.v, {c->appended, c->kv_heads, c->v_dim}))
    return "k " + shape_of(b.k) + " and v " + shape_of(b.v) + " do not fit q " + shape_of(b.q);
  c->group = c->heads / c->kv_heads;
  c->dim_pad = round_up(c->dim, per_word), c->v_pad = round_up(c->v_dim, kBlock);
  c->num_pages = pool[0], c->page_size = page_size, c->page_blocks = (page_size + kBlock - 1) / kBlock;
  c->k_block_bytes = c->dim_pad * kBlock * size, c->v_block_bytes = c->v_pad * kBlock * size;
  c->k_offset = c->kv == KvType::kI8 ? 2 * c->page_blocks * kBlock * sizeof(float) : 0;
  c->v_offset = c->k_offset + c->page_blocks * c->k_block_bytes;
  c->head_bytes = c->v_offset + c->page_blocks * c->v_block_bytes, c->page_bytes = c->kv_heads * c->head_bytes;
  if (!is(b.kv, {c->num_pages, c->kv_heads, c->head_bytes / size}))
    return "the pool " + shape_of(b.kv) + " does not fit k " + shape_of(b.k) + ", v " + shape_of(b.v) +
           " and page_size " + std::to_string(page_size);
  const int64_t sequences = b.first_row.element_count();
  if (b.page_table.dimensions().size() != 2 || b.page_table.dimensions()[0] != sequences ||
      !is(b.first_row, {sequences}) || !is(b.num_rows, {sequences}) || !is(b.context, {sequences}) ||
      !is(b.row_slot, {c->appended}))
    return "the layout's arrays disagree on the number of sequences or rows";
  if (c->num_pages * page_size > INT32_MAX) return "the pool has more slots than an int32 counts";
  for (const auto* list : {&b.slopes, &b.sinks})
    if (!is(*list, {0}) && !is(*list, {c->heads})) return "slopes and sinks must have one value per head";
  c->pool = static_cast<char*>(b.kv.untyped_data());
  c->q = b.q.untyped_data(), c->k = b.k.untyped_data(), c->v = b.v.untyped_data();
  c->row_slot = static_cast<const int32_t*>(b.row_slot.untyped_data());
  c->slopes = b.slopes.element_count() ? static_cast<const float*>(b.slopes.untyped_data()) : nullptr;
  c->sinks = b.sinks.element_count() ? static_cast<const float*>(b.sinks.untyped_data()) : nullptr;
  return "";
}

// The same for the outputs. Which of them are asked for, and whether there is something to begin with, says which part
// of the tiles the call is for.
std::string describe_outputs(const Buffers& b, Outputs& o, Call* c) {
  const int64_t length = c->v_pad + kPartialTail;
  c->part = o.ended->element_count() ? Part::kBehind : b.begun.element_count() ? Part::kRest : Part::kAll;
  for (const ffi::AnyBuffer& partial : {b.begun, *o.ended})
    if (partial.element_type() != ffi::DataType::F32 ||
        (partial.element_count() && !is(partial, {c->rows, c->heads, length})))
      return "what a call ends or begins with must be float32 [rows, heads, " + std::to_string(length) + "] or [0]";
  const bool wants_lse = o.lse->element_count() > 0;
  if (o.lse->element_type() != ffi::DataType::F32 || (wants_lse && !is(*o.lse, {c->rows, c->heads})))
    return "the log-sum-exp output must be float32 [rows, heads]";
  c->ended = static_cast<float*>(o.ended->untyped_data());
  c->begun = static_cast<const float*>(b.begun.untyped_data());
  c->out = o.out->untyped_data(), c->lse = wants_lse ? static_cast<float*>(o.lse->untyped_data()) : nullptr;
  if (c->part == Part::kBehind) return c->appended || wants_lse ? "a call that ends early appends and outputs nothing" : "";
  if (!is(*o.out, {c->rows, c->heads, c->v_dim}) || o.out->element_type() != b.q.element_type())
    return "the output " + shape_of(*o.out) + " must be [rows, heads, v_dim] in q's type";
  return o.kv->untyped_data() == c->pool ? "" : "the pool must be aliased to the output";
}

// Rows of no item: nothing was seen.
void write_lone_row(const Call& call, int64_t row) {
  if (call.part == Part::kBehind) {
    const int64_t length = call.v_pad + kPartialTail;
    for (float *at = call.ended + row * call.heads * length, *end = at + call.heads * length; at < end; at += length) {
      std::fill_n(at, length, 0.0f);
      at[call.v_pad] = kLowest;
    }
    return;
  }
  const int64_t row_bytes = call.heads * call.v_dim * (call.q_bf16 ? 2 : 4);
  std::memset(static_cast<char*>(call.out) + row * row_bytes, 0, row_bytes);
  if (call.lse) std::fill_n(call.lse + row * call.heads, call.heads, -__builtin_inff());
}

ffi::Error run(ffi::ThreadPool pool, const Buffers& b, Outputs o, float scale, float softcap, int64_t window,
               int64_t page_size, int64_t max_threads, std::string_view isa) {
  Call call{};
  std::string error = describe(b, page_size, &call);
  if (error.empty()) error = describe_outputs(b, o, &call);
  if (!error.empty()) return refuse(error);
  if (window < 0 || max_threads < 0) return refuse("window and threads must not be negative");
  const Kernels* kernels = find_kernels(name_of(isa));
  if (!kernels) return refuse("this machine runs no kernels \"" + name_of(isa) + "\"; allowed: " + usable_names());
  call.scale = scale, call.softcap = softcap, call.window = window;

  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (max_threads) threads = std::min(threads, max_threads);
  const Tables tables{static_cast<const int32_t*>(b.page_table.untyped_data()),
                      static_cast<const int32_t*>(b.first_row.untyped_data()),
                      static_cast<const int32_t*>(b.num_rows.untyped_data()),
                      static_cast<const int32_t*>(b.context.untyped_data()),
                      static_cast<int64_t>(b.first_row.element_count()), b.page_table.dimensions()[1]};
  Plan plan;
  error = make_plan(call, tables, static_cast<int>(threads), &plan);
  if (!error.empty()) return refuse(error);
  for (int32_t row : plan.lone_rows) write_lone_row(call, row);
  std::unique_ptr<float, decltype(&std::free)> partials(nullptr, &std::free);
  if (plan.partials) {
    const int64_t floats = plan.partials * call.heads * (call.v_pad + kPartialTail);
    partials.reset(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64))));
    if (!partials) throw std::bad_alloc();
    call.partials = partials.get();
  }
  const int64_t tasks = static_cast<int64_t>(plan.items.size());
  auto shared = std::make_shared<Run>(call, *kernels, std::move(plan));
  for (int64_t worker = 1; worker < std::min(threads, std::max<int64_t>(tasks, 1)); ++worker)
    pool.Schedule([shared, worker] { shared->work(static_cast<int>(worker)); });
  shared->work(0);
  shared->wait();
  return ffi::Error::Success();
}

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::AnyBuffer kv, ffi::AnyBuffer q, ffi::AnyBuffer k,
                           ffi::AnyBuffer v, ffi::AnyBuffer page_table, ffi::AnyBuffer first_row,
                           ffi::AnyBuffer num_rows, ffi::AnyBuffer context, ffi::AnyBuffer row_slot,
                           ffi::AnyBuffer slopes, ffi::AnyBuffer sinks, ffi::AnyBuffer begun,
                           ffi::Result<ffi::AnyBuffer> kv_out, ffi::Result<ffi::AnyBuffer> out,
                           ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> ended, float scale,
                           float softcap, int64_t window, int64_t page_size, int64_t threads, std::string_view isa) {
  try {
    return run(pool, {kv, q, k, v, page_table, first_row, num_rows, context, row_slot, slopes, sinks, begun},
               {kv_out, out, lse, ended}, scale, softcap, window, page_size, threads, isa);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "paged_attention: out of memory");
  }
}

}  // namespace

void* thread_scratch(int64_t bytes) {
  if (scratch.bytes < bytes) {
    std::free(scratch.at);
    scratch.bytes = 0;
    scratch.at = std::aligned_alloc(64, round_up(bytes, 4096));
    if (!scratch.at) std::abort();  // a few hundred kilobytes: nothing would work any more
    scratch.bytes = bytes;
  }
  return scratch.at;
}

}  // namespace hetero_jax

#pragma GCC visibility push(default)  // the only names that the library shows
XLA_FFI_DEFINE_HANDLER_SYMBOL(hetero_paged_attention, hetero_jax::paged_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // kv
                                  .Arg<xla::ffi::AnyBuffer>()  // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // page_table
                                  .Arg<xla::ffi::AnyBuffer>()  // first_row
                                  .Arg<xla::ffi::AnyBuffer>()  // num_rows
                                  .Arg<xla::ffi::AnyBuffer>()  // context
                                  .Arg<xla::ffi::AnyBuffer>()  // row_slot
                                  .Arg<xla::ffi::AnyBuffer>()  // slopes
                                  .Arg<xla::ffi::AnyBuffer>()  // sinks
                                  .Arg<xla::ffi::AnyBuffer>()  // begun
                                  .Ret<xla::ffi::AnyBuffer>()  // kv
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // log-sum-exp
                                  .Ret<xla::ffi::AnyBuffer>()  // ended
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("page_size")
                                  .Attr<int64_t>("threads")
                                  .Attr<std::string_view>("isa"));

extern "C" {
// Names of the kernels that this machine runs, best first, separated by spaces.
const char* hetero_usable_isas() {
  static const std::string names = hetero_jax::usable_names();
  return names.c_str();
}

// Asks for huge pages under [at, at + bytes): a walk over scattered pages of the pool misses the TLB at each of them.
void hetero_ask_for_huge_pages(void* at, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1: at once, for memory that was touched already
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(at) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(at) + bytes) / kHuge * kHuge;
  if (end <= begin) return;
  // Advice only: where the OS has none to give, the pool works as it is.
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

// For benchmarks, called from as many threads as are wanted.
float hetero_probe_read(const void* from, int64_t bytes) {
  return hetero_jax::find_kernels(hetero_jax::name_of(""))->probe_read(static_cast<const char*>(from), bytes);
}
// Blocks of `bytes` in the given order, each fetched while the ones before it are read.
float hetero_probe_read_blocks(const char* from, int64_t bytes, const int32_t* order, int64_t count) {
  constexpr int64_t kAheadBytes = 8 << 10, kLine = 64;
  const auto read = hetero_jax::find_kernels(hetero_jax::name_of(""))->probe_read;
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / bytes);
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + ahead < count)
      for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + order[i + ahead] * bytes + at);
    sum += read(from + order[i] * bytes, bytes);
  }
  return sum;
}
int64_t hetero_probe_multiply_add(int32_t kind, int64_t steps) {
  constexpr hetero_jax::KvType kKinds[] = {hetero_jax::KvType::kF32, hetero_jax::KvType::kBf16, hetero_jax::KvType::kI8};
  const auto kv = kKinds[kind];
  return hetero_jax::find_kernels(hetero_jax::name_of(""))->probe_multiply_add(kv, steps);
}
}  // extern "C"
#pragma GCC visibility pop
