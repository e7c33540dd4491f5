# Asks the interpreter for torch's folder. Never find_package(Torch): on a CUDA build of torch it stops where
# there is no toolkit, and it overrides CMAKE_CUDA_ARCHITECTURES.
# Sets TPN_TORCH_VERSION, TPN_TORCH_LIBRARIES, TPN_BUILD_DEFINITIONS and the target tpn_torch_headers.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/where_torch.py"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE _failed ERROR_QUIET)

add_library(tpn_torch_headers INTERFACE)
set(TPN_TORCH_VERSION "none")
set(TPN_TORCH_LIBRARIES)
if(NOT _failed)
  list(GET _torch 0 _dir)
  list(GET _torch 1 TPN_TORCH_VERSION)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_dir}/version.py")
  set(TPN_TORCH_LIBRARIES "${_dir}/lib/libtorch_cpu.so" "${_dir}/lib/libc10.so")
  target_include_directories(tpn_torch_headers SYSTEM INTERFACE
    "${_dir}/include" "${_dir}/include/torch/csrc/api/include")
  # Without -fopenmp at::parallel_for is serial, silently. Compile only: the runtime is the one that torch has
  # loaded (GNU's); linking another would put two into one process.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(tpn_torch_headers INTERFACE -fopenmp)
  elseif(TPN_MODULE)
    message(WARNING "${CMAKE_CXX_COMPILER_ID} does not speak GNU OpenMP: large CPU operations run on one thread")
  endif()
endif()
if(TPN_MODULE)
  if(_failed)
    message(FATAL_ERROR "No torch for ${Python_EXECUTABLE}: install torch>=2.11 there first, then "
      "`pip install --no-build-isolation .`")
  elseif(TPN_TORCH_VERSION VERSION_LESS 2.11)
    message(FATAL_ERROR "torch ${TPN_TORCH_VERSION} at ${_dir}: expected torch>=2.11")
  endif()
endif()
message(STATUS "torch ${TPN_TORCH_VERSION}")

set(TPN_BUILD_DEFINITIONS TPN_VERSION="${TPN_VERSION}" TPN_TORCH_VERSION="${TPN_TORCH_VERSION}")
