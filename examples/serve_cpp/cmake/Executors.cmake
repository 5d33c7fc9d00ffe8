# Executors: each is compiled when its headers are found, and skipped with a notice when they are not.

# OpenCV: found by its files, because Debian's libopencv-dnn-dev has no CMake package of its own.
find_path(OPENCV_INCLUDE opencv2/dnn.hpp PATH_SUFFIXES opencv4)
find_library(OPENCV_CORE opencv_core)
find_library(OPENCV_DNN opencv_dnn)
if(OPENCV_INCLUDE AND OPENCV_CORE AND OPENCV_DNN)
  message(STATUS "executor opencv: ${OPENCV_DNN}")
  target_sources(serve PRIVATE src/executors/opencv.cpp)
  target_compile_definitions(serve PRIVATE SERVE_OPENCV)
  target_include_directories(serve SYSTEM PRIVATE ${OPENCV_INCLUDE})
  target_link_libraries(serve PRIVATE ${OPENCV_DNN} ${OPENCV_CORE})
else()
  message(STATUS "executor opencv: SKIPPED, no opencv2/dnn.hpp (Debian: apt-get install libopencv-dnn-dev)")
endif()

# ONNX Runtime: the C API header is enough; the library is opened at run time (see ONNXRUNTIME_LIBRARY).
set(ONNXRUNTIME_LIBRARY "" CACHE FILEPATH "libonnxruntime.so to open when the environment names none")
find_path(ONNXRUNTIME_INCLUDE onnxruntime_c_api.h HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session
          NO_CMAKE_FIND_ROOT_PATH)
if(ONNXRUNTIME_INCLUDE)
  message(STATUS "executor onnxruntime: ${ONNXRUNTIME_INCLUDE}")
  target_sources(serve PRIVATE src/executors/onnxruntime.cpp)
  target_compile_definitions(serve PRIVATE SERVE_ONNXRUNTIME SERVE_ONNXRUNTIME_LIBRARY="${ONNXRUNTIME_LIBRARY}")
  target_include_directories(serve SYSTEM PRIVATE ${ONNXRUNTIME_INCLUDE})
else()
  message(STATUS "executor onnxruntime: SKIPPED, no onnxruntime_c_api.h (set ONNXRUNTIME_ROOT)")
endif()

# TensorRT 10 or 11, or TensorRT-RTX: the headers tell which; the library is opened at run time (see TENSORRT_LIBRARY).
set(TENSORRT_LIBRARY "" CACHE FILEPATH "libnvinfer.so or libtensorrt_rtx.so to open when the environment names none")
find_path(TENSORRT_INCLUDE NvInferRuntime.h HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include include/x86_64-linux-gnu)
find_package(CUDAToolkit QUIET)
if(TENSORRT_INCLUDE AND CUDAToolkit_FOUND)
  message(STATUS "executor tensorrt: ${TENSORRT_INCLUDE}, CUDA ${CUDAToolkit_VERSION}")
  target_sources(serve PRIVATE src/executors/tensorrt.cpp src/executors/tensorrt_runtime.cpp)
  target_compile_definitions(serve PRIVATE SERVE_TENSORRT SERVE_TENSORRT_LIBRARY="${TENSORRT_LIBRARY}")
  target_include_directories(serve SYSTEM PRIVATE ${TENSORRT_INCLUDE})
  target_link_libraries(serve PRIVATE CUDA::cudart_static)
elseif(TENSORRT_INCLUDE)
  message(STATUS "executor tensorrt: SKIPPED, no CUDA toolkit (its headers and libcudart_static.a are needed)")
else()
  message(STATUS "executor tensorrt: SKIPPED, no NvInferRuntime.h (set TENSORRT_ROOT)")
endif()
