#include "plan.h"

#include <algorithm>
#include <sstream>

namespace hetero_jax {
namespace {

// Items per thread that the work is cut into at least: the last ones to finish waste at most a part of an item.
constexpr int64_t kItemsPerThread = 8;
// From this many query vectors on a pass over keys and values computes longer than it loads.
constexpr int64_t kComputeBound = 32;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

int64_t tile_of(const Call& call, int64_t position) {
  const int64_t block = position / call.page_size * call.page_blocks + position % call.page_size / kBlock;
  return block / kTileBlocks;
}

std::string check_sequence(const Call& call, const Tables& tables, int64_t s, std::vector<bool>* taken) {
  const int64_t first = tables.first_row[s], count = tables.num_rows[s], context = tables.context[s];
  if (count < 0 || first < 0 || first + count > call.rows)
    return text("sequence ", s, " has rows ", first, " to ", first + count, "; allowed: 0 to ", call.rows);
  if (count == 0) return "";
  if (context < count || context > tables.pages_per_sequence * call.page_size)
    return text("sequence ", s, " has a context of ", context, "; allowed: ", count, " (its rows) to ",
                tables.pages_per_sequence * call.page_size, " (its page table)");
  for (int64_t page = 0; page * call.page_size < context; ++page) {
    const int64_t found = tables.page_table[s * tables.pages_per_sequence + page];
    if (found < 0 || found >= call.num_pages)
      return text("page ", page, " of sequence ", s, " is ", found, "; allowed: 0 to ", call.num_pages - 1);
  }
  for (int64_t row = first; row < first + count; ++row) {
    if ((*taken)[row]) return text("row ", row, " belongs to two sequences");
    (*taken)[row] = true;
  }
  return "";
}

std::string check(const Call& call, const Tables& tables, std::vector<bool>* taken) {
  for (int64_t row = 0; row < call.rows; ++row)
    if (call.row_slot[row] < 0) return text("slot ", call.row_slot[row], " of row ", row, " is negative");
  for (int64_t s = 0; s < tables.sequences; ++s) {
    std::string error = check_sequence(call, tables, s, taken);
    if (!error.empty()) return error;
  }
  return "";
}

void add_rows(const Call& call, const Tables& tables, int64_t s, Plan* plan) {
  const int64_t count = tables.num_rows[s], context = tables.context[s];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t position = context - count + r;
    const int64_t oldest = call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
    plan->rows.push_back({static_cast<int32_t>(tables.first_row[s] + r), static_cast<int32_t>(position),
                          static_cast<int32_t>(tile_of(call, oldest)), static_cast<int32_t>(tile_of(call, position)),
                          0});
  }
}

// One item per KV head for rows [begin, begin + count) of the plan and tiles [first, end).
void add_items(const Call& call, const Tables& tables, int64_t s, int64_t begin, int64_t count, int64_t first,
               int64_t end, bool complete, Plan* plan) {
  for (int64_t head = 0; head < call.kv_heads; ++head) {
    Item item{};
    item.pages = tables.page_table + s * tables.pages_per_sequence;
    item.context = tables.context[s];
    item.num_rows = static_cast<int32_t>(count);
    item.head = static_cast<int32_t>(head);
    item.tile_begin = static_cast<int32_t>(first);
    item.tile_end = static_cast<int32_t>(end);
    item.complete = complete;
    plan->items.push_back(item);
    plan->item_first.push_back(static_cast<int32_t>(begin));
  }
}

}  // namespace

std::string make_plan(const Call& call, const Tables& tables, int threads, Plan* plan) {
  std::vector<bool> taken(call.rows);
  std::string error = check(call, tables, &taken);
  if (!error.empty()) return error;
  for (int64_t row = 0; row < call.rows; ++row)
    if (!taken[row]) plan->lone_rows.push_back(static_cast<int32_t>(row));

  const int64_t item_rows = std::max<int64_t>(1, kItemVectors / call.group);
  // How many tiles an item may have, from the tiles of all: an item that streams a whole long context would keep one
  // thread busy after the others are done. Where the cuts are changes no bit.
  int64_t tiles = 0;
  for (int64_t s = 0; s < tables.sequences; ++s)
    if (tables.num_rows[s]) tiles += (tile_of(call, tables.context[s] - 1) + 1) * call.kv_heads;
  const int64_t most = std::max<int64_t>(1, tiles / (threads * kItemsPerThread));

  struct Span {
    int64_t sequence, begin, count, first, end;
    bool complete;
  };
  std::vector<Span> computing, streaming;
  for (int64_t s = 0; s < tables.sequences; ++s) {
    if (tables.num_rows[s] == 0) continue;
    const int64_t begin = static_cast<int64_t>(plan->rows.size());
    add_rows(call, tables, s, plan);
    const int64_t end = static_cast<int64_t>(plan->rows.size());
    plan->pending.resize(end);
    for (int64_t b = begin; b < end; b += item_rows) {
      const int64_t count = std::min(item_rows, end - b);
      const int64_t first = plan->rows[b].first_tile, last = plan->rows[b + count - 1].last_tile;
      const bool computes = count * call.group >= kComputeBound;
      auto& spans = computes ? computing : streaming;
      const int64_t parts = computes ? 1 : (last - first + most) / most;
      if (parts <= 1) {
        spans.push_back({s, b, count, first, last + 1, true});
        continue;
      }
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = first + (last + 1 - first) * part / parts, to = first + (last + 1 - first) * (part + 1) / parts;
        spans.push_back({s, b, count, from, to, false});
      }
      for (int64_t r = b; r < b + count; ++r) {
        QueryRow& row = plan->rows[r];
        row.partial = plan->partials - row.first_tile;
        plan->partials += row.last_tile - row.first_tile + 1;
        plan->pending[r] = static_cast<int32_t>(parts);
      }
    }
  }
  auto longest_first = [](const Span& a, const Span& b) {
    return (a.end - a.first) * a.count > (b.end - b.first) * b.count;
  };
  std::stable_sort(computing.begin(), computing.end(), longest_first);
  std::stable_sort(streaming.begin(), streaming.end(), longest_first);
  for (const auto* spans : {&computing, &streaming})
    for (const Span& span : *spans)
      add_items(call, tables, span.sequence, span.begin, span.count, span.first, span.end, span.complete, plan);
  for (size_t i = 0; i < plan->items.size(); ++i) plan->items[i].rows = plan->rows.data() + plan->item_first[i];
  return "";
}

}  // namespace hetero_jax
