// SPDX-License-Identifier: Apache-2.0
// Peers' all-reduce as torch ops that TorchScript can call: MPI's, and vLLM's, whose own schema it
// refuses. Needs no MPI headers: the library is opened at run time, and the handles of its two ABIs
// are written here. Built by install_peers.sh; part of no library.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <string>

namespace {

int (*mpi_finalize)() = nullptr;

/// MPI_Allreduce in the ABI whose handles are of type `Handle`.
template <class Handle>
struct AllReduce {
  int (*call)(const void*, void*, int, Handle, Handle, Handle) = nullptr;
  void* in_place = nullptr;
  Handle float32{};
  Handle bfloat16{};  ///< 0: it has none
  Handle sum{};
  Handle world{};

  void operator()(const at::Tensor& t) const {
    const Handle type = t.scalar_type() == at::kFloat ? float32 : bfloat16;
    TORCH_CHECK(t.scalar_type() == at::kFloat || (t.scalar_type() == at::kBFloat16 && type),
                "MPI has no type for ", t.scalar_type());
    const int error = call(in_place, t.data_ptr(), static_cast<int>(t.numel()), type, sum, world);
    TORCH_CHECK(error == 0, "MPI_Allreduce returned ", error);
  }
};

AllReduce<int> mpich;       // Intel MPI too: handles are numbers
AllReduce<void*> open_mpi;  // handles are addresses of the library's variables

template <class Result>
Result symbol(void* library, const char* name) {
  void* const found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, "MPI library without ", name);
  return reinterpret_cast<Result>(found);
}

void mpi_join(const std::string& path) {
  // global: Open MPI's plugins look for the library's symbols
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  TORCH_CHECK(library != nullptr, dlerror());
  if (dlsym(library, "ompi_mpi_comm_world")) {
    open_mpi = {symbol<decltype(open_mpi.call)>(library, "MPI_Allreduce"),
                reinterpret_cast<void*>(1),
                symbol<void*>(library, "ompi_mpi_float"),
                nullptr,
                symbol<void*>(library, "ompi_mpi_op_sum"),
                symbol<void*>(library, "ompi_mpi_comm_world")};
  } else {
    mpich = {symbol<decltype(mpich.call)>(library, "MPI_Allreduce"),
             reinterpret_cast<void*>(-1),
             0x4c00040a,
             0x4c000247,
             0x58000003,
             0x44000000};  // bfloat16: Intel's extension
  }
  const int error = symbol<int (*)(int*, char***)>(library, "MPI_Init")(nullptr, nullptr);
  TORCH_CHECK(error == 0, "MPI_Init returned ", error);
  mpi_finalize = symbol<int (*)()>(library, "MPI_Finalize");
}

void mpi_all_reduce_(const at::Tensor& t) {
  TORCH_CHECK(t.is_contiguous(), "contiguous tensors only");
  mpich.call ? mpich(t) : open_mpi(t);
}

void mpi_leave() {
  if (mpi_finalize) mpi_finalize();
}

void vllm_all_reduce_(at::Tensor& t, int64_t handle) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("_C::shm_allreduce", "")
                             .typed<void(int64_t, at::Tensor&)>();
  op.call(handle, t);
}

}  // namespace

TORCH_LIBRARY(tpn_bench, m) {
  m.def("mpi_join(str path) -> ()", &mpi_join);
  m.def("mpi_all_reduce_(Tensor(a!) t) -> ()");
  m.def("mpi_leave() -> ()", &mpi_leave);
  m.def("vllm_all_reduce_(Tensor(a!) t, int handle) -> ()");
}

TORCH_LIBRARY_IMPL(tpn_bench, CPU, m) {
  m.impl("mpi_all_reduce_", &mpi_all_reduce_);
  m.impl("vllm_all_reduce_", &vllm_all_reduce_);
}
