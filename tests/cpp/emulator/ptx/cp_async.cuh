// csrc/ptx/cp_async.cuh on emulator::run.
#pragma once

#include "device.h"

namespace flashmoe::ptx {

inline unsigned smem_address(const void*) { return emulator::SMEM_BASE; }

inline void cp_async_cg_16_zfill(unsigned dst_smem, const void* src_gmem, bool valid) {
  emulator::cp_async(dst_smem, valid ? src_gmem : nullptr);
}
inline unsigned long long create_policy(bool evict_first) { return evict_first; }
inline void cp_async_cg_16_zfill(unsigned dst_smem, const void* src_gmem, bool valid,
                                 unsigned long long) {
  cp_async_cg_16_zfill(dst_smem, src_gmem, valid);
}
inline void cp_async_commit_group() { emulator::cp_async_commit_group(); }
template <int PENDING>
void cp_async_wait_group() {
  emulator::cp_async_wait_group(PENDING);
}

}  // namespace flashmoe::ptx
