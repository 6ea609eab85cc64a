// csrc/ptx/tma.cuh on emulator::run.
#pragma once

#include "device.h"
#include "ptx/tensor_map.h"

namespace flashmoe::ptx {

inline void prefetch_tensormap(const void*) {}

inline void cp_async_bulk_tensor_4d_load(unsigned dst_smem, const void* map, unsigned barrier_smem,
                                         int c0, int c1, int c2, int c3) {
  emulator::tma_load(dst_smem, *static_cast<const emulator::TensorMap*>(map), barrier_smem,
                     {c0, c1, c2, c3});
}

inline void cp_async_bulk_tensor_5d_load(unsigned dst_smem, const void* map, unsigned barrier_smem,
                                         int c0, int c1, int c2, int c3, int c4) {
  emulator::tma_load(dst_smem, *static_cast<const emulator::TensorMap*>(map), barrier_smem,
                     {c0, c1, c2, c3, c4});
}

inline void cp_async_bulk_tensor_4d_store(const void* map, unsigned src_smem, int c0, int c1,
                                          int c2, int c3) {
  emulator::tma_store(*static_cast<const emulator::TensorMap*>(map), src_smem, {c0, c1, c2, c3});
}

inline void cp_async_bulk_tensor_5d_store(const void* map, unsigned src_smem, int c0, int c1,
                                          int c2, int c3, int c4) {
  emulator::tma_store(*static_cast<const emulator::TensorMap*>(map), src_smem,
                      {c0, c1, c2, c3, c4});
}

inline void cp_async_bulk_commit_group() { emulator::tma_commit_group(); }

template <int PENDING>
void cp_async_bulk_wait_group_read() {
  static_assert(PENDING == 0, "no kernel leaves some");
  emulator::tma_wait_group_read();
}

inline void fence_proxy_async_shared() {}

}  // namespace flashmoe::ptx
