// A decode kernel in CUDA C++: one block per sequence and head, a thread per row of the state. Right, and not fast.
#include <torch/extension.h>
#include <cuda_bf16.h>

template <int K>
__global__ void step(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* g,
                     const __nv_bfloat16* beta, const float* A_log, const float* dt_bias, float* state,
                     const int* slots, __nv_bfloat16* o, float scale, long slot_stride, int H, int V) {
  __shared__ float key[K], query[K], decay[K], norms[2];
  const int n = blockIdx.x, h = blockIdx.y, row = threadIdx.x;
  const long head = (long)n * H + h;
  if (slots[n] < 0) {  // padding: nothing is read or written, and the output is zero
    if (row < V) o[head * V + row] = __float2bfloat16(0.f);
    return;
  }
  if (row < 2) norms[row] = 1e-6f;
  __syncthreads();
  for (int c = row; c < K; c += blockDim.x) {
    key[c] = __bfloat162float(k[head * K + c]);
    query[c] = __bfloat162float(q[head * K + c]);
    const float raw = __bfloat162float(g[head * K + c]) + dt_bias[h * K + c];
    decay[c] = expf(-expf(A_log[h]) * (raw > 20.f ? raw : log1pf(expf(raw))));
    atomicAdd(&norms[0], key[c] * key[c]);
    atomicAdd(&norms[1], query[c] * query[c]);
  }
  __syncthreads();
  if (row >= V) return;
  const float by_key = rsqrtf(norms[0]), by_query = rsqrtf(norms[1]) * scale;
  float* S = state + slots[n] * slot_stride + ((long)h * V + row) * K;
  float known = 0.f, out = 0.f;
  for (int c = 0; c < K; ++c) known += S[c] * decay[c] * key[c] * by_key;
  const float learn = 1.f / (1.f + expf(-__bfloat162float(beta[head])));
  const float u = learn * (__bfloat162float(v[head * V + row]) - known);
  for (int c = 0; c < K; ++c) {
    S[c] = S[c] * decay[c] + u * key[c] * by_key;
    out += S[c] * query[c] * by_query;
  }
  o[head * V + row] = __float2bfloat16(out);
}

torch::Tensor decode(torch::Tensor q, torch::Tensor k, torch::Tensor v, torch::Tensor g, torch::Tensor beta,
                     torch::Tensor A_log, torch::Tensor dt_bias, torch::Tensor pool, torch::Tensor slots, double scale) {
  auto o = torch::empty_like(v);
  const int N = q.size(0), H = q.size(2), V = v.size(3);
  auto bf16 = [](torch::Tensor t) { return reinterpret_cast<__nv_bfloat16*>(t.data_ptr()); };
  step<128><<<dim3(N, H), V>>>(bf16(q), bf16(k), bf16(v), bf16(g), bf16(beta), A_log.data_ptr<float>(),
                               dt_bias.data_ptr<float>(), pool.data_ptr<float>(), slots.data_ptr<int>(), bf16(o), scale,
                               pool.stride(0), H, V);
  return o;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("decode", &decode); }
