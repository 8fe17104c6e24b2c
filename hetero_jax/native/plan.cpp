#include "plan.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <utility>

namespace hetero_jax {
namespace {

// Items per thread that the work is cut into at least: the last ones to finish waste at most a part of an item.
constexpr int64_t kItemsPerThread = 8;
// From so many query vectors on a pass over keys and values computes longer than it loads.
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
  for (int64_t row = 0; row < call.appended; ++row)
    if (call.row_slot[row] < 0) return text("slot ", call.row_slot[row], " of row ", row, " is negative");
  for (int64_t s = 0; s < tables.sequences; ++s) {
    std::string error = check_sequence(call, tables, s, taken);
    if (!error.empty()) return error;
  }
  return "";
}

// The tiles of a sequence that the call passes over: [first, end).
std::pair<int64_t, int64_t> tiles_of(const Call& call, const Tables& tables, int64_t s) {
  const int64_t context = tables.context[s], own = tile_of(call, context - tables.num_rows[s]);
  return {call.part == Part::kRest ? own : 0, call.part == Part::kBehind ? own : tile_of(call, context - 1) + 1};
}

void add_rows(const Call& call, const Tables& tables, int64_t s, Plan* plan) {
  const int64_t count = tables.num_rows[s];
  const auto [begin, end] = tiles_of(call, tables, s);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t position = tables.context[s] - count + r;
    const int64_t oldest = call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
    const auto first = static_cast<int32_t>(std::clamp(tile_of(call, oldest), begin, end));
    const auto last = static_cast<int32_t>(std::min(tile_of(call, position), end - 1));
    plan->rows.push_back(
        {static_cast<int32_t>(tables.first_row[s] + r), static_cast<int32_t>(position), first, last, first, 0});
  }
}

// Consecutive rows of the plan that pass over tiles [first, end) of one page table together.
struct Span {
  int64_t sequence;  // whose page table: of the first row
  int64_t context;   // positions that every sequence of the rows holds
  int64_t begin, count, first, end;
  bool complete = false, leads = false;  // covers every tile of its rows; the first tiles of all of them
};

// The sequences of a call as a tree of common prefixes: what several page tables begin with is passed over once, by the
// rows of all of them (Bifurcated Attention, arXiv 2403.08845, at any depth: RadixAttention, arXiv 2312.07104).
class Sharing {
 public:
  Sharing(const Call& call, const Tables& tables, Plan* plan)
      : call_(call), tables_(tables), item_rows_(std::max<int64_t>(1, kItemVectors / call.group)) {
    for (int64_t s = 0; s < tables.sequences; ++s)
      if (tables.num_rows[s]) order_.push_back(s);
    // Equal beginnings become neighbours.
    if (shares()) std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return before(a, b); });
    for (int64_t s : order_) {
      begins_.push_back(static_cast<int64_t>(plan->rows.size()));
      add_rows(call, tables, s, plan);
    }
    begins_.push_back(static_cast<int64_t>(plan->rows.size()));
    branch(0, order_.size(), 0, *plan);
  }

  std::vector<Span> spans;

 private:
  const int32_t* pages(size_t i) const { return tables_.page_table + order_[i] * tables_.pages_per_sequence; }
  int64_t held(int64_t s) const { return (tables_.context[s] + call_.page_size - 1) / call_.page_size; }

  bool before(int64_t a, int64_t b) const {
    const int32_t* table = tables_.page_table;
    const int64_t width = tables_.pages_per_sequence;
    return std::lexicographical_compare(table + a * width, table + a * width + held(a), table + b * width,
                                        table + b * width + held(b));
  }

  // Behind a window beginnings are skipped, not shared; and the rest of what began in another call has none.
  bool shares() const { return !call_.window && call_.part != Part::kRest; }

  // Tiles that sequences i and j have in common, whole and from the first on.
  int64_t common_tiles(size_t i, size_t j) const {
    if (!shares()) return 0;
    const int64_t context = std::min(tables_.context[order_[i]], tables_.context[order_[j]]);
    const int64_t whole = context / call_.page_size;
    const auto differ = std::mismatch(pages(i), pages(i) + whole, pages(j)).first;
    const int64_t passed = std::min(tiles_of(call_, tables_, order_[i]).second, tiles_of(call_, tables_, order_[j]).second);
    return std::min((differ - pages(i)) * call_.page_blocks / kTileBlocks, passed);
  }

  // Spans of sequences [i, j), which have their first `from` tiles in common, over the tiles behind those.
  void branch(size_t i, size_t j, int64_t from, const Plan& plan) {
    if (j - i == 1) return alone(i, from, plan);
    size_t next = i;
    for (size_t at = i; at < j; at = next) {
      int64_t shared = INT64_MAX;
      for (next = at + 1; next < j; ++next) {
        const int64_t common = common_tiles(next - 1, next);
        if (common <= from) break;
        shared = std::min(shared, common);
      }
      if (next - at > 1) add(at, next, from, shared);
      branch(at, next, next - at > 1 ? shared : from, plan);
    }
  }

  void alone(size_t i, int64_t from, const Plan& plan) {
    const int64_t s = order_[i];
    for (int64_t b = begins_[i]; b < begins_[i + 1]; b += item_rows_) {
      const int64_t count = std::min(item_rows_, begins_[i + 1] - b);
      const int64_t first = std::max<int64_t>(from, plan.rows[b].first_tile), end = plan.rows[b + count - 1].last_tile + 1;
      if (first < end) spans.push_back({s, tables_.context[s], b, count, first, end});
    }
  }

  void add(size_t i, size_t j, int64_t first, int64_t end) {
    int64_t context = INT64_MAX;
    for (size_t k = i; k < j; ++k) context = std::min<int64_t>(context, tables_.context[order_[k]]);
    for (int64_t b = begins_[i]; b < begins_[j]; b += item_rows_)
      spans.push_back({order_[i], context, b, std::min(item_rows_, begins_[j] - b), first, end});
  }

  const Call& call_;
  const Tables& tables_;
  const int64_t item_rows_;
  std::vector<int64_t> order_;   // sequences that have rows
  std::vector<int64_t> begins_;  // per sequence in that order: its first row in the plan
};

