// Runs the tests if there is a device for them.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdio>

int main(int argc, char** argv) {
    ::testing::InitGoogleTest(&argc, argv);
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if ((error != cudaSuccess || count == 0) && !::testing::GTEST_FLAG(list_tests)) {
        std::printf("[  SKIPPED ] all tests: no CUDA device (%s)\n", cudaGetErrorString(error));
        return 0;
    }
    return RUN_ALL_TESTS();
}
