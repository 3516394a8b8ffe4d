#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "philox.h"
#include "philox_cuda.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::Dtype;

// (address, elements, begin in the stream, c1)
using PieceTuple = std::tuple<std::uintptr_t, std::size_t, std::uint64_t, std::uint32_t>;
// (key, c2, c3)
using StreamTuple = std::tuple<std::uint64_t, std::uint32_t, std::uint32_t>;
// (c2, c3, words below this are dropped)
using MaskTuple = std::tuple<std::uint32_t, std::uint32_t, std::uint64_t>;
using DirectionTuple = std::tuple<int, StreamTuple, std::optional<MaskTuple>>;
using TermTuple = std::tuple<DirectionTuple, double>;
// (address, coefficient)
using KeptTuple = std::tuple<std::uintptr_t, double>;

std::vector<gossamer::Piece> to_pieces(const std::vector<PieceTuple>& tuples) {
  std::vector<gossamer::Piece> pieces;
  for (const auto& [address, n, begin, c1] : tuples) pieces.push_back({address, n, begin, c1});
  return pieces;
}

gossamer::Direction to_direction(const DirectionTuple& tuple) {
  const auto& [distribution, stream, mask] = tuple;
  const auto& [key, c2, c3] = stream;
  gossamer::Direction direction{
      .distribution = static_cast<gossamer::Distribution>(distribution),
      .key = key,
      .c2 = c2,
      .c3 = c3,
  };
  if (mask) std::tie(direction.mask_c2, direction.mask_c3, direction.dropped) = *mask;
  return direction;
}

std::vector<gossamer::ScaledDirection> to_terms(const std::vector<TermTuple>& tuples) {
  std::vector<gossamer::ScaledDirection> terms;
  for (const auto& [direction, coefficient] : tuples) {
    terms.push_back({to_direction(direction), coefficient});
  }
  return terms;
}

std::vector<gossamer::KeptRow> to_kept(const std::vector<KeptTuple>& tuples) {
  std::vector<gossamer::KeptRow> rows;
  for (const auto& [address, coefficient] : tuples) rows.push_back({address, coefficient});
  return rows;
}

}  // namespace

