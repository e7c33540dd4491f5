// SPDX-License-Identifier: Apache-2.0
// Every schema, written by hand. `order` is a one-element tensor of the group that every
// communicating op claims to write: compilers then keep collectives, and keep them in the same
// order on ranks whose shards differ (DESIGN.md 7). `sizes` is the partition of all ranks, so that
// shapes follow without looking the group up, and `rank` this process's place in it wherever the
// result's shape or the backward depends on it: compiled graphs are cached by what they call, in a
// folder that all ranks share.
#include <torch/library.h>

TORCH_LIBRARY(tp_native, m) {
  m.def("all_reduce_(Tensor(a!) t, Tensor(b!) order, str op, str group) -> ()");
  m.def("broadcast_(Tensor(a!) t, Tensor(b!) order, int src, str group) -> ()");
  m.def("all_reduce(Tensor t, Tensor(a!) order, str op, str group) -> Tensor");
  m.def("copy_to_ranks(Tensor t, Tensor order, str group) -> Tensor");
  m.def(
      "scatter_to_ranks(Tensor t, Tensor order, SymInt[] sizes, int dim, int rank, str group) -> "
      "Tensor");
  m.def("broadcast(Tensor t, Tensor(a!) order, int src, int rank, str group) -> Tensor");
  m.def(
      "all_gather(Tensor t, Tensor(a!) order, SymInt[] sizes, int dim, str grad, int rank, str "
      "group) -> Tensor");
  m.def(
      "reduce_scatter(Tensor t, Tensor(a!) order, SymInt[] sizes, int dim, str op, int rank, str "
      "group) -> Tensor");
  m.def(
      "gather_into(Tensor t, Tensor(a!) order, Tensor(b!) out, SymInt[] sizes, int dst, str group) "
      "-> ()");
  m.def(
      "scatter_into(Tensor t, Tensor(a!) order, Tensor(b!) out, SymInt[] sizes, int src, str "
      "group) -> ()");
  m.def(
      "row_parallel_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) order, SymInt[] "
      "sizes, str group) -> Tensor");
  m.def(
      "row_parallel_linear_add_rms_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, "
      "Tensor norm_weight, float eps, Tensor(a!) order, SymInt[] sizes, str group) -> (Tensor "
      "normed, Tensor hidden)");
  m.def(
      "column_parallel_linear(Tensor x, Tensor weight, Tensor? bias, Tensor order, SymInt[] sizes, "
      "str group) -> Tensor");
  m.def(
      "column_parallel_linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor "
      "order, SymInt[] sizes, str group) -> Tensor");
  m.def(
      "column_parallel_linear_backward(Tensor grad, Tensor x, Tensor weight, bool has_bias, "
      "Tensor(a!) order, SymInt[] sizes, str group) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "row_parallel_linear_scatter(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) order, "
      "SymInt[] "
      "in_sizes, SymInt[] token_sizes, int dim, int rank, str group) -> Tensor");
  m.def(
      "gathered_column_parallel_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) order, "
      "SymInt[] out_sizes, SymInt[] token_sizes, int dim, int rank, str group) -> (Tensor y, "
      "Tensor "
      "gathered)");
  m.def(
      "tune_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? grad, str kind, SymInt[] sizes, "
      "int candidates, str group) -> (Tensor choices, Tensor us)");
  m.def(
      "import_linear_choices(Tensor x, Tensor weight, Tensor? bias, Tensor? grad, str kind, "
      "SymInt[] sizes, Tensor choices, str group) -> ()");
  m.def("glu(Tensor gate_up, str activation) -> Tensor");
  m.def("glu_backward(Tensor grad, Tensor gate_up, str activation) -> Tensor");
  m.def(
      "vocab_parallel_embedding(Tensor ids, Tensor weight, Tensor(a!) order, SymInt[] sizes, int "
      "padding_idx, int rank, str group) -> Tensor");
  m.def(
      "vocab_parallel_cross_entropy(Tensor logits, Tensor target, Tensor(a!) order, SymInt[] "
      "sizes, "
      "int? vocab_size, int ignore_index, float label_smoothing, int rank, str group) -> (Tensor "
      "loss, Tensor statistics, Tensor place)");
  m.def(
      "vocab_parallel_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor "
      "statistics, Tensor place, int ignore_index, float label_smoothing) -> Tensor");
  m.def("empty_shared(Tensor(a!) order, SymInt[] shape, ScalarType dtype, str group) -> Tensor");
}
