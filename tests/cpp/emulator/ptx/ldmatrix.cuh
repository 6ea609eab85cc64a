// csrc/ptx/ldmatrix.cuh on emulator::run.
#pragma once

#include <cstring>

#include "device.h"

namespace flashmoe::ptx {

enum class Move { LOAD, LOAD_TRANSPOSED, STORE, STORE_TRANSPOSED };

// Lane l's register r holds of matrix r row l / 4, elements l % 4 * 2 and the next; transposed,
// column l / 4. Matrix r's rows are where lanes 8 * r on say.
template <Move MOVE>
void move_matrices(const char* what, unsigned (&rmem)[4], unsigned smem) {
  struct Mine {
    unsigned* rmem;
    unsigned smem;
  } mine{rmem, smem};
  emulator::collective(what, &mine, [](emulator::Slots slots) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* registers = reinterpret_cast<uint8_t*>(static_cast<Mine*>(slots[lane])->rmem);
      for (int i = 0; i < 8; ++i) {
        int row = lane / 4, column = lane % 4 * 2 + i % 2;
        if (MOVE == Move::LOAD_TRANSPOSED || MOVE == Move::STORE_TRANSPOSED) std::swap(row, column);
        const unsigned address = static_cast<Mine*>(slots[i / 2 * 8 + row])->smem;
        uint8_t* memory = emulator::shared(address, 16) + column * 2;
        if (MOVE == Move::STORE || MOVE == Move::STORE_TRANSPOSED) {
          std::memcpy(memory, registers + i * 2, 2);
        } else {
          std::memcpy(registers + i * 2, memory, 2);
        }
      }
    }
  });
}

inline void ldmatrix_x4(unsigned (&rmem)[4], unsigned src_smem) {
  move_matrices<Move::LOAD>("ldmatrix", rmem, src_smem);
}

inline void ldmatrix_x4_trans(unsigned (&rmem)[4], unsigned src_smem) {
  move_matrices<Move::LOAD_TRANSPOSED>("ldmatrix.trans", rmem, src_smem);
}

inline unsigned movmatrix_trans(unsigned x) {
  const int row = emulator::thread_index.x % 32 / 4, column = emulator::thread_index.x % 4 * 2;
  unsigned y = 0;
  for (int i = 0; i < 2; ++i) {
    const unsigned word = emulator::shuffle("movmatrix", x, (column + i) * 4 + row / 2);
    y |= (row % 2 ? word >> 16 : word & 0xffff) << 16 * i;
  }
  return y;
}

inline void stmatrix_x4(unsigned dst_smem, const unsigned (&rmem)[4]) {
  unsigned copy[4] = {rmem[0], rmem[1], rmem[2], rmem[3]};
  move_matrices<Move::STORE>("stmatrix", copy, dst_smem);
}

inline void stmatrix_x4_trans(unsigned dst_smem, const unsigned (&rmem)[4]) {
  unsigned copy[4] = {rmem[0], rmem[1], rmem[2], rmem[3]};
  move_matrices<Move::STORE_TRANSPOSED>("stmatrix.trans", copy, dst_smem);
}

}  // namespace flashmoe::ptx
