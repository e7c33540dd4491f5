# TPN_SANITIZE: the C++ tests under sanitizers. Their runtimes must come first in a process, which a Python module
# cannot arrange: so it goes with TPN_MODULE=OFF only.
set(TPN_SANITIZE "" CACHE STRING "sanitizers of the C++ tests: empty, address (and undefined), thread")
set_property(CACHE TPN_SANITIZE PROPERTY STRINGS "" address thread)
if(TPN_SANITIZE STREQUAL "")
  return()
endif()
if(TPN_SANITIZE STREQUAL "address")
  set(_sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(TPN_SANITIZE STREQUAL "thread")
  set(_sanitizers -fsanitize=thread)
else()
  message(FATAL_ERROR "TPN_SANITIZE=${TPN_SANITIZE}: expected nothing, address or thread")
endif()
if(TPN_MODULE OR NOT TPN_TESTS)
  message(FATAL_ERROR "TPN_SANITIZE=${TPN_SANITIZE} needs TPN_MODULE=OFF and TPN_TESTS=ON, "
    "found TPN_MODULE=${TPN_MODULE} and TPN_TESTS=${TPN_TESTS}")
endif()
# Options of a target come after those of the build type. Fortified functions would hide accesses from ASan.
target_compile_options(tpn_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:-O1;-g;-UNDEBUG;-fno-omit-frame-pointer;-U_FORTIFY_SOURCE;${_sanitizers}>")
target_link_options(tpn_flags INTERFACE ${_sanitizers})
