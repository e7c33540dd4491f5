// SPDX-License-Identifier: Apache-2.0
// The linear layers between which tokens are cut, on CUDA tensors: a chunk of rows of every rank is
// multiplied while another chunk is on its way. Where a rank's rows are not one run of memory (a
// batch before the tokens) the collective and the product follow each other.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cuda_linear.h"

namespace tp_native::ops {
namespace {

using comm::OpCode;
using comm::Signature;
using kernels::GemmEpilogue;

/// A chunk's step of the collective `whole`, which is cut by other sizes too.
Signature step_of(const Signature& whole, std::span<const int64_t> shape,
                  at::IntArrayRef token_sizes) {
  Signature part = whole;
  part.shape = shape;
  part.sizes = span_of(token_sizes);
  part.whole = &whole;
  return part;
}

char* at_row(const Tensor& t, int64_t row) {
  return static_cast<char*>(t.mutable_data_ptr()) + row * t.size(-1) * t.element_size();
}

/// The rows of each piece of a chunk, piece by piece where they do not touch.
void multiply_pieces(const Linear& linear, const overlap::Chunk& chunk, const Tensor& out,
                     int64_t packed_at, bool is_packed, cuda::StreamHandle on) {
  for (const overlap::Batch& batch : overlap::batches(chunk)) {
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t row = batch.row + i * batch.row_stride;
      const int64_t to = is_packed ? packed_at + batch.packed_row + i * batch.rows : row;
      linear.run(out, to, row, batch.rows, on);
    }
  }
}

Tensor row_parallel_linear_scatter(const Tensor& x, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor&, Sizes in_symbolic,
                                   Sizes token_symbolic, int64_t dim, int64_t rank,
                                   std::string_view group) {
  constexpr const char* kOp = "row_parallel_linear_scatter";
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef in_sizes = C10_AS_INTARRAYREF_SLOW(in_symbolic);
  const at::IntArrayRef token_sizes = C10_AS_INTARRAYREF_SLOW(token_symbolic);
  const Partial p = check_row_parallel(kOp, x, weight, bias, in_sizes, self);
  const TokenCut cut = check_tokens(kOp, x, dim, token_sizes, false, rank, self);
  const Placed placed(kOp, x, self);
  const Tensor by_token = x.movedim(cut.dim, 0);  // copies where a batch comes before the tokens
  std::vector<int64_t> shape = by_token.sizes().vec();
  shape.back() = p.columns;
  shape[0] = cut.local_tokens;
  const Tensor out = at::empty(shape, x.options());
  const Linear linear(by_token.reshape({p.rows, x.size(-1)}), weight, Tensor(),
                      GemmEpilogue::kNone);
  const std::vector<int64_t> rows = cut.rows(token_sizes);
  const Signature whole{.op = OpCode::kRowParallelLinearScatter,
                        .dtype = dtype_of(x),
                        .dim = static_cast<int>(cut.dim),
                        .shape = p.shape,
                        .sizes = span_of(in_sizes)};
  Gpu& gpu = gpu_of(x.device().index());
  const auto schedule =
      schedule_of(gpu, overlap::Pattern::kGemmReduceScatter, p.rows, p.columns,
                  *std::ranges::max_element(in_sizes), whole.dtype, self.size, rows, 0);
  const Tensor packed = at::empty({schedule->slots * schedule->slot_rows, p.columns}, x.options());
  const Tensor flat_out = out.view({-1, p.columns});
  const auto slot_row = [&](const overlap::Chunk& chunk) {
    return chunk.slot * schedule->slot_rows;
  };
  gpu.pipeline.run(
      *schedule, handle_of(placed),
      {.gemm =
           [&](const overlap::Chunk& chunk, cuda::StreamHandle on) {
             multiply_pieces(linear, chunk, packed, slot_row(chunk), true, on);
           },
       .communicate =
           [&](const overlap::Chunk& chunk, cuda::StreamHandle on) {
             const int64_t part_shape[] = {chunk.rows, p.columns};
             communicator->reduce_scatter(
                 step_of(whole, part_shape, token_sizes), at_row(packed, slot_row(chunk)),
                 at_row(flat_out, chunk.pieces[static_cast<size_t>(self.rank)].local_row),
                 overlap::counts(chunk, p.columns), {on});
           }});
  if (bias) out.add_(*bias);
  return out.movedim(0, cut.dim).contiguous();
}

std::tuple<Tensor, Tensor> gathered_column_parallel_linear(const Tensor& x, const Tensor& weight,
                                                           const OptionalTensor& bias,
                                                           const Tensor&, Sizes out_symbolic,
                                                           Sizes token_symbolic, int64_t dim,
                                                           int64_t rank, std::string_view group) {
  constexpr const char* kOp = "gathered_column_parallel_linear";
  const auto communicator = comm::find_communicator(group);
  const comm::Identity& self = communicator->identity();
  const at::IntArrayRef out_sizes = C10_AS_INTARRAYREF_SLOW(out_symbolic);
  const at::IntArrayRef token_sizes = C10_AS_INTARRAYREF_SLOW(token_symbolic);
  check_column_parallel(kOp, x, weight, bias, out_sizes, self);
  const TokenCut cut = check_tokens(kOp, x, dim, token_sizes, true, rank, self);
  const Placed placed(kOp, x, self);
  const Tensor in = x.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape[cut.dim] = cut.tokens;
  const Tensor gathered = at::empty(shape, x.options());
  shape.back() = weight.size(0);
  const Tensor out = at::empty(shape, x.options());
  const int64_t width = x.size(-1);
  const int64_t all_rows = cut.outer * cut.tokens * cut.inner;
  const Linear linear(flat(gathered), weight, bias ? bias->contiguous() : Tensor(),
                      bias ? GemmEpilogue::kBias : GemmEpilogue::kNone);
  const Signature whole{.op = OpCode::kGatheredColumnParallelLinear,
                        .dtype = dtype_of(x),
                        .dim = static_cast<int>(cut.dim),
                        .shape = span_of(gathered.sizes()),
                        .sizes = span_of(out_sizes)};
  if (cut.outer != 1) {
    std::vector<int64_t> widths;
    for (const int64_t n : token_sizes) widths.push_back(n * cut.inner * width);
    communicator->all_gather(step_of(whole, whole.shape, token_sizes), in.const_data_ptr(),
                             gathered.mutable_data_ptr(), cut.outer, widths, placed);
    linear.run(out, 0, all_rows, handle_of(placed));
    return {out, gathered};
  }
  Gpu& gpu = gpu_of(x.device().index());
  const auto schedule = schedule_of(gpu, overlap::Pattern::kAllGatherGemm, all_rows,
                                    *std::ranges::max_element(out_sizes), width, whole.dtype,
                                    self.size, cut.rows(token_sizes), 0);
  const bool is_whole = schedule->chunks.size() == 1;  // then its buffer would be `gathered`
  const Tensor packed =
      at::empty({is_whole ? 0 : schedule->slots * schedule->slot_rows, width}, x.options());
  const Tensor flat_in = in.view({-1, width});
  const Tensor flat_gathered = gathered.view({-1, width});
  const auto row_bytes = width * x.element_size();
  gpu.pipeline.run(
      *schedule, handle_of(placed),
      {.gemm = [&](const overlap::Chunk& chunk,
                   cuda::StreamHandle on) { multiply_pieces(linear, chunk, out, 0, false, on); },
       .communicate =
           [&](const overlap::Chunk& chunk, cuda::StreamHandle on) {
             const int64_t part_shape[] = {chunk.rows, width};
             char* const to = is_whole ? at_row(flat_gathered, 0)
                                       : at_row(packed, chunk.slot * schedule->slot_rows);
             communicator->all_gather(
                 step_of(whole, part_shape, token_sizes),
                 at_row(flat_in, chunk.pieces[static_cast<size_t>(self.rank)].local_row), to, 1,
                 overlap::counts(chunk, width), {on});
             for (const overlap::Piece& piece : chunk.pieces) {
               if (is_whole || piece.rows == 0) continue;
               cuda::copy(at_row(flat_gathered, piece.row), to + piece.packed_row * row_bytes,
                          piece.rows * row_bytes, on);
             }
           }});
  return {out, gathered};
}

TORCH_LIBRARY_IMPL(tp_native, CUDA, m) {
  m.impl("row_parallel_linear_scatter", &row_parallel_linear_scatter);
  m.impl("gathered_column_parallel_linear", &gathered_column_parallel_linear);
}

}  // namespace
}  // namespace tp_native::ops