void bind_random(nb::module_& m) {
  m.def("philox4x32", &gossamer::philox4x32, "counter"_a, "key"_a,
        "One Philox4x32-10 block: four 32-bit words.");
  m.def(
      "fill_words",
      [](std::uintptr_t out, std::size_t n, std::uint64_t begin, std::uint64_t key,
         std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
        nb::gil_scoped_release release;
        gossamer::fill_words(pointer<std::uint32_t>(out), n, begin, {key, c1, c2, c3});
      },
      "out"_a, "n"_a, "begin"_a, "key"_a, "c1"_a, "c2"_a, "c3"_a);
  m.def(
      "fill_word_rows",
      [](std::uintptr_t out, std::size_t n, std::uint64_t key,
         const std::vector<std::uint32_t>& ids, std::uint32_t c2, std::uint32_t c3) {
        nb::gil_scoped_release release;
        std::uint32_t* row = pointer<std::uint32_t>(out);
        for (const std::uint32_t id : ids) {
          gossamer::fill_words(row, n, 0, {key, id, c2, c3});
          row += n;
        }
      },
      "out"_a, "n"_a, "key"_a, "ids"_a, "c2"_a, "c3"_a);
  m.def(
      "normals_of_words",
      [](std::uintptr_t words, std::size_t n, std::uintptr_t out) {
        nb::gil_scoped_release release;
        gossamer::normals_of_words(pointer<const std::uint32_t>(words), n, pointer<float>(out));
      },
      "words"_a, "n"_a, "out"_a);
  m.def(
      "fill_random",
      [](const std::vector<PieceTuple>& pieces, int dtype, const DirectionTuple& direction,
         std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::fill_random(to_pieces(pieces), static_cast<Dtype>(dtype), to_direction(direction),
                              num_threads);
      },
      "pieces"_a, "dtype"_a, "direction"_a, "num_threads"_a);
  m.def(
      "add_random",
      [](const std::vector<PieceTuple>& pieces, int dtype, const DirectionTuple& direction,
         double a, std::uintptr_t source, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::add_random(to_pieces(pieces), static_cast<Dtype>(dtype), to_direction(direction),
                             a, source, num_threads);
      },
      "pieces"_a, "dtype"_a, "direction"_a, "a"_a, "source"_a, "num_threads"_a);
  m.def(
      "subtract_random",
      [](const std::vector<PieceTuple>& pieces, int dtype, const std::vector<TermTuple>& terms,
         double decay, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::subtract_random(to_pieces(pieces), static_cast<Dtype>(dtype), to_terms(terms),
                                  decay, num_threads);
      },
      "pieces"_a, "dtype"_a, "terms"_a, "decay"_a, "num_threads"_a);
  m.def(
      "release_sum",
      [](const std::vector<PieceTuple>& pieces, int dtype, std::uintptr_t sum,
         const std::vector<TermTuple>& noise, double factor, double weight,
         const std::vector<KeptTuple>& kept, std::uintptr_t out, std::uintptr_t raw,
         std::uintptr_t x, double scale, std::size_t num_threads) {
        nb::gil_scoped_release release;
        const auto terms = to_terms(noise);
        const auto rows = to_kept(kept);
        gossamer::release_sum(to_pieces(pieces), static_cast<Dtype>(dtype),
                              {sum, terms, factor, weight, rows, out, raw, x, scale}, num_threads);
      },
      "pieces"_a, "dtype"_a, "sum"_a, "noise"_a, "factor"_a, "weight"_a, "kept"_a, "out"_a, "raw"_a,
      "x"_a, "scale"_a, "num_threads"_a);
  m.def(
      "fill_words_cuda",
      [](std::uintptr_t out, std::size_t n, std::uint64_t begin, std::uint64_t key,
         std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uintptr_t stream) {
        nb::gil_scoped_release release;
        gossamer::fill_words_cuda(pointer<std::uint32_t>(out), n, begin, {key, c1, c2, c3},
                                  pointer<void>(stream));
      },
      "out"_a, "n"_a, "begin"_a, "key"_a, "c1"_a, "c2"_a, "c3"_a, "stream"_a);
  m.def(
      "fill_random_cuda",
      [](const std::vector<PieceTuple>& pieces, int dtype, const DirectionTuple& direction,
         std::uintptr_t stream) {
        nb::gil_scoped_release release;
        gossamer::fill_random_cuda(to_pieces(pieces), static_cast<Dtype>(dtype),
                                   to_direction(direction), pointer<void>(stream));
      },
      "pieces"_a, "dtype"_a, "direction"_a, "stream"_a);
  m.def(
      "add_random_cuda",
      [](const std::vector<PieceTuple>& pieces, int dtype, const DirectionTuple& direction,
         double a, std::uintptr_t source, std::uintptr_t stream) {
        nb::gil_scoped_release release;
        gossamer::add_random_cuda(to_pieces(pieces), static_cast<Dtype>(dtype),
                                  to_direction(direction), a, source, pointer<void>(stream));
      },
      "pieces"_a, "dtype"_a, "direction"_a, "a"_a, "source"_a, "stream"_a);
  m.def(
      "subtract_random_cuda",
      [](const std::vector<PieceTuple>& pieces, int dtype, const std::vector<TermTuple>& terms,
         double decay, std::uintptr_t stream) {
        nb::gil_scoped_release release;
        gossamer::subtract_random_cuda(to_pieces(pieces), static_cast<Dtype>(dtype),
                                       to_terms(terms), decay, pointer<void>(stream));
      },
      "pieces"_a, "dtype"_a, "terms"_a, "decay"_a, "stream"_a);
  m.def(
      "release_sum_cuda",
      [](const std::vector<PieceTuple>& pieces, int dtype, std::uintptr_t sum,
         const std::vector<TermTuple>& noise, double factor, double weight,
         const std::vector<KeptTuple>& kept, std::uintptr_t out, std::uintptr_t raw,
         std::uintptr_t x, double scale, std::uintptr_t stream) {
        nb::gil_scoped_release release;
        const auto terms = to_terms(noise);
        const auto rows = to_kept(kept);
        gossamer::release_sum_cuda(to_pieces(pieces), static_cast<Dtype>(dtype),
                                   {sum, terms, factor, weight, rows, out, raw, x, scale},
                                   pointer<void>(stream));
      },
      "pieces"_a, "dtype"_a, "sum"_a, "noise"_a, "factor"_a, "weight"_a, "kept"_a, "out"_a, "raw"_a,
      "x"_a, "scale"_a, "stream"_a);
}
