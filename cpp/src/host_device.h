#pragma once

// Mark functions that the CPU and CUDA code share, so that both compute the same bits; the build defines them for CUDA.
// Those marked DEVICE call functions of their template's type that CUDA has on the device only.
#ifndef PARTITA_HOST_DEVICE
#define PARTITA_HOST_DEVICE
#endif
#ifndef PARTITA_DEVICE
#define PARTITA_DEVICE
#endif
