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
