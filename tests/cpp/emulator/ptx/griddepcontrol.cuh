// csrc/ptx/griddepcontrol.cuh on emulator::run, where kernels run one after the other.
#pragma once

namespace flashmoe::ptx {

inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

}  // namespace flashmoe::ptx
