// csrc/ptx/setmaxnreg.cuh on emulator::run, which gives every thread what it needs.
#pragma once

namespace flashmoe::ptx {

template <int REGISTERS>
void setmaxnreg_dec() {}

template <int REGISTERS>
void setmaxnreg_inc() {}

}  // namespace flashmoe::ptx
