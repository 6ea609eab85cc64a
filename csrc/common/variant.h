// What a kernel can do beside the plain dense call, chosen when it is compiled. A kernel of the
// plain variant has the machine code that it would have without the others.
#pragma once

namespace flashmoe {

struct Variant {
  bool local = false;  // any window; the plain variant has none, or is causal
  // Of a backward: dQ is the same bits every time.
  bool deterministic = false;
};

}  // namespace flashmoe
