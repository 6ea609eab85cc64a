// The blocks of rows of a packed batch, listed on the device, where the lengths are. Plain C++, no
// std headers: NVRTC has none.
#pragma once

#include "common/sequence.h"

namespace flashmoe {

// A block of queries or keys of one sequence.
struct alignas(16) PackedBlock {
  Sequence sequence;
  int start;        // its first row in the sequence
  int batch;        // which sequence
  int first_block;  // blocks of queries that are listed before the sequence's first
  int unused;
};

// In device memory. Each sequence's blocks stand together, from its first row on, and longer
// sequences come first. All null where nothing is listed.
struct Schedule {
  PackedBlock* sequences;       // [batch], scratch
  PackedBlock *queries, *keys;  // keys: null where they are not listed
  int* counts;                  // [4]: of blocks of queries, of keys; 0, to draw work from; unused
  int room_queries, room_keys;  // upper bounds of the counts
  int block_queries, block_keys;  // rows of a block
};

constexpr int SCHEDULE_THREADS = 1024;
constexpr int SCHEDULE_CLASSES = 128;  // of lengths
constexpr int SCHEDULE_SMEM_BYTES = 4 * (SCHEDULE_CLASSES + 2 * SCHEDULE_THREADS / 32);
// More blocks than are listed, where sums end: lengths may be anything, and must not overflow.
constexpr int MANY_BLOCKS = (1 << 30) - 1;

struct ScheduleParams {
  Sequences sequences;
  int batch, seqlen_q, seqlen_kv;
  Schedule schedule;
};

}  // namespace flashmoe
