// The backward's launcher: which way (see backward_kernels.h), and how it is split over threads.
//
// Memory traffic: reads the ids, the weights and the gradient, the latter once if few rows are in
// use, else once for each of a token's entries, of which neighbours mostly find it in the cache.
// Writes the table's gradient once.
//
// Workspace: for each entry 4 bytes, or 8 to 12 where many rows are in use; for each row of the
// table 4 or 8; the sums, at most one float32 or float64 for each element of a row in use.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "capability.h"

namespace embedding_lookup {
namespace {

// A block of columns' sums should fit this: half of a small level 2 cache.
constexpr int64_t kCacheBytes = int64_t{512} << 10;

// Entries of a row, on average, from which on it pays to keep its sums.
constexpr int64_t kLongRun = 16;

// A gradient of this size has no place in the caches that hold the sums: it is written past them.
constexpr int64_t kStreamTableBytes = int64_t{8} << 20;

// The least columns in a block: 128 bytes of a 16-bit gradient.
constexpr int64_t kMinWidth = 64;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Tensor workspace(int64_t count, ScalarType dtype, torch::stable::Device device) {
  return allocate("the backward's workspace", {count}, dtype, device);
}

// Writes the row that each entry reads (kNoRow: none) to `row_of_entry` [num_tokens * K] and how
// many entries read each row to `counts` [total_rows].
void find_rows(const Lookup& lookup, int32_t* row_of_entry, int64_t* counts) {
  std::fill_n(counts, lookup.total_rows(), 0);
  for (int64_t token = 0; token < lookup.num_tokens; ++token) {
    const TokenOffsets offsets = token_offsets(lookup, token);
    const bool padding = is_padding(lookup, offsets);
    for (int64_t k = 0; k < lookup.num_entries; ++k) {
      int64_t row = resolve_row(lookup, offsets, k, padding);
      if (row == kIdTooLarge) throw_id_too_large(lookup, token * lookup.num_entries + k);
      if (row != kNoRow) {
        row += k * lookup.rows_per_entry;
        ++counts[row];
      }
      *row_of_entry++ = static_cast<int32_t>(row);
    }
  }
}

// Each task owns a block of columns and adds every token's gradient to the sums of the rows in use
// that the token reads. Then all threads share out the rows of the result.
void accumulate_columns(const Lookup& lookup, torch::stable::Device device, int32_t* row_of_entry,
                        const int64_t* counts, int64_t num_used, int64_t width, bool stream) {
  const int64_t total_rows = lookup.total_rows();
  Tensor sum_of_row_tensor = workspace(total_rows, ScalarType::Int, device);
  auto* sum_of_row = static_cast<int32_t*>(sum_of_row_tensor.mutable_data_ptr());
  int32_t num_sums = 0;
  for (int64_t row = 0; row < total_rows; ++row) {
    sum_of_row[row] = counts[row] > 0 ? num_sums++ : -1;
  }
  const int64_t num_all_entries = lookup.num_tokens * lookup.num_entries;
  for (int64_t entry = 0; entry < num_all_entries; ++entry) {
    if (row_of_entry[entry] >= 0) row_of_entry[entry] = sum_of_row[row_of_entry[entry]];
  }
  const int32_t* sum_of_entry = row_of_entry;

  const int64_t columns = lookup.num_columns;
  const int64_t blocks = (columns + width - 1) / width;
  const int64_t block_bytes = num_used * width * sum_size(lookup.table.dtype);
  Tensor sums_tensor = workspace(blocks * block_bytes, ScalarType::Byte, device);
  auto* sums = static_cast<char*>(sums_tensor.mutable_data_ptr());
  advise_huge_pages(sums, blocks * block_bytes);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      char* block_sums = sums + block * block_bytes;
      kernels().clear(block_sums, block_bytes, false);
      kernels().accumulate(lookup, sum_of_entry, block * width,
                           std::min(width, columns - block * width), block_sums);
    }
  });

  const int64_t element = element_size(lookup.table.dtype);
  auto* grad_table = lookup.table.data<char>();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / columns);
  torch::stable::parallel_for(0, total_rows, grain, [&](int64_t begin, int64_t end) {
    if (total_rows * columns * element >= kFreshBytes)
      populate(grad_table + begin * columns * element, (end - begin) * columns * element);
    for (int64_t row = begin; row < end; ++row) {
      char* out = grad_table + row * columns * element;
      if (sum_of_row[row] < 0) {
        const int64_t first = row;
        while (row + 1 < end && sum_of_row[row + 1] < 0) ++row;
        kernels().clear(out, (row + 1 - first) * columns * element, stream);
        continue;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t column = block * width;
        const int64_t count = std::min(width, columns - column);
        const char* row_sums =
            sums + block * block_bytes + sum_of_row[row] * count * sum_size(lookup.table.dtype);
        kernels().store(lookup, row_sums, count, out + column * element);
      }
    }
  });
}

