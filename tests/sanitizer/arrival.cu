// What racecheck makes of an arrival on behalf of others. 32 lanes write, and another warp waits at an mbarrier and reads:
// with -DEACH each lane arrives, without it one does, after its warp has met.
//
// nvcc -arch=sm_90a -o /tmp/arrival arrival.cu && compute-sanitizer --tool racecheck --racecheck-report all /tmp/arrival
#include <cstdint>
#include <cstdio>

__global__ void hand_over(float *out) {
  __shared__ float x[32];
  __shared__ alignas(8) uint64_t word;
  uint32_t barrier = (uint32_t)__cvta_generic_to_shared(&word);
  int lane = threadIdx.x & 31;
#ifdef EACH
  int arrivals = 32;
#else
  int arrivals = 1;
#endif
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
  __syncthreads();
  if (threadIdx.x < 32) {
    x[lane] = lane;
#ifndef EACH
    __syncwarp();
    if (lane == 0)
#endif
      asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(barrier) : "memory");
  } else {
    asm volatile(
        "{ .reg .pred p; W: mbarrier.try_wait.parity.shared.b64 p, [%0], 0; @p bra D; bra W; D: }" ::"r"(barrier)
        : "memory");
    out[lane] = x[lane ^ 5];
  }
}

int main() {
  float *out;
  cudaMalloc(&out, 128);
  hand_over<<<1, 64>>>(out);
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
