# What is built with which CUDA toolkit: cmake -DTOOLKIT=cmake/cuda_toolkit.cmake -DFOLDER=an-empty-folder -P this
include(${TOOLKIT})

function(expect what actual expected)
  if(NOT "${actual}" STREQUAL "${expected}")
    message(SEND_ERROR "${what}: '${actual}' in place of '${expected}'")
  endif()
endfunction()

# An nvcc that says what one of that version says.
function(make_nvcc version)
  file(WRITE ${FOLDER}/nvcc "#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\n"
    "echo 'Cuda compilation tools, release ${version}, V${version}.99'\n")
  file(CHMOD ${FOLDER}/nvcc PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
endfunction()

# Version, architectures, "old" where it cannot be used.
foreach(case "11.8 80-real,90 old" "12.0 80-real,90 old" "12.1 80-real,90 new" "12.6 80-real,90 new"
    "12.8 80-real,90-real,100 new" "12.10 80-real,90-real,100 new" "13.0 80-real,90-real,100 new")
  string(REGEX MATCH "^(.*) (.*) (.*)$" found "${case}")
  set(version ${CMAKE_MATCH_1})
  set(age ${CMAKE_MATCH_3})
  string(REPLACE "," ";" architectures "${CMAKE_MATCH_2}")
  make_nvcc(${version})
  partita_version_of(${FOLDER}/nvcc told)
  expect("version" "${told}" ${version})
  partita_architectures_of("${told}" chosen)
  expect("architectures of ${version}" "${chosen}" "${architectures}")
  partita_too_old(${FOLDER}/nvcc "${told}" reason)
  if(age STREQUAL old AND NOT reason MATCHES "/nvcc is of CUDA ${version}, and the kernels need 12.1 or newer")
    message(SEND_ERROR "${version} is too old, and it is said: '${reason}'")
  elseif(age STREQUAL new)
    expect("why ${version} cannot be used" "${reason}" "")
  endif()
endforeach()

file(WRITE ${FOLDER}/nvcc "#!/bin/sh\necho 'clang version 20'\n")
partita_version_of(${FOLDER}/nvcc told)
expect("version of another compiler" "${told}" "")
partita_architectures_of("" chosen)
expect("architectures of an unknown version" "${chosen}" "80-real;90-real;100")
partita_too_old(${FOLDER}/nvcc "" reason)
expect("why an unknown version cannot be used" "${reason}" "")