// Regions of about as much work, in the order of the rows. A row that is more than one of them is
// split by its columns.
std::vector<Region> share_out(const Lookup& lookup, const int64_t* begin_of_row) {
  const int64_t total_rows = lookup.total_rows();
  const int64_t columns = lookup.num_columns;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t work = total_rows + begin_of_row[total_rows];
  const int64_t share =
      std::max((work + threads - 1) / threads, std::max<int64_t>(1, kGrainElements / columns));
  std::vector<Region> regions;
  int64_t begin = 0;
  int64_t taken = 0;
  for (int64_t row = 0; row < total_rows; ++row) {
    const int64_t cost = 1 + begin_of_row[row + 1] - begin_of_row[row];
    if (cost > share / 2 && threads > 1) {
      if (begin < row) regions.push_back({begin, row, 0, columns});
      const int64_t width = round_up((columns + threads - 1) / threads, kMinWidth);
      for (int64_t column = 0; column < columns; column += width) {
        regions.push_back({row, row + 1, column, std::min(column + width, columns)});
      }
      begin = row + 1;
      taken = 0;
    } else if ((taken += cost) >= share) {
      regions.push_back({begin, row + 1, 0, columns});
      begin = row + 1;
      taken = 0;
    }
  }
  if (begin < total_rows) regions.push_back({begin, total_rows, 0, columns});
  return regions;
}

// Sorts the entries by row, stably, and gives each thread rows of about as many entries.
void gather_rows(const Lookup& lookup, torch::stable::Device device, const int32_t* row_of_entry,
                 int64_t* counts, bool stream) {
  const int64_t total_rows = lookup.total_rows();
  int64_t num_sorted = 0;
  for (int64_t row = 0; row < total_rows; ++row) {
    num_sorted += std::exchange(counts[row], num_sorted);
  }
  Tensor offsets_tensor = workspace(num_sorted, ScalarType::Long, device);
  Tensor weights_tensor =
      workspace(lookup.weights.present() ? num_sorted : 0, ScalarType::Float, device);
  auto* offsets = static_cast<int64_t*>(offsets_tensor.mutable_data_ptr());
  auto* weights = static_cast<float*>(weights_tensor.mutable_data_ptr());
  for (int64_t token = 0; token < lookup.num_tokens; ++token) {
    const TokenOffsets token_offset = token_offsets(lookup, token);
    for (int64_t k = 0; k < lookup.num_entries; ++k) {
      const int64_t row = *row_of_entry++;
      if (row < 0) continue;
      const int64_t entry = counts[row]++;
      offsets[entry] = token_offset.activation;
      if (lookup.weights.present()) weights[entry] = read_weight(lookup, token_offset, k);
    }
  }
  // Each count has become where the row's entries end, so the next one's begin.
  std::copy_backward(counts, counts + total_rows, counts + total_rows + 1);
  counts[0] = 0;
  const SortedEntries entries = {counts, offsets, weights};
  const std::vector<Region> regions = share_out(lookup, counts);
  auto* grad_table = lookup.table.data<char>();
  const int64_t row_bytes = lookup.num_columns * element_size(lookup.table.dtype);
  torch::stable::parallel_for(0, regions.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Region& region = regions[i];
      if (total_rows * row_bytes >= kFreshBytes &&
          region.end_column - region.column == lookup.num_columns) {
        populate(grad_table + region.row * row_bytes, (region.end_row - region.row) * row_bytes);
      }
      kernels().gather(lookup, entries, region, stream);
    }
  });
}

}  // namespace

void launch_backward(const Lookup& lookup, torch::stable::Device device) {
  const int64_t columns = lookup.num_columns;
  const int64_t total_rows = lookup.total_rows();
  check(total_rows <= std::numeric_limits<int32_t>::max(), "table must have at most ",
        std::numeric_limits<int32_t>::max(), " rows for the backward on the CPU, got ", total_rows);
  const int64_t row_bytes = columns * element_size(lookup.table.dtype);
  auto* grad_table = lookup.table.data<char>();
  advise_huge_pages(grad_table, total_rows * row_bytes);
  const bool stream = total_rows * row_bytes >= kStreamTableBytes && row_bytes % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(grad_table) % 64 == 0;
  if (lookup.num_tokens == 0) {
    kernels().clear(grad_table, total_rows * row_bytes, stream);
    return;
  }

  Tensor rows_tensor = workspace(lookup.num_tokens * lookup.num_entries, ScalarType::Int, device);
  Tensor counts_tensor = workspace(total_rows + 1, ScalarType::Long, device);
  auto* row_of_entry = static_cast<int32_t*>(rows_tensor.mutable_data_ptr());
  auto* counts = static_cast<int64_t*>(counts_tensor.mutable_data_ptr());
  find_rows(lookup, row_of_entry, counts);
  const int64_t num_used = total_rows - std::count(counts, counts + total_rows, 0);

  // Few rows in use, each by many entries: then the sums stay in the cache, in blocks of columns as
  // wide as the threads' shares of them, or narrower.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t sums_of_column = std::max<int64_t>(num_used, 1) * sum_size(lookup.table.dtype);
  const int64_t width_by_cache = kCacheBytes / sums_of_column;
  const bool long_runs = num_used * kLongRun <= lookup.num_tokens * lookup.num_entries;
  if (long_runs && width_by_cache >= kMinWidth) {
    const int64_t width = std::min(
        columns, round_up(std::min((columns + threads - 1) / threads, width_by_cache), kMinWidth));
    accumulate_columns(lookup, device, row_of_entry, counts, num_used, width, stream);
  } else {
    gather_rows(lookup, device, row_of_entry, counts, stream);
  }
}

}  // namespace embedding_lookup
