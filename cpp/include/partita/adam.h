#pragma once

#include <cstdint>
#include <vector>

#include "partita/loss_scale.h"
#include "partita/segments.h"
#include "partita/span.h"
#include "partita/stream.h"

namespace partita {

// Hyper-parameters of one optimizer group.
struct AdamGroup {
    double lr = 1e-3;
    double beta1 = 0.9;
    double beta2 = 0.999;
    double eps = 1e-8;
    double weight_decay = 0.0;
    bool decoupled = false;       // false: Adam, decay joins the gradient (L2); true: AdamW, decay shrinks the weight
    bool bias_correction = true;  // false: the moments are used as they are, too small in the first steps
    std::int64_t waited = 0;      // steps that were taken without this group: its own number is so much lower
};

// Flat buffers of one shard, all of the same number of elements.
struct AdamBuffers {
    Span grads;       // any dtype, read
    Span master;      // f32; no data with a remainder
    Span exp_avg;     // f32
    Span exp_avg_sq;  // f32
    Span params;      // written with the new weights as split_master() does; no data: the master is the parameter
    // Not null: the masters are split into `params` (bf16) and this, see [Note: split masters].
    std::uint16_t* remainder = nullptr;
};

// A shard, and which of its elements belong to which optimizer group.
struct AdamPart {
    AdamBuffers buffers;
    const Segments* segments;
};

// One update of all parts, one pass (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1 with its bias corrections;
// decoupled decay: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2). Reads gradient scale, skip flag and step
// number from `control`; a skipped step writes nothing. Throws std::invalid_argument when sizes, dtypes or groups do
// not match.
void adam(const std::vector<AdamPart>& parts, const std::vector<AdamGroup>& groups, const StepControl* control,
          int threads);
// The same on a device. A step number below 1 is not noticed there.
void adam(const std::vector<AdamPart>& parts, const std::vector<AdamGroup>& groups, const StepControl* control,
          Stream stream);

}  // namespace partita
