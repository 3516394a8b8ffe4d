#include "schedule.h"

#include <algorithm>
#include <stdexcept>

namespace gossamer {
namespace {

constexpr std::ptrdiff_t kNone = -1, kPart = -2;

// The output whose row is exactly `row`, kPart where it overlaps one in part, or kNone.
std::ptrdiff_t output_at(const Rows& out, std::uintptr_t row, std::size_t row_bytes) {
  if (out.count == 0) return kNone;
  const std::uintptr_t end = out.row(out.count - 1) + row_bytes;
  if (row + row_bytes <= out.address || row >= end) return kNone;
  const std::size_t stride = out.count > 1 ? out.stride_bytes : row_bytes;
  const auto offset = static_cast<std::ptrdiff_t>(row - out.address);
  // The row at or before `row`, and the one after it, are all that can overlap it.
  const std::ptrdiff_t before = offset < 0 ? -1 : static_cast<std::ptrdiff_t>(offset / stride);
  for (std::ptrdiff_t r = before; r <= before + 1; ++r) {
    if (r < 0 || r >= static_cast<std::ptrdiff_t>(out.count)) continue;
    const auto apart = offset - r * static_cast<std::ptrdiff_t>(stride);
    if (apart == 0) return r;
    if (std::abs(apart) < static_cast<std::ptrdiff_t>(row_bytes)) return kPart;
  }
  return kNone;
}

}  // namespace

Overlap overlap_of(const Rows& sources, const Rows& out, std::size_t row_bytes) {
  Overlap found = Overlap::kNone;
  if (!overlap(sources, row_bytes, out)) return found;
  for (std::size_t r = 0; r < sources.count; ++r) {
    const std::ptrdiff_t output = output_at(out, sources.row(r), row_bytes);
    if (output == kPart) return Overlap::kPart;
    if (output != kNone) found = Overlap::kWhole;
  }
  return found;
}

void check_outputs(const Rows& out, std::size_t row_bytes) {
  if (out.count > 1 && out.stride_bytes < row_bytes) {
    throw std::invalid_argument("output rows overlap each other");
  }
}

Schedule::Schedule(const WeightedSum& job) {
  const std::size_t num_out = job.out.count, row_bytes = job.d * size_bytes(job.dtype);
  check_outputs(job.out, row_bytes);
  std::vector<std::uintptr_t> table;
  for (const Rows& block : job.blocks) {
    for (std::size_t r = 0; r < block.count; ++r) table.push_back(block.row(r));
  }
  const std::size_t num_sources = table.size();
  if (job.addend) {
    for (std::size_t r = 0; r < num_out; ++r) table.push_back(job.addend->row(r));
  }
  std::vector<std::ptrdiff_t> output_of(table.size());
  for (std::size_t q = 0; q < table.size(); ++q) {
    output_of[q] = output_at(job.out, table[q], row_bytes);
    if (output_of[q] == kPart) {
      throw std::invalid_argument("an output row overlaps a source row in part");
    }
    in_place |= output_of[q] != kNone;
  }

  // first_use and last_use of each row of the table; held_until of each output: the last output
  // that reads the row it overwrites.
  std::vector<std::size_t> first_use(table.size(), num_out), last_use(table.size(), 0);
  std::vector<std::size_t> held_until(num_out);
  for (std::size_t r = 0; r < num_out; ++r) held_until[r] = r;
  terms.reserve(job.columns.size() + (job.addend ? num_out : 0));
  outputs.resize(num_out);
  const auto add_term = [&](std::size_t q, double weight, std::size_t r) {
    terms.push_back({table[q], weight});
    first_use[q] = std::min(first_use[q], r);
    last_use[q] = r;
    if (output_of[q] != kNone) held_until[output_of[q]] = std::max(held_until[output_of[q]], r);
  };
  for (std::size_t r = 0; r < num_out; ++r) {
    outputs[r].row = job.out.row(r);
    outputs[r].first_term = terms.size();
    for (std::int64_t t = job.indptr[r]; t < job.indptr[r + 1]; ++t) {
      const auto q = static_cast<std::size_t>(job.columns[t]);  // a negative one becomes huge
      if (q >= num_sources) throw std::invalid_argument("a term names a row outside the table");
      add_term(q, job.weights[t], r);
    }
    if (job.addend) add_term(num_sources + r, job.a, r);
    outputs[r].last_term = terms.size();
  }

  // Outputs by the one after which they are stored: a counting sort.
  std::vector<std::size_t> store_end(num_out + 1, 0);
  const auto waits = [&](std::size_t r) { return held_until[r] > r; };
  for (std::size_t r = 0; r < num_out; ++r) {
    if (waits(r)) ++store_end[held_until[r] + 1];
  }
  for (std::size_t r = 0; r < num_out; ++r) {
    store_end[r + 1] += store_end[r];
    outputs[r].first_store = outputs[r].last_store = store_end[r];
  }
  stores.resize(store_end[num_out]);
  for (std::size_t r = 0; r < num_out; ++r) {
    if (waits(r)) stores[outputs[held_until[r]].last_store++] = r;
  }

  std::vector<std::ptrdiff_t> live(num_out + 1, 0);
  for (std::size_t q = 0; q < table.size(); ++q) {
    if (first_use[q] == num_out) continue;
    ++live[first_use[q]];
    --live[last_use[q] + 1];
  }
  std::vector<std::ptrdiff_t> free_slots;
  std::size_t rows_live = 0;
  for (std::size_t r = 0; r < num_out; ++r) {
    rows_live += live[r];
    if (waits(r)) {
      if (free_slots.empty()) free_slots.push_back(static_cast<std::ptrdiff_t>(num_slots++));
      outputs[r].slot = free_slots.back();
      free_slots.pop_back();
    }
    max_live = std::max(max_live, rows_live + num_slots - free_slots.size());
    for (std::size_t s = outputs[r].first_store; s < outputs[r].last_store; ++s) {
      free_slots.push_back(outputs[stores[s]].slot);
    }
  }
}

}  // namespace gossamer
