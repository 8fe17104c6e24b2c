// From the tables of a call to work items.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "call.h"

namespace hetero_jax {

// The tables of a call, as they come: nothing in them is trusted.
struct Tables {
  const int32_t *page_table, *first_row, *num_rows, *context;
  int64_t sequences, pages_per_sequence;
};

struct Plan {
  std::vector<QueryRow> rows;        // of every sequence, one after the other
  std::vector<Item> items;           // first those that compute (prefill), then those that stream (decode)
  std::vector<int32_t> lone_rows;    // rows that no item is for, as of no sequence: their output is 0
  std::vector<int32_t> item_first;   // [items] index of the item's first row in `rows`
  std::vector<int32_t> pending;      // [rows] items that each head of a row waits for; 0 where one item does all
  int64_t partials = 0;              // (row, tile) places for partials
};

// Fills `plan`, or returns what does not fit.
std::string make_plan(const Call& call, const Tables& tables, int threads, Plan* plan);

}  // namespace hetero_jax
