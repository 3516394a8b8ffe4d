// Metropolis-Hastings chains that move through the columns of a batch (EMC^2, arXiv:2404.10575):
// each row proposes its columns in order, one test per column that is not the row's own example.
// With E = -log U the test log U < score - state's score is score + E > state's score, one rounded
// float sum and a comparison, so that every form of the scan takes the same moves, on every
// instruction set and on the GPU. NaN passes no test.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gossamer {

// What the second row of an example starts from: its own held state, or the state that the first
// row ended with and its score as it is (stale) or in the second row (fresh).
enum class Carry : int { kNone = 0, kStale = 1, kFresh = 2 };

struct ColumnRange {
  std::size_t begin, end;
};

// Example i has the rows i and examples + i; columns k and k + columns / 2 show one example. The
// pointers are to (2 examples,) where nothing else is said; outputs overlap nothing.
struct ChainMoves {
  std::size_t examples, columns;
  const float* scores;  // (2 examples, columns), the next row `score_stride` elements further
  std::size_t score_stride;
  const float* exponentials;  // likewise
  std::size_t exponential_stride;
  const std::int64_t* row_ids;     // (examples,)
  const std::int64_t* column_ids;  // (columns / 2,)
  ColumnRange scanned[2];          // by the rows below and from `examples`
  const float* held_scores;        // of the state from an earlier visit; -inf: there is none
  const std::int32_t* burn_in;     // tests after which no state is recorded
  Carry carry;

  std::int32_t* counts;    // (2 examples, columns), zeros: records of each column as the state
  std::int32_t* held;      // records of the state from an earlier visit
  std::int64_t* state;     // column of the state after the row; -1: the one before, or none
  float* score;            // of that state
  std::int32_t* accepted;  // moves
  std::int32_t* proposed;  // tests
};

// The bits do not depend on the number of threads, which is smaller for small work.
void chain_moves(const ChainMoves& job, std::size_t num_threads);

// The same in device memory, queued on `cuda_stream` (a cudaStream_t) of the current device. Throws
// std::runtime_error where the build has no CUDA kernels or the driver fails.
void chain_moves_cuda(const ChainMoves& job, void* cuda_stream);

}  // namespace gossamer
