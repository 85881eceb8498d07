#include "partita/cpu_level.h"

#include "simd/kernels.h"

namespace partita {

CpuLevel best_cpu_level() {
#ifdef PARTITA_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) return CpuLevel::avx512;
    if (avx2) return CpuLevel::avx2;
#endif
    return CpuLevel::scalar;
}

const char* name_of(CpuLevel level) {
    switch (level) {
        case CpuLevel::avx512:
            return "avx512";
        case CpuLevel::avx2:
            return "avx2";
        default:
            return "scalar";
    }
}

const Kernels& kernels(CpuLevel level) {
#ifdef PARTITA_X86
    if (level == CpuLevel::avx512) return avx512_kernels();
    if (level == CpuLevel::avx2) return avx2_kernels();
#endif
    (void)level;
    return scalar_kernels();
}

const Kernels& kernels() {
    static const Kernels& best = kernels(best_cpu_level());
    return best;
}

}  // namespace partita
