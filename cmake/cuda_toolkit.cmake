# What a CUDA toolkit can build, by its version.

set(partita_oldest_cuda 12.1)  # kernels with arguments of more than 4 KB

# The version of `nvcc`; empty when it does not tell.
function(partita_version_of nvcc result)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE told ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" found "${told}")
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# Whom to compile for, unless told: machine code, and for the last one PTX too, from which drivers compile for later GPUs.
# A version that is not known counts as new.
function(partita_architectures_of version result)
  set(architectures 80-real 90-real 100)
  if(version AND version VERSION_LESS 12.8)  # the first one that knows Blackwell
    set(architectures 80-real 90)
  endif()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

# Why a toolkit cannot build the kernels; empty when it can.
function(partita_too_old nvcc version result)
  set(reason "")
  if(version AND version VERSION_LESS partita_oldest_cuda)
    string(CONCAT reason "${nvcc} is of CUDA ${version}, and the kernels need ${partita_oldest_cuda} or newer: put another "
      "nvcc into PATH or set CUDACXX, or use PARTITA_CUDA=OFF")
  endif()
  set(${result} "${reason}" PARENT_SCOPE)
endfunction()
