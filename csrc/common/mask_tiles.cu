#include "common/mask_tiles.cuh"

namespace flashmoe::sm90 {

__global__ void __launch_bounds__(MASK_THREADS)
    list_mask_tiles(const __grid_constant__ MaskTilesParams params) {
  list_tiles(params);
}

extern const void* const mask_tiles_entry;
const void* const mask_tiles_entry = reinterpret_cast<const void*>(list_mask_tiles);

}  // namespace flashmoe::sm90
