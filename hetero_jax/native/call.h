// What the FFI handler, the plan and the kernels of every ISA share: one call of paged attention, and its work items.
// No inline code here: this header is compiled with several instruction sets, and the linker keeps only one copy.
#pragma once

#include <cstdint>

namespace hetero_jax {

enum class KvType { kF32, kBf16, kF16, kI8 };

// Tokens in a block: a page is cut into blocks, and a block's keys lie with their tokens innermost.
constexpr int kBlock = 16;
// Blocks in a tile. Every tile gives (max, sum, weighted values) of its own, and a row's tiles are folded in order of
// position: so a row's bits depend on its sequence and nothing else. Changing this changes bits.
constexpr int kTileBlocks = 8;
constexpr int kTile = kBlock * kTileBlocks;
// Query vectors (rows x group) of one work item, and of the part of it that passes over a tile together.
constexpr int kItemVectors = 256;
constexpr int kPassVectors = 64;
// Floats behind a partial's values: its max and its sum, and room to stay aligned.
constexpr int kPartialTail = 16;
// Max of no scores.
constexpr float kLowest = -3.402823466e38f;

struct QueryRow {
  int32_t row;         // of q and of the output
  int32_t position;    // in its sequence: the last key it sees
  int32_t first_tile;  // of those that this call passes over, that it sees a key of
  int32_t last_tile;
  int32_t folded;   // tiles [first_tile, folded) are one partial, that of first_tile
  int64_t partial;  // partials of (tile, head) are at (partial + tile) * kv_heads + head; unused where complete
};

// Rows that pass over the same tiles of some KV heads together, head after head, as a page holds them.
struct Item {
  const QueryRow* rows;
  const int32_t* pages;
  int64_t context;  // positions held by the sequence
  int32_t num_rows;
  int32_t head_begin, head_end;
  int32_t tile_begin, tile_end;
  bool complete;  // covers every tile of its rows, so that it writes the output itself
  bool folds;     // complete, or covers the first tiles of all its rows: they become one partial
};

// Which tiles a call passes over. A sequence's rows may be attended to in two calls, so that q need not wait for k and v:
// those behind the tile in which its rows begin, and then, from where that ended, the rest. Together they give the bits
// of one call, for the tiles are folded in the same order.
enum class Part { kAll, kBehind, kRest };

struct Call {
  KvType kv;
  Part part;
  bool q_bf16, kv_bf16;  // types of q and the output, and of the incoming k and v
  int64_t rows, heads, kv_heads, group;
  int64_t appended;  // rows of k and v: all or none
  int64_t dim, dim_pad, v_dim, v_pad;  // padded as the pool is
  int64_t num_pages, page_size, page_blocks;
  // A page is its heads, one after the other; a head is, for int8, the scales of its keys and those of its values, and
  // then its blocks of keys and those of values.
  char* pool;
  int64_t page_bytes, head_bytes, k_offset, v_offset, k_block_bytes, v_block_bytes;
  const void *q, *k, *v;
  const int32_t* row_slot;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  const float *slopes, *sinks;  // [heads] or null
  void* out;
  float* lse;  // [rows, heads] or null
  // [rows, heads, v_pad + kPartialTail] values, max and sum so far, of Part kBehind: where it ends, and kRest begins.
  float* ended;
  const float* begun;
  float* partials;
};

struct Kernels {
  const char* isa;
  void (*append)(const Call&, int64_t row_begin, int64_t row_end);
  void (*attend)(const Call&, const Item&);
  // Folds the partials of a row and writes its output.
  void (*finish)(const Call&, const QueryRow&, int head);
  // For benchmarks: a plain read of memory, and `steps` of independent multiply-adds, whose number each it returns.
  float (*probe_read)(const char* from, int64_t bytes);
  int64_t (*probe_multiply_add)(KvType, int64_t steps);
};

// Bytes of a growing buffer of this thread, 64-byte aligned; null where memory is out.
void* thread_scratch(int64_t bytes);

}  // namespace hetero_jax
