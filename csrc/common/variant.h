// Features that are compiled into a kernel. The plain variant has none of them, and does not pay
// for them.
#pragma once

namespace flashmoe {

struct Variant {
  bool local = false;  // any window; the plain variant has none, or is causal
  // Of a backward: dQ is the same bits every time.
  bool deterministic = false;
};

}  // namespace flashmoe
