# Links ggml-squeeze into every program of an unmodified llama.cpp tree that is built with static libraries:
#   cmake -S llama.cpp -B build -DBUILD_SHARED_LIBS=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=PREFIX/lib/cmake/ggml-squeeze/link-llama.cmake
# CMake reads this file at the end of llama.cpp's own project() and calls the function below once all programs are known.
cmake_minimum_required(VERSION 3.19)
include("${CMAKE_CURRENT_LIST_DIR}/ggml-squeeze-config.cmake")
set(GGML_SQUEEZE_REGISTER_SOURCE "${CMAKE_CURRENT_LIST_DIR}/register.c")

function(ggml_squeeze_link_programs directory)
    if(BUILD_SHARED_LIBS)
        message(FATAL_ERROR "ggml-squeeze: with shared ggml libraries load the plugin by GGML_BACKEND_PATH; to link it in, set BUILD_SHARED_LIBS=OFF")
    endif()
    get_property(targets DIRECTORY "${directory}" PROPERTY BUILDSYSTEM_TARGETS)
    foreach(target IN LISTS targets)
        get_target_property(type ${target} TYPE)
        if(type STREQUAL EXECUTABLE)
            target_sources(${target} PRIVATE "${GGML_SQUEEZE_REGISTER_SOURCE}")
            target_link_libraries(${target} PRIVATE ggml-squeeze::static)
            # The library finds ggml's functions by name, in the program itself.
            set_target_properties(${target} PROPERTIES ENABLE_EXPORTS ON)
            target_link_options(${target} PRIVATE -Wl,--wrap=ggml_backend_dev_init)
        endif()
    endforeach()
    get_property(below DIRECTORY "${directory}" PROPERTY SUBDIRECTORIES)
    foreach(one IN LISTS below)
        ggml_squeeze_link_programs("${one}")
    endforeach()
endfunction()

# Targets of other folders are linked from the top one.
cmake_policy(SET CMP0079 NEW)
cmake_language(DEFER CALL ggml_squeeze_link_programs "${CMAKE_CURRENT_SOURCE_DIR}")
