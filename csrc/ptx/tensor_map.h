// A CUtensorMap, which only the driver's headers declare.
#pragma once

namespace flashmoe::ptx {

struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

}  // namespace flashmoe::ptx
