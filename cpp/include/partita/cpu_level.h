#pragma once

namespace partita {

enum class CpuLevel { scalar, avx2, avx512 };

// The best level that this build and this processor have.
CpuLevel best_cpu_level();
const char* name_of(CpuLevel level);

}  // namespace partita
