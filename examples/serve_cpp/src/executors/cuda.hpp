// Owners of CUDA's objects: a stream, pinned and device memory, an executable graph.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "deploycc/refusal.hpp"

namespace deploycc {

inline void check_cuda(cudaError_t status, const char* at) {
    if (status != cudaSuccess) throw Refusal(Kind::backend, std::string("CUDA fails: ") + cudaGetErrorString(status), at, "check the driver and the free memory of the GPU");
}

// A value that `Free` frees; moves, never copies.
template <class T, auto Free>
class CudaOwned {
public:
    CudaOwned() = default;
    explicit CudaOwned(T value) : value_(value) {}
    CudaOwned(CudaOwned&& other) noexcept : value_(std::exchange(other.value_, T{})) {}
    CudaOwned& operator=(CudaOwned&& other) noexcept {
        std::swap(value_, other.value_);
        return *this;
    }
    ~CudaOwned() {
        if (value_) Free(value_);
    }
    T get() const { return value_; }

private:
    T value_{};
};

using Stream = CudaOwned<cudaStream_t, cudaStreamDestroy>;
using GraphExec = CudaOwned<cudaGraphExec_t, cudaGraphExecDestroy>;
using Graph = CudaOwned<cudaGraph_t, cudaGraphDestroy>;
using Pinned = CudaOwned<void*, cudaFreeHost>;
using OnDevice = CudaOwned<void*, cudaFree>;

inline Stream make_stream() {
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    return Stream(stream);
}

inline Pinned make_pinned(std::size_t bytes) {
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, bytes ? bytes : 1, cudaHostAllocDefault), "pinned memory");
    return Pinned(memory);
}

inline OnDevice make_on_device(std::size_t bytes) {
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes ? bytes : 1), "memory of the GPU");
    return OnDevice(memory);
}

// The architecture of the current GPU like sm_89, or nothing without a GPU or a driver.
inline std::string gpu_arch() {
    int device = 0, major = 0, minor = 0;
    const bool found = cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    cudaGetLastError();
    return found ? "sm_" + std::to_string(major) + std::to_string(minor) : "";
}

}  // namespace deploycc
