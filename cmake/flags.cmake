# The flags of everything that is ours: target tpn_flags.
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
include(CheckPIESupported)
check_pie_supported(LANGUAGES CXX)

add_library(tpn_flags INTERFACE)
target_compile_options(tpn_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-fstack-protector-strong>"
  # a fused multiply-add rounds once where the dense model rounds twice: contraction would break bitwise equality
  "$<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>"
  # messages name csrc/room/file.cpp, not the folder of the build machine
  "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=>"
  # -U first: some distributions define it themselves; it needs optimisation
  "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<NOT:$<CONFIG:Debug>>>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=3>")
# Not CMAKE_<language>_STANDARD, which CUDA inherits: CMake 3.25 does not know that nvcc 12 and newer speak C++20.
target_compile_features(tpn_flags INTERFACE cxx_std_20)
target_compile_options(tpn_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;-Xcompiler=-Wall,-Wextra,-fstack-protector-strong>")
target_compile_definitions(tpn_flags INTERFACE _GLIBCXX_ASSERTIONS)
target_link_options(tpn_flags INTERFACE LINKER:-z,relro LINKER:-z,now LINKER:-z,noexecstack)
