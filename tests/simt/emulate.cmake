# The CUDA sources, compiled for the host by the emulator (cuda_emu.h): once into _C, without the CPU kernels, where the
# parity tests run them; and once for each sanitizer, with the CPU kernels and the C++ drivers tests/simt/test_*.cpp.

# A CUDA toolkit has all its headers in one folder; so have the wheels of NVIDIA's that mtlgrad[test] installs.
find_path(MTLGRAD_CUDA_INCLUDE crt/host_defines.h
  HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda "${Python_SITELIB}/nvidia/cu13" PATH_SUFFIXES include)
if(NOT EXISTS "${MTLGRAD_CUDA_INCLUDE}/cuda_runtime_api.h")
  unset(MTLGRAD_CUDA_INCLUDE CACHE)
  message(FATAL_ERROR "  mtlgrad: no CUDA headers for the emulator; pip install 'mtlgrad[test]' brings them, or set "
                      "CUDA_HOME to a CUDA toolkit")
endif()
message(STATUS "mtlgrad: emulating CUDA with the headers of ${MTLGRAD_CUDA_INCLUDE}")

set_source_files_properties(${MTLGRAD_CUDA_SOURCES} PROPERTIES LANGUAGE CXX)

function(mtlgrad_emulate target)
  target_sources(${target} PRIVATE ${MTLGRAD_CUDA_SOURCES} tests/simt/emu_runtime.cpp
    tests/simt/emu_scheduler.cpp)
  target_include_directories(${target} PUBLIC csrc csrc/cuda tests/simt)
  target_include_directories(${target} SYSTEM PUBLIC "${MTLGRAD_CUDA_INCLUDE}")
  target_compile_definitions(${target} PUBLIC MTLGRAD_EMULATE MTLGRAD_WITH_CUDA)
  # Fortified memcpy and longjmp do not know of the fibers' stacks.
  target_compile_options(${target} PUBLIC ${MTLGRAD_CXX_OPTIONS} -Wno-unknown-pragmas -U_FORTIFY_SOURCE -O1)
endfunction()

mtlgrad_emulate(_C)
target_sources(_C PRIVATE csrc/cpu/moments_multiclass.cpp)  # multiclass_workspace
target_compile_definitions(_C PRIVATE "MTLGRAD_CUDA_ARCHS=\"emulated\"" "MTLGRAD_NVCC=\"\"")

# The CPU kernels come along, so that they meet the sanitizers too; without OpenMP, whose library ThreadSanitizer does
# not understand.
file(GLOB MTLGRAD_DRIVERS CONFIGURE_DEPENDS tests/simt/test_*.cpp)
# Undefined behaviour ends the program too; the section is the emulator's shared memory, which gets red zones with it.
# Null pointers end it anyway; without checks for them and for sums of pointers, with fewer optimisations, and with calls
# in place of code in the two largest sources, compiling takes a third of the time.
set(MTLGRAD_SANITIZE_asan -Og -fsanitize=address,undefined -fno-sanitize=null,pointer-overflow,vptr
  -fno-sanitize-recover=all -fsanitize-sections=emu_shared)
set_source_files_properties(csrc/cuda/adatask.cu csrc/cuda/combine.cu PROPERTIES
  COMPILE_OPTIONS --param=asan-instrumentation-with-call-threshold=0)
set(MTLGRAD_SANITIZE_tsan -fsanitize=thread)
foreach(variant asan tsan)
  add_library(kernels_${variant} STATIC EXCLUDE_FROM_ALL ${MTLGRAD_CPU_SOURCES})
  mtlgrad_emulate(kernels_${variant})
  # -UNDEBUG: assertions in kernels hold here
  target_compile_options(kernels_${variant} PUBLIC -UNDEBUG -fno-omit-frame-pointer ${MTLGRAD_SANITIZE_${variant}})
  target_link_options(kernels_${variant} PUBLIC ${MTLGRAD_SANITIZE_${variant}})
  foreach(source ${MTLGRAD_DRIVERS})
    get_filename_component(name "${source}" NAME_WE)
    add_executable(${name}_${variant} "${source}")
    target_link_libraries(${name}_${variant} PRIVATE kernels_${variant})
  endforeach()
endforeach()
