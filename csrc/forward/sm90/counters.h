// The counters from which the Hopper forward kernel draws its work. Host side.
#pragma once

#include <cuda_runtime.h>

namespace flashmoe::sm90 {

// A number in `device`'s memory that is 0 and that no launch of other work will use while this one
// runs; null when there is none to be had. Needs `device` to be the current one.
unsigned* next_counter(int device, cudaStream_t stream);

}  // namespace flashmoe::sm90
