// SPDX-License-Identifier: Apache-2.0
// The one Python module: making, watching and ending groups. Tensors pass through torch.ops, not
// through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "comm/backends.h"
#include "comm/registry.h"
#include "comm/socket_board.h"
#include "core/callbacks.h"
#include "core/cuda_driver.h"
#include "core/fault.h"
#include "kernels/cuda.h"
#include "kernels/reduce.h"

namespace py = pybind11;

namespace tp_native {
namespace {

using comm::Communicator;
using comm::Identity;

PyObject* g_make_error = nullptr;  // Python: (kind, message, rank, peer, op, seq, elapsed_s) ->
                                   // exception; never released
PyObject* g_warn = nullptr;

/// A path in it may be no UTF-8.
py::str python_text(const std::string& text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace"));
}

/// Raised as what `make_error` builds. error_already_set crosses torch's dispatcher and its
/// autograd engine intact.
void raise_in_python(const FailureRecord& record) {
  py::gil_scoped_acquire gil;
  const py::object error = py::reinterpret_borrow<py::object>(g_make_error)(
      static_cast<int>(record.kind), python_text(record.message), record.rank, record.peer,
      record.op, record.seq, record.elapsed_s);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

void check_python_signals() {
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  (void)Py_MakePendingCalls();  // warn_later's
}

void warn_in_python(const std::string& message) {
  py::gil_scoped_acquire gil;
  py::reinterpret_borrow<py::object>(g_warn)(python_text(message));
}

/// Python's own queue takes no lock that a thread of the program may hold for long.
void warn_python_later(const std::string& message) {
  auto* const text = new std::string(message);
  const auto call = [](void* argument) {
    const std::unique_ptr<std::string> owned(static_cast<std::string*>(argument));
    try {
      warn_in_python(*owned);
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("tp_native warning");
    }
    return 0;
  };
  if (!Py_IsInitialized() || Py_AddPendingCall(call, text) != 0) delete text;
}

void install(const py::object& make_error, const py::object& warn) {
  g_make_error = make_error.inc_ref().ptr();
  g_warn = warn.inc_ref().ptr();
  install_callbacks({&raise_in_python, &check_python_signals, &warn_in_python, &warn_python_later});
}

py::dict stats_of(const Communicator& communicator) {
  comm::Stats stats;
  {
    const py::gil_scoped_release released;
    stats = communicator.stats();
  }
  py::dict out;
  out["collectives"] = stats.collectives;
  out["bytes"] = stats.bytes;
  out["staged"] = stats.staged;
  out["arena_bytes_in_use"] = stats.arena_bytes_in_use;
  out["arena_bytes_peak"] = stats.arena_bytes_peak;
  out["windows"] = stats.windows;
  out["registered"] = stats.registered;
  out["unregistered"] = stats.unregistered;
  out["late_share"] = stats.late_share;
  return out;
}

std::vector<std::tuple<uint64_t, std::string, std::string, uint64_t>> log_of(
    const Communicator& communicator) {
  std::vector<std::tuple<uint64_t, std::string, std::string, uint64_t>> lines;
  const py::gil_scoped_release released;
  for (const comm::LogEntry& entry : communicator.op_log()) {
    lines.emplace_back(entry.seq, comm::name(entry.op), name(entry.dtype), entry.signature_hash);
  }
  return lines;
}

}  // namespace
}  // namespace tp_native

PYBIND11_MODULE(_C, m) {
  using namespace tp_native;  // NOLINT
  using Released = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Native core of tp_native: groups of ranks. Tensors go through torch.ops.tp_native.";
  m.attr("__version__") = TPN_VERSION;
  m.attr("TORCH_VERSION") = TPN_TORCH_VERSION;
  m.def("install", &install, py::arg("make_error"), py::arg("warn"));
  m.def("is_available", &comm::is_available, py::arg("backend"));
  m.def("reduce_isa", &kernels::reduce_isa);
  m.def("arm_fault", &fault::arm, py::arg("spec"));

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator")
      .def_property_readonly("rank", [](const Communicator& c) { return c.identity().rank; })
      .def_property_readonly("size", [](const Communicator& c) { return c.identity().size; })
      .def_property_readonly("name", [](const Communicator& c) { return c.identity().name; })
      .def_property_readonly("backend", [](const Communicator& c) { return c.identity().backend; })
      .def_property_readonly("generation",
                             [](const Communicator& c) { return c.identity().generation; })
      .def(
          "barrier", [](Communicator& c, double timeout_s) { c.barrier(timeout_s, {}); },
          py::arg("timeout_s"), Released())
      .def("abort", &Communicator::abort, py::arg("reason"), Released())
      .def("check", &Communicator::check, Released())
      .def("close", &Communicator::close, Released())
      .def("stats", &stats_of)
      .def("op_log", &log_of);

  m.def(
      "make_shm",
      [](const std::string& name, const std::string& address, int rank, int size,
         uint64_t generation, double timeout_s, double init_timeout_s, double frozen_timeout_s,
         int launcher_pid, const std::string& flight_folder, const std::string& offer) {
        return comm::make_shm(
            Identity{rank, size, name, "shm", generation, timeout_s, flight_folder},
            {address, init_timeout_s, frozen_timeout_s, launcher_pid, offer});
      },
      py::arg("name"), py::arg("address"), py::arg("rank"), py::arg("size"), py::arg("generation"),
      py::arg("timeout_s"), py::arg("init_timeout_s"), py::arg("frozen_timeout_s"),
      py::arg("launcher_pid"), py::arg("flight_folder"), py::arg("offer"), Released());
  m.def("offers", &comm::offers, py::arg("communicator"), Released());
  m.def(
      "make_nccl",
      [](const std::shared_ptr<Communicator>& control, int device, double init_timeout_s,
         int max_ctas, int64_t peer_bytes, bool is_gpu_shared, const std::string& file,
         const std::vector<std::string>& wheel_files, const std::vector<int>& sockets,
         bool allows_windows) {
        using comm::nccl::Registration;
        return comm::make_nccl(
            {.device = device,
             .init_timeout_s = init_timeout_s,
             .max_ctas = max_ctas,
             .peer_bytes = peer_bytes,
             .registration = allows_windows ? Registration::kWindow : Registration::kBuffer,
             .is_gpu_shared = is_gpu_shared,
             .search = {file, wheel_files}},
            control, sockets.empty() ? nullptr : comm::make_socket_board(control, sockets));
      },
      py::arg("control"), py::arg("device"), py::arg("init_timeout_s"), py::arg("max_ctas"),
      py::arg("peer_bytes"), py::arg("is_gpu_shared"), py::arg("file"), py::arg("wheel_files"),
      py::arg("sockets") = std::vector<int>(), py::arg("allows_windows") = true, Released());
  m.def(
      "make_peers",
      [](int device, const std::shared_ptr<Communicator>& control) {
        return comm::make_peers(device, control);
      },
      py::arg("device"), py::arg("control"), Released());
  m.def(
      "nccl_library",
      [](const std::string& file, const std::vector<std::string>& wheel_files) {
        const comm::nccl::Api& api = comm::nccl::api({file, wheel_files});
        return std::tuple(comm::nccl::version_text(api.version), api.path,
                          std::string(name(comm::nccl::registration_of(api))));
      },
      py::arg("file"), py::arg("wheel_files"), Released());
  m.def(
      "gpu_status",
      [] {
        std::string why;
        const bool is_there = cuda::is_available(why);
        return std::pair(is_there, why);
      },
      Released());
  m.def("has_cuda_kernels", &kernels::cuda::is_built);
  m.def("use_driver", &cuda::use_driver, py::arg("path"));  // tests
  m.def(
      "make_local",
      [](const std::string& name, int size, double timeout_s) {
        return comm::make_local(Identity{0, size, name, "local", 0, timeout_s});
      },
      py::arg("name"), py::arg("size"), py::arg("timeout_s"), Released());
  m.def("register", &comm::register_communicator, py::arg("name"), py::arg("communicator"),
        Released());
  m.def("unregister", &comm::unregister_communicator, py::arg("name"), Released());
  m.def("find", &comm::find_communicator, py::arg("name"), Released());
}
