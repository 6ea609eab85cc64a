// csrc/ptx/cluster.cuh on emulator::run.
#pragma once

#include "gpu.h"

namespace flashmoe::ptx {

inline void barrier_cluster_arrive() { emulator::cluster_arrive(); }
inline void barrier_cluster_wait() { emulator::cluster_wait(); }

inline const unsigned char* shared_of(unsigned src_smem, int rank) {
  return emulator::shared_of_rank(src_smem, 8, rank);
}

}  // namespace flashmoe::ptx
