// 16-bit floating-point formats on a host.
#pragma once

#include <bit>
#include <cstdint>

namespace emulator {

inline float from_float16(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}
inline uint16_t to_float16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
// To nearest even; not for NaN.
inline uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