// Time of a tile, in units of one that is only loaded.
int64_t cost_of(const Call& call, const Span& span) {
  return std::max<int64_t>(1, span.count * call.group / kComputeBound);
}

// Cuts spans so that one long context keeps no thread busy after the others are done (LeanAttention, arXiv 2405.10480):
// those of many rows between rows, which costs nothing where arithmetic binds, and then along their tiles. Where the cuts
// are changes no bit.
std::vector<Span> cut(const Call& call, const std::vector<Span>& spans, int threads) {
  int64_t total = 0;
  for (const Span& span : spans) total += (span.end - span.first) * cost_of(call, span) * call.kv_heads;
  const int64_t most = std::max<int64_t>(1, total / (threads * kItemsPerThread));
  std::vector<Span> cuts;
  for (const Span& span : spans) {
    const int64_t tiles = span.end - span.first, wanted = (tiles * cost_of(call, span) + most - 1) / most;
    const int64_t row_parts = std::max<int64_t>(1, std::min({wanted, span.count, span.count * call.group / kPassVectors}));
    const int64_t parts = std::min(tiles, (wanted + row_parts - 1) / row_parts);
    for (int64_t row = 0; row < row_parts; ++row)
      for (int64_t part = 0; part < parts; ++part) {
        cuts.push_back(span);
        cuts.back().begin = span.begin + span.count * row / row_parts;
        cuts.back().count = span.begin + span.count * (row + 1) / row_parts - cuts.back().begin;
        cuts.back().first = span.first + tiles * part / parts;
        cuts.back().end = span.first + tiles * (part + 1) / parts;
      }
  }
  return cuts;
}

// Finds the spans that cover every tile of their rows and so write the output themselves. The rows of the others get
// places for their partials and wait for all of their items.
void place_partials(std::vector<Span>* spans, Plan* plan) {
  auto items_of = [&](const Span& span) { return plan->pending.begin() + span.begin; };
  plan->pending.assign(plan->rows.size(), 0);
  for (const Span& span : *spans) std::for_each_n(items_of(span), span.count, [](int32_t& items) { ++items; });
  std::vector<bool> waits(plan->rows.size());
  for (Span& span : *spans) {
    const auto rows = plan->rows.begin() + span.begin;
    auto begins_here = [&](const QueryRow& row) { return row.first_tile == span.first; };
    span.complete = std::all_of(items_of(span), items_of(span) + span.count, [](int32_t items) { return items == 1; });
    span.leads = std::all_of(rows, rows + span.count, begins_here);
    if (span.complete) continue;
    std::fill_n(waits.begin() + span.begin, span.count, true);
    if (span.leads)
      std::for_each_n(rows, span.count, [&](QueryRow& row) { row.folded = static_cast<int32_t>(span.end); });
  }
  for (size_t r = 0; r < plan->rows.size(); ++r) {
    QueryRow& row = plan->rows[r];
    if (plan->pending[r] == 0) plan->lone_rows.push_back(row.row);
    if (!waits[r]) {
      plan->pending[r] = 0;
      continue;
    }
    row.partial = plan->partials - row.first_tile;
    plan->partials += row.last_tile - row.first_tile + 1;
  }
}

// Where memory binds, one item takes all KV heads of a page, which are one run of memory; where arithmetic does, one
// item per head, whose queries and values fit the cache.
void add_items(const Call& call, const Tables& tables, const Span& span, Plan* plan) {
  const int64_t heads = cost_of(call, span) == 1 ? call.kv_heads : 1;
  for (int64_t head = 0; head < call.kv_heads; head += heads) {
    Item item{};
    item.rows = plan->rows.data() + span.begin;
    item.pages = tables.page_table + span.sequence * tables.pages_per_sequence;
    item.context = span.context;
    item.num_rows = static_cast<int32_t>(span.count);
    item.head_begin = static_cast<int32_t>(head);
    item.head_end = static_cast<int32_t>(head + heads);
    item.tile_begin = static_cast<int32_t>(span.first);
    item.tile_end = static_cast<int32_t>(span.end);
    item.complete = span.complete;
    item.folds = span.complete || span.leads;
    plan->items.push_back(item);
    plan->item_first.push_back(static_cast<int32_t>(span.begin));
  }
}

}  // namespace

std::string make_plan(const Call& call, const Tables& tables, int threads, Plan* plan) {
  std::vector<bool> taken(call.rows);
  std::string error = check(call, tables, &taken);
  if (!error.empty()) return error;
  for (int64_t row = 0; row < call.rows; ++row)
    if (!taken[row]) plan->lone_rows.push_back(static_cast<int32_t>(row));

  std::vector<Span> spans = cut(call, Sharing(call, tables, plan).spans, threads);
  place_partials(&spans, plan);
  std::vector<size_t> order(spans.size());
  std::iota(order.begin(), order.end(), 0);
  // Those that compute come first, and the longest of each kind.
  auto key = [&](size_t i) {
    const int64_t cost = cost_of(call, spans[i]);
    return std::make_pair(cost == 1, -(spans[i].end - spans[i].first) * cost);
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
  for (size_t i : order) add_items(call, tables, spans[i], plan);
  return "";
}

}  // namespace hetero_jax
