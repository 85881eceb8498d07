// Linked in place of device.cu when the build has no nvcc.
#include "partita/cuda_device.h"

namespace partita {

bool built_with_cuda() { return false; }
int cuda_device_count() { return 0; }

}  // namespace partita
