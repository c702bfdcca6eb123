// Calls of the CUDA runtime, each checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace psm::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a launch error that is not sticky must not fail the next call
    throw std::runtime_error(std::string("psm_kernels: ") + what + ": " +
                             cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

class DeviceGuard {
   public:
    explicit DeviceGuard(int device) : device_(device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;

   private:
    int device_, before_ = 0;
};

inline int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

}  // namespace psm::cuda
